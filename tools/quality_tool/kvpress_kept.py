"""Which tokens of a prompt kvpress's presses keep: `tools/kvpress_fixtures`, for `tests/policies/test_kvpress.py`.

    python kvpress_kept.py ASSETS OUT.json

For the interpreter of kvpress's own environment; imports nothing of ours. The prompts are cut from the shipped
held-out text, one after the other. Positions come from the press's own `compress`: it gathers values as it gathers
keys, so values that are positions come back as those it keeps. A budget is kvpress's compression_ratio by its rounding
(`ratio`). Where the last token kept and the best one lost have scores within MARGIN of each other, the maker stops:
another library version or another summing order could choose otherwise there, and the tests allow no exceptions.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import kvpress
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

FAMILIES = ("llama", "mistral")
LENGTHS = (300, 420, 560)  # tokens of each prompt
MARGIN = 1e-4  # of the last kept token's score


class Case(NamedTuple):
    """A press with its settings, the prompt by number, tokens kept per layer (pyramid: the mean over layers)."""

    press: str
    prompt: int
    budget: int
    settings: dict[str, int] = {}
    scores: bool = False  # write down every token's score too


CASES = (
    Case("StreamingLLMPress", 0, 90, {"n_sink": 4}),
    Case("StreamingLLMPress", 1, 33, {"n_sink": 1}),
    Case("StreamingLLMPress", 2, 64, {"n_sink": 16}),
    Case("SnapKVPress", 0, 100, {"window_size": 32, "kernel_size": 5}),
    Case("SnapKVPress", 1, 60, {"window_size": 16, "kernel_size": 7}),
    Case("SnapKVPress", 2, 140, {"window_size": 64, "kernel_size": 5}),  # kvpress's defaults
    Case("SnapKVPress", 1, 120, {"window_size": 8, "kernel_size": 1}, scores=True),
    Case("PyramidKVPress", 1, 120, {"window_size": 8, "kernel_size": 7, "beta": 5}),
    Case("PyramidKVPress", 2, 90, {"window_size": 8, "kernel_size": 5, "beta": 9}),
    Case("PyramidKVPress", 0, 160, {"window_size": 16, "kernel_size": 5, "beta": 20}),  # capped by the prompt's length
    Case("ObservedAttentionPress", 0, 100, scores=True),
    Case("ObservedAttentionPress", 1, 60, scores=True),
    Case("ObservedAttentionPress", 2, 140, scores=True),
)


class Watched:
    """A press that tells what it kept: per layer positions [G, kept], scores [G, n]."""

    def __init__(self, press: Any) -> None:
        self.press = press
        self.kept: list[list[list[int]]] = []
        self.scores: list[Tensor] = []
        self._compress, press.compress = press.compress, self.compress

    def compress(
        self,
        module: Any,
        hidden: Tensor,
        keys: Tensor,
        values: Tensor,
        attentions: Tensor | None,
        given: dict[str, Any],
    ) -> tuple[Tensor, Tensor]:
        """Keys [1, G, n, D] and values to those kept, as kvpress does; its own gather tells their positions."""
        at = torch.arange(keys.shape[2], dtype=values.dtype)[:, None].expand_as(values)
        chosen, places = self._compress(module, hidden, keys, at, attentions, given)
        if not torch.equal(keys.gather(2, places.long()), chosen):
            raise SystemExit(f"{self.press}: values must be gathered as keys are")
        self.kept.append(places[0, :, :, 0].long().sort(-1).values.tolist())
        self.scores.append(self.press.score(module, hidden, keys, values, attentions, given)[0].double())
        return chosen, values.gather(2, places.long())


def main(assets: str, out: str) -> None:
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    prompts = cut(Path(assets) / "llama-stdlib")
    weights, made = {}, []
    for family in FAMILIES:
        folder = Path(assets) / f"{family}-stdlib"
        if cut(folder) != prompts:
            raise SystemExit(f"{folder.name} must cut the text into the tokens that llama-stdlib does")
        weights[family] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        for case in CASES:
            made.append({"family": family} | kept(folder, case, prompts[case.prompt]))
    versions = {library: version(library) for library in ("kvpress", "transformers", "torch")}
    head = {"made by": "tools/kvpress_fixtures", "versions": versions, "weights": weights, "margin": MARGIN}
    write(Path(out), head | {"prompts": prompts, "cases": made})


def cut(folder: Path) -> list[list[int]]:
    ids = AutoTokenizer.from_pretrained(folder).encode((folder / "held_out.txt").read_text())
    begins = [sum(LENGTHS[:number]) for number in range(len(LENGTHS))]
    return [ids[begin : begin + length] for begin, length in zip(begins, LENGTHS, strict=True)]


def kept(folder: Path, case: Case, ids: list[int]) -> dict[str, Any]:
    """The case, and of each layer and key/value head the positions kept, in order."""
    attention = "eager" if case.press == "ObservedAttentionPress" else "sdpa"  # it needs the attention itself
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
    watched = Watched(getattr(kvpress, case.press)(compression_ratio=ratio(case, len(ids)), **case.settings))
    with watched.press(model):
        model(torch.tensor([ids]), past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
    counts = [len(layer[0]) for layer in watched.kept]
    if sum(counts) != case.budget * len(counts):
        raise SystemExit(f"{case}: tokens kept per layer must be {case.budget} on average, got {counts}")
    margin = min(map(gap, watched.scores, watched.kept))
    if margin < MARGIN:
        raise SystemExit(f"{case}: scores at the border must differ by {MARGIN} in {folder.name}, got {margin:.2g}")
    told = {name: value for name, value in case._asdict().items() if name != "scores"}
    told |= {"margin": float(f"{margin:.2g}"), "kept": watched.kept}
    return told | {"scores": list(map(encoded, watched.scores))} if case.scores else told


def ratio(case: Case, length: int) -> float:
    """kvpress keeps int(length * (1 - ratio)), and half a token more keeps rounding away; a pyramid needs it exact."""
    half = 0 if case.press == "PyramidKVPress" else 0.5
    return 1 - (case.budget + half) / length


def gap(scores: Tensor, positions: list[list[int]]) -> float:
    """How far the best token lost is below the last one kept, as a share of it; the worst head's."""
    is_kept = torch.zeros(scores.shape, dtype=torch.bool).scatter(1, torch.tensor(positions), True)
    last, best = scores.where(is_kept, torch.inf).amin(-1), scores.where(~is_kept, -torch.inf).amax(-1)
    return float(((last - best) / last).min())


def encoded(scores: Tensor) -> str:
    """[G, n] as little-endian fp32 in base64."""
    return base64.b64encode(scores.float().numpy().astype("<f4").tobytes()).decode()


def write(path: Path, told: dict[str, Any]) -> None:
    """One line per case: a change of one is a change of one line."""
    cases = ",\n".join(json.dumps(case, separators=(",", ":")) for case in told.pop("cases"))
    head = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in told.items())
    path.write_text(f'{{\n{head},\n"cases": [\n{cases}\n]\n}}\n')


if __name__ == "__main__":
    main(*sys.argv[1:])
