"""The check before the timing: full states, prompts without ties, and that wrong kernels are caught."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from zsmerge_compile.bench import shapes
from zsmerge_compile.bench.check import check_decode, check_extend
from zsmerge_compile.bench.decided import prompts
from zsmerge_compile.bench.fill import fill
from zsmerge_compile.bench.our_steps import program
from zsmerge_compile.bench.plain import PLAIN
from zsmerge_compile.bench.rows import Row
from zsmerge_compile.bench.seam import instead
from zsmerge_compile.lower.kernels import Kernel, decode_step
from zsmerge_compile.ops import contracts, reference
from zsmerge_compile.ops.state import LayerLayout, Rule, State, allocate

CPU = torch.device("cpu")
SHAPE = shapes.named("tiny", 1)


def test_a_filled_state_is_one_that_decoding_goes_on_from() -> None:
    layout = LayerLayout(heads=4, kv_heads=2, head_dim=8, proximity=5, context=6, residual=3)
    rule = Rule(5, 6, 0.6, 0.98, 8**-0.5)
    state = allocate(layout, 2, torch.float32)
    fill(state, 5, seen := 40)
    for step in range(8):
        ring = state.position[:, :, :6][state.weight[:, :, :6] > 0].view(2, 2, 5).sort(-1).values
        assert ring.tolist() == [[list(range(seen - 5, seen))] * 2] * 2
        total = state.weight.sum(-1)
        assert bool((total == 5 + 6 + 3 * 7 + step).all()), "every step merges one token, so none is lost"
        tokens = [torch.randn(2, heads, 1, 8) for heads in (4, 2, 2)]
        at = torch.full((2,), seen)
        _, state = reference.extend(state, *tokens, at, torch.zeros_like(at), rule)
        seen += 1


DECAY_AT = 9 + 2 + 5  # after the state, seen, active, and the rule's first five


def _no_decay(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """Ours, but scores never decay."""
    return decode_step(query, key, value, *rest[:DECAY_AT], 1.0, *rest[DECAY_AT + 1 :])


@pytest.mark.parametrize("kernel", [PLAIN, Kernel("forgetful", _no_decay)], ids=lambda kernel: kernel.name.split()[0])
def test_a_wrong_kernel_is_caught(kernel: Kernel) -> None:
    built = program(SHAPE.build("cpu", torch.float32), Row("op", 2, 64, 16))
    with instead(contracts.DECODE, kernel):
        verdict = check_decode(built, steps=1)
    assert not verdict.ok and "differ" in verdict.text, verdict


def _extend(score: Callable[[Tensor], Tensor], *given: Any) -> Tensor:
    """Right on an empty cache, but of a filled one's scores it makes something else first."""
    state = State(*given[contracts.STATE_AT])
    state.score.copy_(torch.where(state.weight > 0, score(state.score), 0.0))
    out: Tensor = contracts.EXTEND(*given)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_is_wrong_on_filled_caches_only_is_caught(dtype: torch.dtype) -> None:
    """The path of chunked prompts, in half precision, too."""
    built = program(SHAPE.build("cpu", dtype), Row("op", 1, 64, 40))
    with instead(contracts.EXTEND, Kernel("right", partial(_extend, lambda score: score))):
        assert check_extend(built).ok
    with instead(contracts.EXTEND, Kernel("doubling", partial(_extend, lambda score: 2 * score))):
        verdict = check_extend(built)
    assert not verdict.ok and "on a filled cache" in verdict.text and "differ" in verdict.text, verdict


@pytest.mark.parametrize("parts", [(40, 39, 1), (8, 7, 1), (3, 1, 1), (20, 0, 4), (20, 20, 0)], ids=str)
def test_rounding_decides_nothing_in_the_prompts_that_are_checked(parts: tuple[int, int, int]) -> None:
    """The best of those that leave is far behind the worst of those that stay, in every head."""
    layout = LayerLayout(4, 2, 16, *parts)
    rule = Rule(layout.proximity, layout.context, 0.6, 0.98, 16**-0.5)
    state, none = allocate(layout, 1, torch.float32), torch.zeros(1, dtype=torch.int64)
    seen = none.clone()
    for tokens in prompts(layout, rule.scale, (160, 64), torch.float32, CPU):
        _, held, received = reference.attend(state, *tokens, seen, none, rule)
        singles = layout.slots - layout.residual
        scores = torch.cat([(state.score * rule.decay ** received.shape[2] + held)[:, :, :singles], received], 2)
        position = torch.cat(
            [state.position[:, :, :singles], (seen + torch.arange(received.shape[2])).expand_as(received)], 2
        )
        live = torch.cat([state.weight[:, :, :singles] > 0, torch.ones_like(received, dtype=torch.bool)], 2)
        _, state = reference.extend(state, *tokens, seen, none, rule)
        seen = seen + received.shape[2]
        rivals = live & (position < seen - layout.proximity)
        ranked = torch.where(rivals, scores, 0.0).sort(-1, descending=True).values
        if layout.context:
            assert bool((ranked[..., layout.context - 1] > 2 * ranked[..., layout.context]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_right_kernels_are_green(dtype: torch.dtype) -> None:
    built = program(SHAPE.build("cpu", dtype), Row("op", 2, 64, 40))
    for verdict in (check_decode(built), check_extend(built)):
        assert verdict.ok, verdict.text
