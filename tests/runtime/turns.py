"""What the generate tests share: prompts, calls, comparisons."""

from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from tests.models_zoo import prompt

PAD = 0


def padded(batch: int = 3, length: int = 9) -> dict[str, Tensor]:
    """input_ids and attention_mask, every row but the first padded differently on the left."""
    inputs = prompt(batch, length, pads=tuple(2 * row for row in range(batch)))
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def end_token(model: Any, inputs: dict[str, Tensor], at: int = 4) -> int:
    """A token that row 0 generates at step `at` of greedy search: rows then stop at different steps."""
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=None)
    return int(out[0, inputs["input_ids"].shape[1] + at])


def same(model: Any, run: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Both models' sequences, asserted equal."""
    torch.manual_seed(7)
    expected = model.generate(**inputs, **options)
    torch.manual_seed(7)
    got = run.generate(**inputs, **options)
    assert torch.equal(got, expected)
    return got


def turn(run: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    defaults = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    return run.generate(**inputs, **defaults | options)


def extended(sequences: Tensor, mask: Tensor, new: Tensor, eos: int | None = None) -> dict[str, Tensor]:
    """A caller's next turn: the sequences and new columns, the mask 0 after each row's end token."""
    generated = sequences[:, mask.shape[1] :]
    ended = torch.zeros_like(generated) if eos is None else (generated == eos).long()
    valid = (ended.cumsum(1) - ended) == 0
    columns = torch.cat([sequences, new], 1)
    return {"input_ids": columns, "attention_mask": torch.cat([mask, valid.long(), torch.ones_like(new)], 1)}


class Collect(BaseStreamer):
    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True
