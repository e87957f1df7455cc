"""kvpress's presses beside our methods: same weights, token ids and questions, in an environment of their own.

kvpress needs an older transformers than this package, so `kvpress_worker.py` runs in a second virtual environment.
Before a cell counts, that environment's full cache must give the logits that ours gives.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quality_tool.answers import Answers
from training.train import ROOT

if TYPE_CHECKING:
    from quality_tool.session import Session

HOME = ROOT / "build" / "kvpress-venv"
REQUIREMENTS = ("kvpress==0.5.5", "torch>=2.11,<2.14")  # the range of torch that this package is installed with
FAMILIES = ("llama", "mistral")
PRESSES = (
    "StreamingLLMPress",
    "SnapKVPress",
    "ObservedAttentionPress",
    "TOVAPress",
    "ExpectedAttentionPress",
    "KeyDiffPress",
    "KnormPress",
    "PyramidKVPress",
)
UNSUPPORTED = "not supported by kvpress"
TOLERANCE = 1e-4  # of the logits' range
_WORKER = Path(__file__).with_name("kvpress_worker.py")


def judge(session: Session, shares: list[float], folder: Path = ROOT / "build" / "kvpress") -> None:
    """Adds a cell for every press and share to the session's records; a full budget is the full cache itself."""
    jobs = [(press, share) for press in PRESSES for share in shares if share < 1]
    if not jobs:
        return
    if session.family not in FAMILIES:
        for press, share in jobs:
            session.record_absence(press, share, UNSUPPORTED)
        return
    out = folder / session.family
    run(environment(), session.folder, session.material, jobs, out)
    full = json.loads((out / "full.json").read_text())
    check_logits(full["logits"], session.model, session.material.texts[0].prompt)
    session.records.presses["versions"] = full["versions"]
    for press, share in jobs:
        told = json.loads(file_of(out, press, share).read_text())
        if "why_not" in told:
            session.record_absence(press, share, told["why_not"])
            continue
        settings = session.records.presses.setdefault(press, {})
        settings |= told.pop("parameters") | {f"tokens kept per layer at {share:.3g}": told.pop("kept")}
        session.record(press, share, Answers(**told))


def run(python: Path, model: Path, material: Any, jobs: list[tuple[str, float]], out: Path) -> None:
    """One process for all jobs; SystemExit where it breaks."""
    out.mkdir(parents=True, exist_ok=True)
    for stale in out.glob("*.json"):
        stale.unlink()
    material.save(out / "material.json")
    names = [f"{press}:{share}" for press, share in jobs]
    command = [str(python), str(_WORKER), str(model), str(out / "material.json"), str(out), *names]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1"})
    if ended.returncode:
        raise SystemExit(f"kvpress's worker must end with status 0, got {ended.returncode}; --no-peers leaves it out")


def file_of(out: Path, press: str, share: float) -> Path:
    return out / f"{press}_{share}.json"


def environment() -> Path:
    """The interpreter of kvpress's environment, made at the first call."""
    python, stamp = HOME / "bin" / "python", HOME / "installed"
    wanted = " ".join(REQUIREMENTS)
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"making {HOME} for {wanted}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(HOME)], check=True)
        # -I: pip would else see the egg-info in the working folder, and call its transformers a conflict
        subprocess.run([str(python), "-I", "-m", "pip", "install", "--quiet", *REQUIREMENTS], check=True)
        stamp.write_text(wanted)
    return python


@torch.no_grad()
def check_logits(theirs: list[float], model: Any, prompt: list[int]) -> None:
    """SystemExit unless both environments' untouched models agree on what follows `prompt`."""
    expected, given = model(torch.tensor([prompt])).logits[0, -1], torch.tensor(theirs)
    error = float((given - expected).abs().max() / (expected.max() - expected.min()))
    if not error <= TOLERANCE:
        what = "the full cache's logits in kvpress's environment"
        raise SystemExit(f"{what} must be within {TOLERANCE} of ours, got {error:.2g} of their range")
