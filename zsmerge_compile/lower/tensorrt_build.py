"""A decode step's functional graph, through torch-tensorrt to an engine.

State is an explicit input and output: torch-tensorrt up to 2.13 drops writes into buffers and inputs without a word.
"""

from __future__ import annotations

import inspect
import operator
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import fx

from zsmerge_compile.errors import UnsupportedGraphError, must
from zsmerge_compile.lower.functional import Holding, functional, without_empty
from zsmerge_compile.lower.plan import Binding
from zsmerge_compile.lower.slot_access import several_indices, slot_access
from zsmerge_compile.lower.standard import Graph, exported, graphs
from zsmerge_compile.lower.tensorrt_needs import library, on
from zsmerge_compile.lower.tensorrt_spelling import tensorrt_spelling
from zsmerge_compile.program import Program


class Built(NamedTuple):
    """One engine: its plan, and its names in the step's order."""

    content: bytes
    binding: Binding


def settings(program: Program) -> dict[str, Any]:
    """How torch-tensorrt compiles a step.

    attn_bias_is_causal=False    its default replaces an attention bias by a causal mask
    disable_tf32, use_fp32_acc   fp32 stays fp32; products of fp16 are summed in fp32 (those of bf16 always are)
    enable_autocast=False        with the strongly typed networks it builds, every tensor keeps the dtype it has in
                                 the graph: scores, weights, softmax and residual means stay fp32 in a 16-bit engine
    min_block_size=1             nothing is left to PyTorch for being small
    """
    return {
        "attn_bias_is_causal": False,
        "disable_tf32": True,
        "use_fp32_acc": program.dtype == torch.float16,
        "enable_autocast": False,
        "truncate_double": False,
        "min_block_size": 1,
        "require_full_compilation": False,  # what it does not take is counted here, and named
        "immutable_weights": True,
        "offload_module_to_cpu": False,
        "device": program.device,
    }


def step_graph(program: Program) -> tuple[Graph, dict[str, Any]]:
    """The step as (inputs, state, weights) -> (logits, new state), without empty tensors; and the weights by name."""
    made = graphs(program)
    return functional(without_empty(made.decode)), made.weights


def step_program(graph: Graph, weights: dict[str, Any]) -> torch.export.ExportedProgram:
    """The step exported, its weights held, in operators that TensorRT has. Raises UnsupportedGraphError."""
    held = Holding(graph.module, {name: weights[name] for name in graph.weights})
    done = respelled(exported(graph, weights, held))
    for node in done.graph.nodes:
        if getattr(node.meta.get("val"), "dtype", None) == torch.float64:
            got = f"float64 in {node.name} (policies that count positions in the cache)"
            raise UnsupportedGraphError(must("arithmetic of a TensorRT engine", "float32 or less", got))
    return done


def respelled(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with gather and scatter for slots (`slot_access.py`). Raises UnsupportedGraphError."""
    done = program.run_decompositions({})
    slot_access(done)
    tensorrt_spelling(done)
    left = several_indices(done)
    if left:
        raise UnsupportedGraphError(must("indexing for TensorRT", "of one axis at a time", f"several in {left[0]}"))
    return done


def compiled_step(program: Program) -> Any:
    """What torch-tensorrt makes of the step: a graph of engines, and of PyTorch where it takes no operator."""
    compile = library("torch_tensorrt").dynamo.compile
    given = settings(program)
    unknown = sorted(set(given) - set(inspect.signature(compile).parameters))
    if unknown:
        raise UnsupportedGraphError(must("torch-tensorrt", "2.13, which takes every setting", f"no {unknown[0]}"))
    graph, weights = step_graph(program)
    with on(program.device):
        return compile(step_program(graph, weights), arg_inputs=list(graph.example), **given)


def whole(compiled: Any) -> Built:
    """The one engine that is all of what torch-tensorrt compiled. Raises UnsupportedGraphError if it is not all."""
    check_segments(compiled, 1)
    (name,) = segments(compiled)[0]
    engine = compiled.get_submodule(name)
    return Built(bytes(engine.serialized_engine), wiring(compiled, engine))


def check_segments(compiled: Any, allowed: int, hint: bool = False) -> tuple[str, int]:
    """What the step consists of, in words, and of how many segments. Raises UnsupportedGraphError if of more than
    `allowed`, or of no engine; hint: the caller has an option to allow more."""
    engines, others, rest = segments(compiled)
    count = len(engines) + others
    left = ", ".join(f"{times} {name}" for name, times in sorted(rest.items()))
    found = "one TensorRT engine" if count == 1 and engines else f"{len(engines)} engines, in PyTorch {left or 'none'}"
    if not engines or count > allowed:
        way_out = f"segments={count} allows them" if engines and hint else ""
        raise UnsupportedGraphError(must("segments of a TensorRT step", allowed, f"{count} ({found})", way_out))
    return found, count


def segments(compiled: Any) -> tuple[list[str], int, Counter[str]]:
    """Names of the engines, the number of other parts, and the operators that run in PyTorch with their number."""
    engines: list[str] = []
    others, rest = 0, Counter[str]()
    for node in compiled.graph.nodes:
        if node.op == "call_module" and "_run_on_acc" in str(node.target):
            engines.append(str(node.target))
        elif node.op == "call_module":
            inner = compiled.get_submodule(str(node.target)).graph.nodes
            rest.update(str(used.target) for used in inner if _computes(used))
            others += 1
    loose = [str(node.target) for node in compiled.graph.nodes if _computes(node)]
    rest.update(loose)
    return engines, others + (1 if loose else 0), rest


def _computes(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is not operator.getitem


def wiring(compiled: Any, engine: Any) -> Binding:
    """Which of the engine's names belongs to which input and output of the graph around it."""
    (call,) = compiled.graph.find_nodes(op="call_module")
    names = dict(zip(call.args, engine.input_binding_names, strict=True))
    inputs = tuple(names.get(node) for node in compiled.graph.find_nodes(op="placeholder"))
    results, outputs = compiled.graph.output_node().args[0], []
    for node in results if isinstance(results, list | tuple) else (results,):
        if node is not call and not (isinstance(node, fx.Node) and node.args and node.args[0] is call):
            raise UnsupportedGraphError(must("outputs of a TensorRT step", "the engine's", str(node)))
        outputs.append(engine.output_binding_names[0 if node is call else node.args[1]])
    return Binding(inputs, tuple(outputs))
