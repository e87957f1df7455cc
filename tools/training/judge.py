"""The final figures beside their baseline, and the bar a model must clear to be shipped."""

import math
from typing import NamedTuple

from rich.console import Console
from transformers import LlamaForCausalLM

from training.evaluate import HeldOut, Recall, held_out_figures, recall_table
from training.stream import Stream
from training.tasks import FactFormat
from training.trigram import trigram_bits

CHECK_LENGTH, CHECK_FACTS, CHECK_RECALL = 1_024, 6, 0.95
_PROMPTS = 256


class Figures(NamedTuple):
    model: HeldOut
    trigram: HeldOut
    recall: list[Recall]


def measure(
    model: LlamaForCausalLM, form: FactFormat, train: Stream, held_out: Stream, context: int, console: Console
) -> Figures:
    """Measures and prints everything; `context` is the window for bits per byte, tokens."""
    trigram = baseline(train, held_out, model.config.vocab_size)
    figures = held_out_figures(model, held_out, context)
    for name, value in (("trigram", trigram), ("model", figures)):
        console.print(f"{name}: {value.bits_per_byte:.3f} bits per byte, {value.loss:.3f} nats per token, held out")
    table = recall_table(model, form, held_out, _PROMPTS)
    for row in table:
        console.print(f"recall of {row.facts} facts in {row.length:,} tokens: {row.share:.1%} of {row.prompts}")
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
    share = next(row.share for row in figures.recall if (row.length, row.facts) == (CHECK_LENGTH, CHECK_FACTS))
    if share < CHECK_RECALL:
        raise SystemExit(
            f"Nothing written: recall at {CHECK_LENGTH:,} tokens must be at least {CHECK_RECALL}, got {share:.3f}."
        )
