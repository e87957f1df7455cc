"""What a legal graph is after each stage; a pass that leaves anything else has a bug, or the model a new spelling."""

from torch import fx

from zsmerge_compile.errors import UnsupportedGraphError, must
from zsmerge_compile.ops.contracts import ATTENTION
from zsmerge_compile.passes.graph import PassContext, aten_name, attention_sites, value, where
from zsmerge_compile.passes.normalize_attention import SDPA, SOFTMAXES
from zsmerge_compile.passes.scores import product_below

INPUTS = ("input_ids", "attention_mask", "position_ids")
STAGES = ("capture", "normalize_attention", "drop_repeat_kv", "lift_rotation", "insert_cache")


def verify(gm: fx.GraphModule, stage: str, ctx: PassContext) -> None:
    """Raise UnsupportedGraphError unless `gm` is legal after `stage` (one of STAGES).

    always               well formed; one output, logits [B, vocab] (ctx.logits_only); no op writes to a tensor, cache
                         ops aside
    before insert_cache  placeholders input_ids, attention_mask, position_ids
    normalize_attention  one canonical attention per layer, layers 0 .. n-1; no other softmax over the tokens
    drop_repeat_kv       its key and value have equally many heads, a divisor of the query's
    lift_rotation        the same
    insert_cache         no canonical attention; one cache op per layer
    """
    if stage not in STAGES:
        raise UnsupportedGraphError(must("stage", f"one of {', '.join(STAGES)}", stage))
    gm.graph.lint()
    reached = STAGES.index(stage)
    if ctx.logits_only:
        _output(gm, ctx)
    if reached < STAGES.index("insert_cache"):
        _inputs(gm)
    if stage in ("normalize_attention", "drop_repeat_kv", "lift_rotation"):
        _one_per_layer(gm, ctx)
        _no_softmax_over_tokens(gm)
    if stage in ("drop_repeat_kv", "lift_rotation"):
        _equal_heads(gm)
    writers = [node for node in gm.graph.nodes if _writes(node)]
    expected = ctx.spec.num_layers if stage == "insert_cache" else 0
    if len(writers) != expected:
        names = ", ".join(map(where, writers)) or "none"
        raise UnsupportedGraphError(must("ops that write to a tensor", f"{expected} cache ops", names))
    if stage == "insert_cache" and (left := attention_sites(gm)):
        raise UnsupportedGraphError(must("attention left without a cache", "none", where(left[0][1])))


def _output(gm: fx.GraphModule, ctx: PassContext) -> None:
    (result,) = gm.graph.output_node().args
    if not isinstance(result, fx.Node) or value(result).dim() != 2 or value(result).shape[1] != ctx.spec.vocab_size:
        got = tuple(value(result).shape) if isinstance(result, fx.Node) else result
        raise UnsupportedGraphError(must("output of the graph", f"logits [B, {ctx.spec.vocab_size}]", got))


def _inputs(gm: fx.GraphModule) -> None:
    names = tuple(str(node.target) for node in gm.graph.find_nodes(op="placeholder"))
    if names != INPUTS:
        raise UnsupportedGraphError(must("placeholders", INPUTS, names))


def _one_per_layer(gm: fx.GraphModule, ctx: PassContext) -> None:
    layers = sorted(layer for layer, _ in attention_sites(gm))
    if layers != list(range(ctx.spec.num_layers)):
        left = ", ".join(where(node) for node in gm.graph.nodes if _is_softmax(node)) or "none"
        got = f"{len(layers)} rewritten, softmax left: {left}"
        raise UnsupportedGraphError(must("attentions found", f"{ctx.spec.num_layers} (one per layer)", got))


def _no_softmax_over_tokens(gm: fx.GraphModule) -> None:
    """A softmax over the tokens that is no canonical attention would see one token in the decode graph."""
    for node in gm.graph.nodes:
        if _is_softmax(node) and (_grows_along(node) or (value(node).dim() == 4 and product_below(node) is not None)):
            raise UnsupportedGraphError(must("every softmax over tokens", "part of a known attention", where(node)))


def _is_softmax(node: fx.Node) -> bool:
    return node.target is SDPA or aten_name(node) in SOFTMAXES


def _grows_along(node: fx.Node) -> bool:
    """Whether the dimension that a softmax sums over depends on the length (never so in a decode graph)."""
    return node.target is SDPA or not isinstance(value(node).shape[node.args[1]], int)  # type: ignore[index]


def _equal_heads(gm: fx.GraphModule) -> None:
    for _, node in attention_sites(gm):
        query, key, values = (int(value(used).shape[1]) for used in node.args[:3])  # type: ignore[arg-type]
        if key != values or query % key:
            got = f"{key} and {values} for {query} query heads"
            raise UnsupportedGraphError(must("key and value heads", "equal divisors of the query's", got, where(node)))


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.target is not ATTENTION and schema is not None and schema.is_mutable
