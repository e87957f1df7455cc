"""Masks are recognised by what they do to real tokens, whatever computed them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.graphs import captured, trace
from zsmerge_compile.capture import capture
from zsmerge_compile.errors import UnsupportedMaskError
from zsmerge_compile.models.spec import ModelSpec
from zsmerge_compile.passes.classify_mask import classify_masks
from zsmerge_compile.passes.graph import PassContext
from zsmerge_compile.passes.masks import MaskKind
from zsmerge_compile.passes.normalize_attention import normalize_attention

H, D, VOCAB, LIMIT = 6, 8, 32, 96
SLOPES = torch.tensor([2.0 ** -(1 + i) for i in range(H)])
LOW = torch.finfo(torch.float32).min

_EXAMPLE = tuple(torch.ones(2, 11, dtype=torch.int64) for _ in range(3))

Mask = Callable[..., Tensor | None]


class _Decoder(nn.Module):
    """Attention layers whose masks are `mask(self, ids, seen, positions, query)`."""

    def __init__(self, *masks: Mask, is_causal: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, H * D)
        self.head = nn.Linear(H * D, VOCAB)
        self.masks, self.is_causal = masks, is_causal
        self.stored = nn.Buffer(torch.ones(LIMIT, LIMIT, dtype=torch.bool).tril())
        self.window = nn.Buffer(torch.tensor(700))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embedding(input_ids).view(*input_ids.shape, H, D).transpose(1, 2)
        for mask_of in self.masks:
            mask = mask_of(self, input_ids, attention_mask, position_ids, x)
            x = F.scaled_dot_product_attention(x, x, x, mask, is_causal=self.is_causal)
        return self.head(x.transpose(1, 2).flatten(2))[:, -1]


def classify(
    mask: Mask, window: int | None = None, limit: int | None = None, is_causal: bool = False, dtype: Any = torch.float32
) -> MaskKind:
    """The kind found in the prefill graph of a decoder with that mask, whose spec claims `window` and `limit`."""
    spec = ModelSpec("test", 1, VOCAB, limit, (window,), lambda model, *inputs: model(*inputs))
    decoder = _Decoder(mask, is_causal=is_causal).to(dtype).eval()
    gm = capture(decoder, spec, 1).prefill if limit else trace(decoder, *_EXAMPLE, dynamic=True)
    assert normalize_attention(gm, PassContext(spec)) == 1
    return classify_masks(gm, PassContext(spec))[0]


def _distance(seen: Tensor) -> Tensor:
    """Columns between query and key [T, T]."""
    columns = torch.arange(seen.shape[1])
    return columns[:, None] - columns


def _padded(shown: Tensor, seen: Tensor) -> Tensor:
    return shown & seen[:, None, None].bool()


def _bias(shown: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.where(shown, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)


CAUSAL: dict[str, Mask] = {
    "columns": lambda m, ids, seen, at, x: _padded(_distance(seen) >= 0, seen),
    "without padding": lambda m, ids, seen, at, x: _distance(seen) >= 0,
    "positions": lambda m, ids, seen, at, x: _padded(at[:, None, :, None] >= at[:, None, None, :], seen),
    "fp32 minimum": lambda m, ids, seen, at, x: _bias(_padded(_distance(seen) >= 0, seen)),
    "triu of infinity": lambda m, ids, seen, at, x: torch.full((seen.shape[1],) * 2, -torch.inf).triu(1),
    "like the scores": lambda m, ids, seen, at, x: torch.full_like(x @ x.mT, LOW).triu(1),
    "ten thousands": lambda m, ids, seen, at, x: (1 - torch.ones(seen.shape[1], seen.shape[1]).tril()) * -1e5,
    "lower triangle": lambda m, ids, seen, at, x: torch.ones_like(x @ x.mT).tril().bool(),
    "a constant beside": lambda m, ids, seen, at, x: _bias(_distance(seen) >= 0) + 3.0,
}


def test_is_causal_without_a_mask() -> None:
    assert classify(lambda *_: None, is_causal=True) == MaskKind("causal")


def test_a_stored_mask_ends_at_the_models_limit() -> None:
    stored: Mask = lambda m, ids, seen, at, x: m.stored[: seen.shape[1], : seen.shape[1]]  # noqa: E731
    assert classify(stored, limit=LIMIT) == MaskKind("causal")


def _in(window: Any) -> Mask:
    return lambda m, ids, seen, at, x: _padded((_distance(seen) >= 0) & (_distance(seen) < window), seen)


WINDOWS: dict[str, tuple[Mask, int]] = {
    "32": (_in(32), 32),
    "4096": (_in(4096), 4096),
    "compared as float": (_in(900.0), 900),
    "by subtraction": (lambda m, ids, seen, at, x: (_distance(seen) >= 0) & (_distance(seen) - 77 <= 0), 78),
    "in a buffer": (lambda m, ids, seen, at, x: (_distance(seen) >= 0) & (_distance(seen) < m.window), 700),
    "of one": (_in(1), 1),
    "as a bias": (lambda m, ids, seen, at, x: _bias(_in(50)(m, ids, seen, at, x)), 50),
    "two triangles": (
        lambda m, ids, seen, at, x: torch.ones_like(x @ x.mT).bool().tril().triu(-9),
        10,
    ),
}


@pytest.fixture(scope="module")
def kinds() -> dict[str, MaskKind]:
    """What is found for every mask of CAUSAL and WINDOWS, each a layer of one decoder."""
    masks = CAUSAL | {name: mask for name, (mask, _) in WINDOWS.items()}
    spec = ModelSpec("test", len(masks), VOCAB, None, (None,) * len(masks), lambda model, *inputs: model(*inputs))
    gm = trace(_Decoder(*masks.values()).eval(), *_EXAMPLE, dynamic=True)
    assert normalize_attention(gm, PassContext(spec)) == len(masks)
    found = classify_masks(gm, PassContext(spec))
    assert list(found) == list(range(len(masks)))
    return dict(zip(masks, found.values(), strict=True))


@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name: str, kinds: dict[str, MaskKind]) -> None:
    assert kinds[name] == MaskKind("causal")


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_that_no_config_names(name: str, kinds: dict[str, MaskKind]) -> None:
    assert kinds[name] == MaskKind("sliding_window", WINDOWS[name][1])


def test_the_configs_window_is_cross_checked() -> None:
    assert classify(_in(32), window=32).window == 32
    with pytest.raises(UnsupportedMaskError, match="window of layer 0 must be 16 as its config says, got 32"):
        classify(_in(32), window=16)
    with pytest.raises(UnsupportedMaskError, match="must be 700 as its config says, got no window"):
        classify(CAUSAL["columns"], window=700)


def test_a_window_beyond_the_last_position_is_none() -> None:
    stored: Mask = lambda m, ids, seen, at, x: m.stored[: seen.shape[1], : seen.shape[1]]  # noqa: E731
    assert classify(stored, window=LIMIT, limit=LIMIT) == MaskKind("causal")


def _positions(seen: Tensor) -> Tensor:
    return (seen.cumsum(-1) - 1) * seen


def _falcon(m: Any, ids: Tensor, seen: Tensor, at: Tensor, x: Tensor) -> Tensor:
    """Slopes and positions in bf16, their product divided in the model's dtype."""
    slopes = (SLOPES * 1.1)[:, None].bfloat16()
    bias = (slopes * _positions(seen)[:, None, :]).to(x.dtype)[:, :, None] / math.sqrt(D)
    return bias.masked_fill(~_padded(_distance(seen) >= 0, seen), torch.finfo(x.dtype).min)


def _relative(m: Any, ids: Tensor, seen: Tensor, at: Tensor, x: Tensor) -> Tensor:
    """Slopes times (key - query), as the ALiBi paper writes it."""
    bias = -SLOPES[:, None, None] * _distance(seen)
    return bias.masked_fill(_distance(seen) < 0, -torch.inf)


def _windowed(m: Any, ids: Tensor, seen: Tensor, at: Tensor, x: Tensor) -> Tensor:
    return _relative(m, ids, seen, at, x).masked_fill(_distance(seen) >= 40, -torch.inf)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_alibi_keeps_its_rounding(dtype: torch.dtype) -> None:
    kind = classify(_falcon, dtype=dtype)
    assert kind == MaskKind("alibi", None, tuple((SLOPES * 1.1).bfloat16().tolist()), math.sqrt(D), True)
    seen = torch.ones(1, 900, dtype=torch.int64)
    want = _falcon(None, seen, seen, seen, torch.zeros(1, dtype=dtype))[0, :, -1]
    assert torch.equal(kind.bias(torch.arange(900), dtype), want)


def test_alibi_relative_to_the_query() -> None:
    kind = classify(_relative)
    assert (kind.kind, kind.window, kind.alibi_bf16) == ("alibi", None, False)
    assert kind.slopes is not None
    torch.testing.assert_close(torch.tensor(kind.slopes) / kind.alibi_divisor, SLOPES)


def test_alibi_in_a_window() -> None:
    kind = classify(_windowed)
    assert (kind.kind, kind.window) == ("alibi", 40)


REFUSED: dict[str, tuple[Mask, str]] = {
    "nothing hidden": (lambda m, ids, seen, at, x: seen[:, None, None].bool(), "query 0 sees 640 keys"),
    "no mask": (lambda *_: None, "got none at all"),
    "prefix": (lambda m, ids, seen, at, x: (_distance(seen) >= 0) | (torch.arange(seen.shape[1]) < 20), "sees 20 keys"),
    "chunks": (
        lambda m, ids, seen, at, x: (
            (_distance(seen) >= 0) & ((at // 50)[:, None, :, None] == (at // 50)[:, None, None])
        ),
        "got one where query",
    ),
    "sinks beside a window": (
        lambda m, ids, seen, at, x: (
            (_distance(seen) >= 0) & ((_distance(seen) < 30) | (torch.arange(seen.shape[1]) < 4))
        ),
        "got one where query",
    ),
    "every other key": (
        lambda m, ids, seen, at, x: (_distance(seen) >= 0) & (_distance(seen) % 2 == 0),
        "got one where",
    ),
    "windows by head": (
        lambda m, ids, seen, at, x: (_distance(seen) >= 0) & (_distance(seen) < torch.arange(9, 9 + H)[:, None, None]),
        "got one where query",
    ),
    "token ids": (
        lambda m, ids, seen, at, x: (_distance(seen) >= 0) & (ids != 0)[:, None, None],
        "depends on the tokens",
    ),
    "logarithmic bias": (
        lambda m, ids, seen, at, x: (
            -_distance(seen).clamp(min=0).add(1).log().masked_fill(_distance(seen) < 0, torch.inf)
        ),
        "a bias that is no ALiBi",
    ),
    "a bump": (
        lambda m, ids, seen, at, x: _relative(m, ids, seen, at, x) + (_distance(seen) == 100) * 5.0,
        "a bias that is no ALiBi",
    ),
    "positions by column": (
        lambda m, ids, seen, at, x: (
            (_distance(seen) >= 0) & ((_distance(seen) < 9) | (seen[:, :1] == 1)[:, None, None])
        ),
        "left padding shifts",
    ),
    "a distance beyond reason": (_in(2**30), "at most 4,194,304 tokens, got 1073741824"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_anything_else_is_refused_by_name(name: str) -> None:
    mask, message = REFUSED[name]
    with pytest.raises(UnsupportedMaskError, match=message) as raised:
        classify(mask)
    assert "test_classify_mask.py:" in str(raised.value)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any op returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.elements = max(self.elements, out.untyped_storage().nbytes() // out.element_size())
        return out


def test_the_whole_mask_is_never_computed() -> None:
    _, ctx, graphs = captured("mistral-w4096", "eager")
    normalize_attention(graphs.prefill, ctx)
    with _Largest() as largest:
        (kind,) = classify_masks(graphs.prefill, ctx).values()
    assert kind == MaskKind("sliding_window", 4096)
    assert largest.elements < 40 * 4200  # forty query rows or fewer, instead of 4,200


@pytest.mark.parametrize("attn, dtype", [("sdpa", torch.bfloat16), ("eager", torch.float32)])
def test_falcon_rw(attn: str, dtype: torch.dtype) -> None:
    """transformers 5.17 to 5.23 add ALiBi twice in eager mode; what the graph does is what counts."""
    _, ctx, graphs = captured("falcon-rw", attn, dtype)
    normalize_attention(graphs.prefill, ctx)
    (kind,) = classify_masks(graphs.prefill, ctx).values()
    times = 2 if attn == "eager" else 1
    slopes = tuple(times * 2.0 ** -(2 * (i + 1)) for i in range(4))
    assert kind == MaskKind("alibi", None, slopes, math.sqrt(D), True)


def test_falcon_with_rotary_positions_is_causal() -> None:
    _, ctx, graphs = captured("falcon-new")
    normalize_attention(graphs.prefill, ctx)
    assert classify_masks(graphs.prefill, ctx) == {0: MaskKind("causal")}
