"""What the model is trained and tested on: source code with facts planted between its lines, and lists of facts.

A fact is a line `key K17 = 4821`: one token for the key, two for the value. Asking for it is the same line up to and
including the space after the equals sign.
"""

from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from training.stream import IntArray, Stream
from training.tokenizer import KEYS, NUMBERS

IGNORED, CODE, ANSWER = 0, 1, 2  # what a token counts as in the loss
MAX_FACTS = 24
ANSWER_TOKENS = 2
_INTRODUCE = 0.6  # chance that the next planted line is a new fact, not a question


class Sample(NamedTuple):
    ids: IntArray  # [n] tokens
    kind: IntArray  # [n] IGNORED, CODE or ANSWER


class Facts(NamedTuple):
    keys: IntArray  # [n], distinct, 0-99
    values: IntArray  # [n, 2], 0-99


class FactFormat:
    """Writes facts as tokens, exactly as the tokenizer would split the written line."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.keys: IntArray = np.asarray(tokenizer.convert_tokens_to_ids(KEYS))
        self.numbers: IntArray = np.asarray(tokenizer.convert_tokens_to_ids(NUMBERS))
        template = tokenizer.encode("\nkey K17 = 4821")
        self._template: IntArray = np.asarray(template)
        self._key_at = template.index(self.keys[17])
        self.width = len(template)  # tokens in a line
        if template[-ANSWER_TOKENS:] != [self.numbers[48], self.numbers[21]]:
            raise ValueError(f"a fact must end in two number tokens, got {template}")

    def line(self, facts: Facts, index: int) -> IntArray:
        """Fact number `index` as a line, its newline first: [width]."""
        ids = self._template.copy()
        ids[self._key_at] = self.keys[facts.keys[index]]
        ids[-ANSWER_TOKENS:] = self.numbers[facts.values[index]]
        return ids

    def kind(self, asked: bool) -> IntArray:
        """The line's loss kinds: only an asked value counts: [width]."""
        kind = np.full(self.width, IGNORED)
        if asked:
            kind[-ANSWER_TOKENS:] = ANSWER
        return kind


def draw_facts(rng: np.random.Generator, count: int) -> Facts:
    return Facts(rng.permutation(len(KEYS))[:count], rng.integers(0, len(NUMBERS), (count, ANSWER_TOKENS)))


def code_with_facts(rng: np.random.Generator, form: FactFormat, source: Stream, length: int) -> Sample:
    """Code in which facts are planted and asked again further on; as many questions as facts."""
    count = int(rng.integers(2, max(4, min(MAX_FACTS, length // (3 * form.width))) + 1))
    facts = draw_facts(rng, count)
    lines = [(form.line(facts, fact), form.kind(asked)) for fact, asked in _agenda(rng, count)]
    return _plant(rng, source, lines, length - len(lines) * form.width)


def recall_prompt(rng: np.random.Generator, form: FactFormat, source: Stream, length: int, count: int) -> Sample:
    """The test: `count` facts at random depths in code, then one question; the last two tokens are its answer."""
    facts = draw_facts(rng, count)
    lines = [(form.line(facts, fact), form.kind(asked=False)) for fact in range(count)]
    question = int(rng.integers(count))
    body = _plant(rng, source, lines, length - (count + 1) * form.width)
    ids = np.concatenate([body.ids, form.line(facts, question)])
    return Sample(ids, np.concatenate([np.full(len(body.ids), IGNORED), form.kind(asked=True)]))


def fact_list(rng: np.random.Generator, form: FactFormat, length: int) -> Sample:
    """Nothing but facts: every one stated once, then all asked again in new orders."""
    most = min(len(KEYS), length // (2 * form.width))
    count = int(rng.integers(max(2, most // 3), most + 1))
    facts = draw_facts(rng, count)
    rounds = length // (form.width * count) + 1
    order = [(fact, turn > 0) for turn in range(rounds) for fact in rng.permutation(count)]
    ids = np.concatenate([form.line(facts, fact) for fact, _ in order])
    kind = np.concatenate([form.kind(asked) for _, asked in order])
    return Sample(ids[:length], kind[:length])


def pairs(rng: np.random.Generator, form: FactFormat, length: int) -> Sample:
    """Bare key-value triples in ever new orders: the easiest form of recall, and what the curriculum starts with."""
    most = min(len(KEYS), length // 6)
    limit = most if rng.random() < 0.5 else max(2, most // 3)
    count = int(rng.integers(2, limit + 1))
    facts = draw_facts(rng, count)
    triples = np.concatenate([form.keys[facts.keys][:, None], form.numbers[facts.values]], axis=1)
    rounds = length // (3 * count) + 1
    ids = np.concatenate([triples[rng.permutation(count)].ravel() for _ in range(rounds)])
    kind = np.tile([IGNORED, ANSWER, ANSWER], rounds * count)
    kind[: 3 * count] = IGNORED
    return Sample(ids[:length], kind[:length])


def _agenda(rng: np.random.Generator, count: int) -> list[tuple[int, bool]]:
    """2 * count planted lines in order, as (fact, asked): a fact is never asked before it was stated."""
    agenda: list[tuple[int, bool]] = []
    stated = 0
    while len(agenda) < 2 * count:
        if stated == 0 or (stated < count and rng.random() < _INTRODUCE):
            agenda.append((stated, False))
            stated += 1
        else:
            agenda.append((int(rng.integers(stated)), True))
    return agenda


def _plant(rng: np.random.Generator, source: Stream, lines: list[tuple[IntArray, IntArray]], code: int) -> Sample:
    """`lines` in their order between the lines of a window of `code` tokens."""
    window = source.window(rng, code)
    places = np.sort(rng.choice(window.line_starts, len(lines)))
    ids, kind = [], []
    for piece, (line, line_kind) in zip(np.split(window.ids, places), [*lines, (None, None)], strict=True):
        ids.append(piece)
        kind.append(np.full(len(piece), CODE))
        if line is not None and line_kind is not None:
            ids.append(line)
            kind.append(line_kind)
    return Sample(np.concatenate(ids), np.concatenate(kind))
