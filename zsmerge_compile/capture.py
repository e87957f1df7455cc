"""From a model to its two graphs: prefill over any batch and length, decode for one token per row."""

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from zsmerge_compile.errors import UnsupportedGraphError, must
from zsmerge_compile.models.spec import ModelSpec

SIZES = (1, 2, 3, 5, 16, 63, 1000, 4099)  # batch sizes and lengths at which a trace's conditions are tried
INPUTS = ("input_ids", "attention_mask", "position_ids")

# Checks that export leaves in a graph. They hold for the example's sizes; ours must run for every size.
_CHECKS = re.compile(r"^(_assert_\w+|sym_constrain_range\w*|_functional_\w*assert\w*|_functional_sym_constrain\w*)$")


@dataclass
class Captured:
    """The traced model, before any pass.

    prefill  any B >= 1 and T >= 1
    decode   B = the batch size captured for, T = 1

    Placeholders of both: input_ids, attention_mask, position_ids, each int64 [B, T]; output: logits [B, vocab] of the
    last column. Every parameter and buffer is the model's own tensor.
    """

    prefill: fx.GraphModule
    decode: fx.GraphModule


def capture(model: nn.Module, spec: ModelSpec, batch_size: int) -> Captured:
    """Trace `model` without a cache by torch.export (non-strict, no_grad). The model is not changed.

    Raises UnsupportedGraphError if the forward cannot be traced, or only for some batch sizes or lengths.
    """
    device = next(model.parameters()).device
    # Sizes above 1 that differ from each other: a size of 1 would be traced as broadcasting.
    run, what = _LastLogits(model, spec), f"{type(model).__name__}.forward"
    captured = Captured(
        trace(run, what, example(2, 11, device), ("batch", "length"), spec.max_positions),
        trace(run, what, example(batch_size, 1, device), ()),
    )
    for module in (captured.prefill, captured.decode):
        names = tuple(node.target for node in module.graph.find_nodes(op="placeholder"))
        if names != INPUTS:
            raise UnsupportedGraphError(must("placeholders of the trace", INPUTS, names))
    return captured


class _LastLogits(nn.Module):
    """The model behind the three inputs every graph has, so that the trace names them."""

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.model = model
        self.call = spec.call

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return self.call(self.model, input_ids, attention_mask, position_ids)


def example(batch: int, length: int, device: torch.device) -> tuple[Tensor, ...]:
    """INPUTS of a prompt without padding."""
    ids = torch.zeros(batch, length, dtype=torch.int64, device=device)
    positions = torch.arange(length, device=device).expand(batch, length).contiguous()
    return ids, torch.ones_like(ids), positions


def trace(
    run: nn.Module, what: str, given: tuple[Tensor, ...], dynamic: Sequence[str], max_positions: int | None = None
) -> fx.GraphModule:
    """The graph of a module called with tensors [batch, length], for every size of the `dynamic` dimensions.

    dynamic: names among batch, length. Raises UnsupportedGraphError, where `what` names the module.
    """
    # A stored table (of masks, say) bounds the length: if tracing for any length fails, the model's own limit may do.
    # One less than it, as the whole table is a case of its own to torch.export (the graph serves that too).
    limits = [None, max_positions - 1] if dynamic and max_positions is not None else [None]
    for limit in limits:
        try:
            module = plain(_export(run, given, dynamic, limit))
            break
        except UnsupportedGraphError:
            raise
        except Exception as error:  # torch.export raises a dozen unrelated types
            if limit is limits[-1]:
                expected = "traceable by torch.export for every batch size and length"
                raise UnsupportedGraphError(must(what, expected, f"{type(error).__name__}: {error}")) from error
    return module


def _export(run: nn.Module, given: tuple[Tensor, ...], dynamic: Sequence[str], limit: int | None) -> Any:
    places = {"batch": 0, "length": 1}
    shape = {
        places[name]: torch.export.Dim(name, min=1, max=limit if name == "length" else None) for name in dynamic
    } or None
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its pytree classes
        # torch 2.11 refuses conditions it cannot prove, such as min(n, 4 * n) == n; deferred, they become checks in the
        # graph, and `_check_holds` tries them out.
        program = torch.export.export(
            run,
            given,
            dynamic_shapes=(shape,) * len(given),
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )
        return functional(program)


def functional(program: torch.export.ExportedProgram) -> Any:
    """The unlifted module, with no op in it that writes to a tensor: passes follow values, not memory.

    The usual `x *= c` on a fresh x is renamed; where that does not do, torch functionalises (twice the tracing time).
    """
    unlifted = program.module()
    if all(_renamed(node) for node in unlifted.graph.nodes if _writes(node)):
        return unlifted
    unlifted = program.run_decompositions({}).module()
    for node in unlifted.graph.nodes:
        if _writes(node):  # run_decompositions leaves only those that outlive the call
            raise UnsupportedGraphError(must("forward", "free of writes to the model's buffers", node.format_node()))
    return unlifted


def _renamed(node: fx.Node) -> bool:
    """Turn `mul_(x, ...)` into `mul(x, ...)` if nothing else can see x change."""
    target: Any = node.target
    written = node.args[0]
    functional = getattr(torch.ops.aten, target._opname.removesuffix("_"), None)
    if not isinstance(written, fx.Node) or not _fresh(written) or set(written.users) != {node}:
        return False
    if not target._opname.endswith("_") or target._overloadname not in getattr(functional, "overloads", list)():
        return False
    result, value = node.meta.get("val"), written.meta.get("val")
    node.target = getattr(functional, target._overloadname)
    return result is not None and value is not None and result.dtype == value.dtype


def _fresh(node: fx.Node) -> bool:
    """Whether a node surely returns memory of its own."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if target in (torch.ops.aten.matmul.default, torch.ops.aten.linear.default):
        return True  # composite, as below, but known
    composite = torch._C.DispatchKey.CompositeImplicitAutograd  # reshape, to, dropout ...: maybe an alias
    aliases = any(result.alias_info is not None for result in target._schema.returns)
    return not aliases and not target.has_kernel_for_dispatch_key(composite)


def plain(unlifted: Any) -> fx.GraphModule:
    """The graph of an exported module as an ordinary GraphModule: no guards, no pytrees, a single output bare."""
    graph: fx.Graph = unlifted.graph
    for node in list(graph.nodes):
        if _is_check(node):
            _check_holds(node)
            graph.erase_node(node)
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default  # passes change layouts, and a view insists on one
    output = graph.output_node()
    (results,) = output.args
    output.args = tuple(results) if len(results) == 1 else (tuple(results),)  # type: ignore[arg-type]
    graph.set_codegen(fx.graph.CodeGen())
    _erase_unused(graph)
    return fx.GraphModule(unlifted, graph, class_name="Captured")


def _is_check(node: fx.Node) -> bool:
    if node.op == "call_module":
        return node.target == "_guards_fn"
    name = getattr(node.target, "_opname", "")
    return node.op == "call_function" and not node.users and bool(_CHECKS.match(name))


def _check_holds(node: fx.Node) -> None:
    """Raise UnsupportedGraphError if a condition that the trace rests on fails for some batch sizes or lengths."""
    condition = node.args[0].meta.get("val") if node.args and isinstance(node.args[0], fx.Node) else None
    if not isinstance(condition, torch.SymBool):
        return
    expression = condition.node.expr
    for size in SIZES:  # different sizes for different symbols, in both orders
        for step in (1, -1):
            symbols = sorted(expression.free_symbols, key=str)[::step]
            if not bool(expression.subs({symbol: size + i for i, symbol in enumerate(symbols)})):
                raise UnsupportedGraphError(
                    must("the trace", "good for every batch size and length", f"only {expression}")
                )


def _erase_unused(graph: fx.Graph) -> None:
    """Drop what only the checks used, and parameters nothing reads; ops that write somewhere stay."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output") or _writes(node))


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable
