"""One run: every model, method and budget asked for, in turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from quality_tool import material as materials
from quality_tool import ours
from quality_tool.answers import Answers
from quality_tool.figures import figures
from quality_tool.material import ASSETS, PROMPT, TRUTH, Material
from quality_tool.methods import FULL_CACHE, METHODS, Method
from quality_tool.records import Records
from training.judge import CHECK_RECALL
from training.publish import environment
from zsmerge_compile.errors import ZSMergeError

SURVIVORS = ("zsmerge, segment", "eviction only", "H2O"), 0.1  # methods and share whose kept tokens are drawn
SAME_LOSS = 5e-4  # nats per token, between two runs on one machine
_EVERYTHING = PROMPT + TRUTH  # slots for all that is ever fed: a question and its answer are shorter than TRUTH


class Session:
    """A model, its material, and the full cache's and the base method's answers, which others are held against."""

    def __init__(
        self,
        family: str,
        base: Method,
        size: materials.Size,
        records: Records,
        conditions: dict[str, Any],
        console: Console,
        keep: bool = False,
    ) -> None:
        """keep: add to what an earlier run found of this model, see `Records.begin`."""
        self.base, self.family, self.folder = base, family, ASSETS / f"{family}-stdlib"
        if not self.folder.exists():
            raise SystemExit(
                f"{family} must be a shipped model, got none in {self.folder}; tools/train {family} makes it"
            )
        self.model: Any = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        self.material: Material = materials.make(AutoTokenizer.from_pretrained(self.folder), size)
        self.records, self.console = records, console
        records.begin(family, conditions, keep)
        self.full: Answers = ours.judge(self.model, Method({"residual": 0}), _EVERYTHING, self.material)
        self._bases: dict[float, Answers] = {}
        self._check_full()
        self.record(FULL_CACHE, None, self.full)

    def _check_full(self) -> None:
        """SystemExit unless the full cache answers as in the run whose cells are kept."""
        known, found = self.records.find(self.family, FULL_CACHE, None), float(np.mean(self.full.losses))
        if known is not None and abs(known["loss"]["mean"] - found) > SAME_LOSS:
            what = f"the full cache's loss of {self.family}"
            raise SystemExit(
                f"{what} must be {known['loss']['mean']}, as recorded, got {found:.4f}; name another --out"
            )

    def record(self, method: str, share: float | None, answers: Answers, more: int = 0) -> None:
        """Adds one cell, and says so; `more` as in Method."""
        base = None if share is None else self.base_answers(share)
        told = figures(answers, self.full, base, self.material)
        slots = None if share is None else slots_of(share) + more
        self.records.add(model=self.family, method=method, share=share, slots=slots, **told)
        budget = "" if share is None else f" {share:.0%}"
        loss, recall = told["loss"]["mean"], told["recall"]["mean"]
        self.console.print(
            f"{self.family}: {method}{budget}: loss {loss:.3f}, recall {recall:.1%}, {answers.seconds} s"
        )

    def record_absence(self, method: str, share: float, why: str) -> None:
        self.records.add(model=self.family, method=method, share=share, slots=slots_of(share), why_not=why)
        self.console.print(f"{self.family}: {method} {share:.0%}: {why}")

    def ours(self, methods: dict[str, Method], shares: list[float]) -> None:
        for name, method in methods.items():
            for share in shares:
                slots = slots_of(share)
                if method.policy is not None:
                    self._policy(name, method, share)
                    continue
                known = not method.cosine and method.config(slots) == self.base.config(slots)
                answers = self.base_answers(share) if known else ours.judge(self.model, method, slots, self.material)
                self.record(name, share, answers, method.more)

    def _policy(self, name: str, method: Method, share: float) -> None:
        """A policy that does not serve a budget or a model says so, and that is recorded."""
        assert method.policy is not None
        mine = method._replace(policy=method.policy.with_weights(self.family))  # those shipped with the model
        try:
            answers = ours.judge(self.model, mine, slots_of(share), self.material)
        except ZSMergeError as error:
            self.record_absence(name, share, str(error).splitlines()[0])
        else:
            self.record(name, share, answers, method.more)

    def base_answers(self, share: float) -> Answers:
        if share not in self._bases:
            self._bases[share] = ours.judge(self.model, self.base, slots_of(share), self.material)
        return self._bases[share]

    def survivors(self) -> None:
        """Which positions of the first text's prompt are kept, per layer and key/value head."""
        names, share = SURVIVORS
        for name in names:
            kept = ours.kept_positions(self.model, METHODS[name], slots_of(share), self.material)
            entry = dict(model=self.family, method=name, share=share, tokens=PROMPT, kept=kept)
            self.records.survivors.append(entry)
        self.records.write()


def slots_of(share: float) -> int:
    """A budget in slots per key/value head."""
    return round(share * PROMPT)


def conditions(size: materials.Size, family: str, arguments: list[str]) -> dict[str, Any]:
    """What a model's figures hold for."""
    told: dict[str, Any] = {"command": " ".join(("tools/quality", *arguments)), **environment(), "dtype": "float32"}
    told |= {"prompt tokens": PROMPT, "continuation tokens": TRUTH, "texts": size.texts}
    told |= {"recall prompts": size.recalls, "facts and questions in each": materials.FACTS}
    weak = _weak(ASSETS / f"{family}-stdlib") or "no length trained on"
    return told | {f"recall of the full cache below {CHECK_RECALL:.0%} at": weak}


def _weak(folder: Path) -> list[str]:
    rows = json.loads((folder / "training.json").read_text())["recall"]
    below = [row for row in rows if row["share"] < CHECK_RECALL]
    return [f"{row['facts']} facts, {row['length']} tokens, keys of {row['key_tokens']}" for row in below]
