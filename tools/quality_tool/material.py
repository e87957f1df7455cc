"""What every method is judged on: the same token ids for all, cut from files that training never saw.

A `Text` is a prompt and the tokens that really follow it: their loss, and what a method writes greedily instead. A
`Recall` is code in which facts are planted, and questions about some of them; the questions come after the context has
been compressed, so no method knows what will be asked. All prompts have one length, all rows of a batch are full.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from training.corpus import stdlib_files
from training.stream import Stream
from training.tasks import ANSWER_TOKENS, FactFormat, Facts, plant
from training.train import ROOT

ASSETS = ROOT / "zsmerge_compile" / "assets"
PROMPT = 1_792  # tokens; prompt and continuation stay within 2,048: Mistral's window, and what all were trained on
TRUTH = 192
FACTS = 12


class Size(NamedTuple):
    texts: int
    recalls: int


FULL, QUICK = Size(32, 32), Size(4, 4)


@dataclass(frozen=True)
class Text:
    prompt: list[int]
    truth: list[int]


@dataclass(frozen=True)
class Question:
    ids: list[int]  # up to and including the space before the answer
    answer: list[int]
    depth: float  # where the fact was planted: 0 the context's beginning, 1 its end


@dataclass(frozen=True)
class Recall:
    prompt: list[int]
    questions: list[Question]


@dataclass(frozen=True)
class Material:
    texts: list[Text]
    recalls: list[Recall]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Material:
        raw = json.loads(path.read_text())
        recalls = [Recall(r["prompt"], [Question(**q) for q in r["questions"]]) for r in raw["recalls"]]
        return cls([Text(**text) for text in raw["texts"]], recalls)


def held_out(tokenizer: PreTrainedTokenizerFast) -> Stream:
    """The files training never saw, by name: another Python's library would be split in another way."""
    names = json.loads((ASSETS / "llama-stdlib" / "training.json").read_text())["held_out_files"]
    return Stream([file for file in stdlib_files() if file.name in names], tokenizer)


def make(tokenizer: PreTrainedTokenizerFast, size: Size, seed: int = 0) -> Material:
    """Texts from evenly spaced places; recalls with one-token keys, seeded."""
    source, form = held_out(tokenizer), FactFormat(tokenizer)
    begins = np.linspace(0, len(source.ids) - PROMPT - TRUTH, size.texts).astype(int)
    windows = [source.ids[begin : begin + PROMPT + TRUTH].tolist() for begin in begins]
    rng = np.random.default_rng(seed)
    texts = [Text(ids[:PROMPT], ids[PROMPT:]) for ids in windows]
    return Material(texts, [_recall(rng, form, source) for _ in range(size.recalls)])


def _recall(rng: np.random.Generator, form: FactFormat, source: Stream) -> Recall:
    """A context of PROMPT tokens with FACTS facts, and one question for each, the earliest planted first."""
    facts = form.draw(rng, FACTS)
    lines = [(form.line(facts, fact), form.kind(asked=False)) for fact in range(FACTS)]
    planted = plant(rng, source, lines, PROMPT - FACTS * form.width)
    ids = planted.ids.tolist()
    return Recall(ids, [_question(form, facts, fact, ids) for fact in range(FACTS)])


def _question(form: FactFormat, facts: Facts, fact: int, context: list[int]) -> Question:
    line = form.line(facts, fact).tolist()
    at = next(i for i in range(len(context)) if context[i : i + len(line)] == line)
    return Question(line[:-ANSWER_TOKENS], line[-ANSWER_TOKENS:], at / (len(context) - len(line)))
