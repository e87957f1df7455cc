"""What the models are trained and tested on: source code with facts planted between its lines, lists of facts, copies.

A fact is a line `key K17 = 4821`: a key of one token, or of two (`key K1723 = 4821`), and a value of two. Asking for it
is the same line up to and including the space after the equals sign. Keys of two tokens come with others that share
their first token, so that both have to be matched.
"""

from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from training.stream import IntArray, Stream
from training.tokenizer import KEYS, NUMBERS

IGNORED, CODE, ANSWER, COPIED = 0, 1, 2, 3  # what a token counts as in the loss
MAX_FACTS = 24
ANSWER_TOKENS = 2
_INTRODUCE = 0.6  # chance that the next planted line is a new fact, not a question
_SHARING = 3  # two-token keys to each first token
_MIN_COPY, _MAX_COPY = 16, 128  # tokens
_CUE = 4  # tokens of a copy that do not count: nothing says yet that it is one


class Sample(NamedTuple):
    ids: IntArray  # [n] tokens
    kind: IntArray  # [n] IGNORED, CODE, ANSWER or COPIED


class Facts(NamedTuple):
    keys: IntArray  # [n, 1 or 2], distinct rows, 0-99
    values: IntArray  # [n, 2], 0-99


class FactFormat:
    """Writes facts as tokens, exactly as the tokenizer would split the written line."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, key_tokens: int = 1) -> None:
        self.key_tokens = key_tokens
        self._first: IntArray = np.asarray(tokenizer.convert_tokens_to_ids(KEYS))
        self._numbers: IntArray = np.asarray(tokenizer.convert_tokens_to_ids(NUMBERS))
        template = tokenizer.encode(f"\nkey K17{'23' * (key_tokens - 1)} = 4821")
        self._template: IntArray = np.asarray(template)
        self._key_at = template.index(self._first[17])
        self.width = len(template)  # tokens in a line
        if template[-ANSWER_TOKENS:] != [self._numbers[48], self._numbers[21]]:
            raise ValueError(f"a fact must end in two number tokens, got {template}")

    def key_and_value(self, facts: Facts) -> IntArray:
        """The bare tokens of every fact: [n, key_tokens + 2]."""
        first, second = self._first[facts.keys[:, :1]], self._numbers[facts.keys[:, 1:]]
        return np.concatenate([first, second, self._numbers[facts.values]], axis=1)

    def line(self, facts: Facts, index: int) -> IntArray:
        """Fact number `index` as a line, its newline first: [width]."""
        tokens, ids = self.key_and_value(facts)[index], self._template.copy()
        ids[self._key_at : self._key_at + self.key_tokens] = tokens[: self.key_tokens]
        ids[-ANSWER_TOKENS:] = tokens[-ANSWER_TOKENS:]
        return ids

    def kind(self, asked: bool) -> IntArray:
        """The line's loss kinds: only an asked value counts: [width]."""
        kind = np.full(self.width, IGNORED)
        if asked:
            kind[-ANSWER_TOKENS:] = ANSWER
        return kind

    def draw(self, rng: np.random.Generator, count: int) -> Facts:
        """`count` facts of different keys."""
        firsts, values = rng.permutation(len(KEYS)), rng.integers(0, len(NUMBERS), (count, ANSWER_TOKENS))
        if self.key_tokens == 1:
            return Facts(firsts[:count, None], values)
        among = max(2, -(-count // _SHARING))
        chosen = rng.permutation(among * len(NUMBERS))[:count]
        return Facts(np.stack([firsts[chosen // len(NUMBERS)], chosen % len(NUMBERS)], axis=1), values)


def code_with_facts(rng: np.random.Generator, form: FactFormat, source: Stream, length: int) -> Sample:
    """Code in which facts are planted and asked again further on; as many questions as facts."""
    count = int(rng.integers(2, max(4, min(MAX_FACTS, length // (3 * form.width))) + 1))
    facts = form.draw(rng, count)
    lines = [(form.line(facts, fact), form.kind(asked)) for fact, asked in _agenda(rng, count)]
    return plant(rng, source, lines, length - len(lines) * form.width)


def recall_prompt(rng: np.random.Generator, form: FactFormat, source: Stream, length: int, count: int) -> Sample:
    """The test: `count` facts at random depths in code, then one question; the last two tokens are its answer."""
    facts = form.draw(rng, count)
    lines = [(form.line(facts, fact), form.kind(asked=False)) for fact in range(count)]
    question = int(rng.integers(count))
    body = plant(rng, source, lines, length - (count + 1) * form.width)
    ids = np.concatenate([body.ids, form.line(facts, question)])
    return Sample(ids, np.concatenate([np.full(len(body.ids), IGNORED), form.kind(asked=True)]))


def fact_list(rng: np.random.Generator, form: FactFormat, length: int) -> Sample:
    """Nothing but facts: every one stated once, then all asked again in new orders."""
    most = min(len(KEYS), length // (2 * form.width))
    count = int(rng.integers(max(2, most // 3), most + 1))
    facts = form.draw(rng, count)
    rounds = length // (form.width * count) + 1
    order = [(fact, turn > 0) for turn in range(rounds) for fact in rng.permutation(count)]
    ids = np.concatenate([form.line(facts, fact) for fact, _ in order])
    kind = np.concatenate([form.kind(asked) for _, asked in order])
    return Sample(ids[:length], kind[:length])


def pairs(rng: np.random.Generator, form: FactFormat, length: int) -> Sample:
    """Bare keys and values in ever new orders: the easiest form of recall, and what the curriculum starts with."""
    width = form.key_tokens + ANSWER_TOKENS
    most = min(len(KEYS), length // (2 * width))
    limit = most if rng.random() < 0.5 else max(2, most // 3)
    count = int(rng.integers(2, limit + 1))
    bare = form.key_and_value(form.draw(rng, count))
    rounds = length // (width * count) + 1
    ids = np.concatenate([bare[rng.permutation(count)].ravel() for _ in range(rounds)])
    kind = np.tile([IGNORED] * form.key_tokens + [ANSWER] * ANSWER_TOKENS, rounds * count)
    kind[: width * count] = IGNORED
    return Sample(ids[:length], kind[:length])


def copied_code(rng: np.random.Generator, source: Stream, length: int) -> Sample:
    """Code whose last tokens are a passage of it once more."""
    size = int(rng.integers(_MIN_COPY, min(_MAX_COPY, length // 3) + 1))
    code = source.window(rng, length - size).ids
    begin = int(rng.integers(0, len(code) - size + 1))
    kind = np.concatenate([np.full(len(code), CODE), np.full(_CUE, IGNORED), np.full(size - _CUE, COPIED)])
    return Sample(np.concatenate([code, code[begin : begin + size]]), kind)


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


def plant(rng: np.random.Generator, source: Stream, lines: list[tuple[IntArray, IntArray]], code: int) -> Sample:
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
