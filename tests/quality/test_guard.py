"""The default's quality stays where it was measured: held-out loss at a 20% budget, of every shipped model.

`recorded.json` holds the losses. A change that moves one on purpose records it anew, and says so:

    PYTHONPATH=tools:. .venv/bin/python tests/quality/test_guard.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from quality_tool import ours
from quality_tool.material import Material, Text
from quality_tool.methods import Method
from training.model import FAMILIES
from zsmerge_compile.cli.demo import ASSETS

RECORDED = Path(__file__).with_name("recorded.json")
BAND = 0.005  # nats per token: another CPU's rounding may evict another token here and there
PROMPT, TRUTH = 640, 128  # tokens


def losses(family: str) -> dict[str, float]:
    """Nats per token of the full cache and of the default config at 20%, over four cuts of the held-out file."""
    folder = ASSETS.with_name(f"{family}-stdlib")
    ids = AutoTokenizer.from_pretrained(folder).encode((folder / "held_out.txt").read_text())
    cuts = [ids[at : at + PROMPT + TRUTH] for at in (0, 250, 500, 750)]
    material = Material([Text(cut[:PROMPT], cut[PROMPT:]) for cut in cuts], [])
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    budgets = {"full": PROMPT + TRUTH, "20%": round(0.2 * PROMPT)}
    return {name: mean(ours.judge(model, Method({}), slots, material).losses) for name, slots in budgets.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_of_the_default_at_20_percent(family: str) -> None:
    recorded, measured = json.loads(RECORDED.read_text())[family], losses(family)
    for name, loss in measured.items():
        assert loss == pytest.approx(recorded[name], abs=BAND), name
    assert measured["20%"] > measured["full"]


if __name__ == "__main__":
    told = {family: {name: round(loss, 4) for name, loss in losses(family).items()} for family in FAMILIES}
    RECORDED.write_text(json.dumps(told, indent=1) + "\n")
