"""Find out what each layer's mask means by evaluating the part of the prefill graph that computes it.

Before (any computation of the mask, here a window):

    mask = aten.logical_and(aten.le(kv, q), aten.gt(kv, aten.sub(q, 4096)))
    out = zsmerge.attention(q, k, v, mask, False, 0.125)

After: the graph is unchanged; the result is {0: MaskKind("sliding_window", window=4096), ...}.

The mask is evaluated at a length above every integer constant in its computation and every window in the spec, with
and without left padding, for query rows from the first to the last. Keys that are padding are not looked at: no
padding ever enters the cache, so it does not matter whether a model's mask hides it.
Does not fire (raises UnsupportedMaskError with the node and its source line) for anything but causal masks, sliding
windows and ALiBi, for a mask that differs between heads other than by slopes, and where spec.windows claims otherwise.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from zsmerge_compile.errors import UnsupportedMaskError, must
from zsmerge_compile.passes.alibi import TOLERANCE, deviation, fit_alibi
from zsmerge_compile.passes.evaluate import Rows, largest_constant, needed
from zsmerge_compile.passes.graph import PassContext, attention_sites, value, where
from zsmerge_compile.passes.masks import MaskKind

HIDDEN = -1e4  # a bias this low hides a key
LEAST_LENGTH = 640  # bf16 rounds whole numbers from 257 on, and ALiBi's rounding must show
LARGEST_CONSTANT = 2**22
MARGIN = 64  # columns beyond the largest constant
PADS = 5
KINDS = "causal, a sliding window or ALiBi"
CAUSAL = MaskKind("causal")


def classify_masks(gm: fx.GraphModule, ctx: PassContext) -> dict[int, MaskKind]:
    """The kind of every canonical attention's mask in the prefill graph `gm`, by layer."""
    kinds: dict[int, MaskKind] = {}
    known: dict[object, MaskKind] = {}  # layers usually share one mask
    for layer, site in attention_sites(gm):
        mask, is_causal = site.args[3:5]
        key = (mask, is_causal, value(site.args[0]).shape[-1])  # type: ignore[arg-type]
        if key not in known:
            known[key] = _classify(gm, ctx, site)
        kinds[layer] = known[key]
        _cross_check(ctx, kinds[layer], layer, site)
    return kinds


def confirm_masks(gm: fx.GraphModule, ctx: PassContext) -> None:
    """Raise UnsupportedMaskError unless every mask is of the kind that `ctx.masks` has from another trace.

    A graph of one fixed length may not say what its masks are (a window of 4096 shows all of 30 tokens), only whether
    they differ from what is known.
    """
    confirmed: set[object] = set()
    for layer, site in attention_sites(gm):
        key, kind = (*site.args[3:5], ctx.masks[layer]), ctx.masks[layer]
        if key in confirmed:
            continue
        query = value(site.args[0])  # type: ignore[arg-type]
        one_token = isinstance(query.shape[2], int) and query.shape[2] == 1
        mask = None if one_token and site.args[3] is None else _mask_of(site)
        if mask is None:
            right = kind.slopes is None and _reaches(kind, query.shape[2])
        else:
            right = all(_agrees(_evaluated(gm, ctx, mask, pads), kind, site) for pads in (0, PADS))
        if not right:
            expected = f"{kind}, as in the model's own trace"
            raise UnsupportedMaskError(must(f"attention mask of layer {layer}", expected, "another", where(site)))
        confirmed.add(key)


def _reaches(kind: MaskKind, length: Any) -> bool:
    """Whether a window shows all of a fixed length."""
    return kind.window is None or (isinstance(length, int) and length <= kind.window)


def _mask_of(site: fx.Node) -> fx.Node | None:
    """The mask of a canonical attention, None for `is_causal`. Raises UnsupportedMaskError."""
    mask, is_causal = site.args[3:5]
    if not isinstance(mask, fx.Node):
        if is_causal:
            return None
        raise UnsupportedMaskError(must("attention mask", KINDS, "none at all", where(site)))
    if is_causal:
        raise UnsupportedMaskError(must("attention", "masked or is_causal", "both", where(site)))
    if any(node.target == "input_ids" for node in needed(mask)):
        raise UnsupportedMaskError(must("attention mask", KINDS, "one that depends on the tokens", where(mask)))
    return mask


def _classify(gm: fx.GraphModule, ctx: PassContext, site: fx.Node) -> MaskKind:
    mask = _mask_of(site)
    if mask is None:
        return CAUSAL
    plain = _evaluated(gm, ctx, mask, pads=0)
    kind = _kind(plain, site)
    padded = _evaluated(gm, ctx, mask, pads=PADS)
    if not _agrees(padded, kind, site):
        got = f"one that left padding shifts: without padding it is {kind}"
        raise UnsupportedMaskError(must("attention mask", KINDS, got, where(mask)))
    return kind


class _Mask:
    """A mask at chosen real query rows and all real key columns, counted from the first real token.

    query    [R] positions of the rows
    visible  [heads, R, n] bool
    bias     [heads, R, n] float64, or None for a bool mask
    """

    def __init__(self, mask: Tensor, query: Tensor, node: fx.Node) -> None:
        self.query, self.node, self.dtype = query, node, mask.dtype
        self.visible = mask if mask.dtype == torch.bool else mask > HIDDEN
        self.bias = None if mask.dtype == torch.bool else mask.double()
        if self.bias is not None and self.bias.isnan().any():
            raise UnsupportedMaskError(must("attention mask", KINDS, "one with NaN", where(node)))


def _evaluated(gm: fx.GraphModule, ctx: PassContext, mask: fx.Node, pads: int) -> _Mask:
    fixed = _shape(gm)[1]
    if isinstance(fixed, int):
        return _at(gm, mask, fixed, min(pads, fixed - 1))
    windows = [window for window in ctx.spec.windows if window is not None]
    constant, holder = largest_constant(gm, needed(mask))
    if constant > LARGEST_CONSTANT:
        expected = f"at most {LARGEST_CONSTANT:,} tokens"
        raise UnsupportedMaskError(must("distance in an attention mask", expected, constant, where(holder or mask)))
    length = max(LEAST_LENGTH, constant + MARGIN, *(window + MARGIN for window in windows), MARGIN)
    limit = ctx.spec.max_positions
    try:
        return _at(gm, mask, length + pads, pads)
    except (RuntimeError, IndexError):  # a stored mask or table that ends: nothing beyond its end can matter
        if limit is None or limit >= length + pads:
            raise
        return _at(gm, mask, limit, pads)


def _shape(gm: fx.GraphModule) -> torch.Size:
    """[B, T] of the graph's inputs, symbolic where it serves every size."""
    return value(gm.graph.find_nodes(op="placeholder")[0]).shape


def _at(gm: fx.GraphModule, mask: fx.Node, length: int, pads: int) -> _Mask:
    """The mask of one row with `length` columns, the first `pads` of them padding.

    A graph that insists on its batch gets as many rows like it.
    """
    device = next((tensor.device for tensor in gm.parameters()), torch.device("cpu"))
    batch = _shape(gm)[0]
    attention = torch.ones(batch if isinstance(batch, int) else 1, length, dtype=torch.int64, device=device)
    attention[:, :pads] = 0
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    inputs = {"input_ids": torch.zeros_like(attention), "attention_mask": attention, "position_ids": positions}
    query = _query_rows(length - pads, device)
    rank = value(mask).dim()
    with torch.no_grad():
        rows = Rows(gm, inputs, query + pads).of(mask, rank - 2)
    if rank == 4:
        rows = rows[:1]
    rows = rows.reshape(-1, *rows.shape[-2:]).expand(-1, len(query), length)
    return _Mask(rows[..., pads:], query, mask)


def _query_rows(length: int, device: torch.device) -> Tensor:
    """Positions of the first and last queries, and of some between."""
    spread = torch.linspace(0, length - 1, 16, device=device).long()
    ends = torch.arange(min(8, length), device=device)
    return torch.cat([ends, spread, length - 1 - ends]).unique()


def _kind(mask: _Mask, site: fx.Node) -> MaskKind:
    """The kind that reproduces the mask exactly where it hides keys, and its bias up to a constant per query."""
    window = _window(mask)
    if mask.bias is None or _flat(mask):
        return MaskKind("causal") if window is None else MaskKind("sliding_window", window=window)
    query = value(site.args[0])  # type: ignore[arg-type]
    fitted = fit_alibi(mask.bias, mask.visible, mask.query, int(query.shape[1]), int(query.shape[3]), query.dtype)
    kind = replace(fitted, window=window)
    if not _agrees(mask, kind, site):
        raise UnsupportedMaskError(must("attention mask", KINDS, "a bias that is no ALiBi", where(mask.node)))
    return kind


def _window(mask: _Mask) -> int | None:
    """The window in tokens, None for all; raises if the mask hides by any other rule."""
    length = mask.visible.shape[-1]
    seen = int(mask.visible[0, -1].sum())
    if torch.equal(mask.visible, _seen(mask, None if seen == length else seen).expand_as(mask.visible)):
        return None if seen == length else seen
    row = int((mask.visible != _seen(mask, None)).any(-1).any(0).nonzero()[0])
    got = f"one where query {int(mask.query[row])} sees {int(mask.visible[0, row].sum())} keys"
    raise UnsupportedMaskError(must("attention mask", KINDS, got, where(mask.node)))


def _seen(mask: _Mask, window: int | None) -> Tensor:
    """What a causal mask or window shows: [R, n] bool."""
    distance = mask.query[:, None] - torch.arange(mask.visible.shape[-1], device=mask.query.device)
    return (distance >= 0) & (distance < (mask.visible.shape[-1] if window is None else window))


def _flat(mask: _Mask) -> bool:
    """Whether every query adds the same to all keys it sees."""
    assert mask.bias is not None
    low = mask.bias.masked_fill(~mask.visible, torch.inf).amin(-1)
    high = mask.bias.masked_fill(~mask.visible, -torch.inf).amax(-1)
    return torch.equal(low, high)


def _agrees(mask: _Mask, kind: MaskKind, site: fx.Node) -> bool:
    """Whether the evaluated mask is of that kind."""
    seen = _seen(mask, kind.window)
    if not torch.equal(mask.visible, seen.expand_as(mask.visible)):
        return False
    if mask.bias is None or kind.slopes is None:
        return kind.slopes is None and (mask.bias is None or _flat(mask))
    dtype = value(site.args[0]).dtype  # type: ignore[arg-type]
    worst = float(deviation(kind, mask.bias, mask.visible, mask.query, dtype).max())
    return worst <= TOLERANCE[mask.dtype]


def _cross_check(ctx: PassContext, kind: MaskKind, layer: int, site: fx.Node) -> None:
    claimed, limit = ctx.spec.windows[layer], ctx.spec.max_positions
    if kind.window is None and claimed is not None and limit is not None and claimed >= limit:
        return  # a window no position leaves
    if claimed is not None and claimed != kind.window:
        got = f"{kind.window or 'no window'} in the graph"
        raise UnsupportedMaskError(must(f"window of layer {layer}", f"{claimed} as its config says", got, where(site)))
