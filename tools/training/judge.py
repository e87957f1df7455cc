"""The final figures beside their baseline, and the bar a model must clear to be shipped."""

import math
from typing import NamedTuple

from rich.console import Console
from transformers import PreTrainedModel

from training.curriculum import Forms
from training.evaluate import HeldOut, Recall, held_out_figures, recall_table
from training.stream import Stream
from training.trigram import trigram_bits

CHECK_LENGTH, CHECK_RECALL = 2_048, 0.95
_PROMPTS = 256


class Figures(NamedTuple):
    model: HeldOut
    trigram: HeldOut
    recall: list[Recall]


def measure(
    model: PreTrainedModel, forms: Forms, train: Stream, held_out: Stream, context: int, console: Console
) -> Figures:
    """Measures and prints everything; `context` is the window for bits per byte, tokens."""
    trigram = baseline(train, held_out, model.config.vocab_size)
    figures = held_out_figures(model, held_out, context)
    for name, value in (("trigram", trigram), ("model", figures)):
        console.print(f"{name}: {value.bits_per_byte:.3f} bits per byte, {value.loss:.3f} nats per token, held out")
    table = recall_table(model, forms, held_out, _PROMPTS)
    for row in table:
        what = f"recall of {row.facts} facts, keys of {row.key_tokens}, in {row.length:,} tokens"
        console.print(f"{what}: {row.share:.1%} of {row.prompts}")
    return Figures(figures, trigram, table)


def baseline(train: Stream, held_out: Stream, vocab_size: int) -> HeldOut:
    """The trigram's figures; it leaves out the first two held-out tokens, the model only the first."""
    bits, tokens = trigram_bits(train.ids, held_out.ids, vocab_size), len(held_out.ids) - 2
    return HeldOut(bits / held_out.bytes, bits * math.log(2) / tokens, tokens)


def check(figures: Figures) -> None:
    """SystemExit with one sentence for a model below the bar."""
    model, trigram = figures.model.bits_per_byte, figures.trigram.bits_per_byte
    if model >= trigram:
        raise SystemExit(
            f"Nothing written: held-out bits per byte must be below the trigram's {trigram:.3f}, got {model:.3f}."
        )
    for row in figures.recall:
        if row.length == CHECK_LENGTH and row.share < CHECK_RECALL:
            raise SystemExit(
                f"Nothing written: recall of {row.facts} facts (keys of {row.key_tokens}) at {CHECK_LENGTH:,} tokens "
                f"must be at least {CHECK_RECALL}, got {row.share:.3f}; the checkpoint is kept."
            )
