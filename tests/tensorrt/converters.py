"""In a process of its own: what torch-tensorrt itself makes of our steps, up to the network it would hand to TensorRT.

    python -m tests.tensorrt.converters PARTS CASE...      # llama-gqa:bfloat16, llama-gqa/cam:float32, control:plain

One line of JSON per case. Real: torch-tensorrt 2.13 with its lowering, partitioner, registry and converters, and the
bindings' enums. Not real: the libraries (`without_libraries.py`) and the network (`network.py`).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.tensorrt import network, without_libraries

BATCH, STEPS = 2, 24


def compiled(program: torch.export.ExportedProgram, inputs: Sequence[Tensor], given: dict[str, Any]) -> Any:
    """torch-tensorrt's own compile up to the engines."""
    import torch_tensorrt

    return torch_tensorrt.dynamo.compile(program, arg_inputs=list(inputs), dryrun=True, **given)


def covered(gm: Any) -> tuple[int, int]:
    """Operators of the compiled graph, and those that the registry has a converter for."""
    from torch_tensorrt.dynamo.conversion import DYNAMO_CONVERTERS

    parts = [gm, *(module for _, module in gm.named_children() if hasattr(module, "graph"))]
    nodes = [node for part in parts for node in part.graph.nodes if node.op == "call_function"]
    nodes = [node for node in nodes if node.target.__name__ != "getitem"]
    return len(nodes), sum(node in DYNAMO_CONVERTERS for node in nodes)


class Segment:
    """The one engine of a compiled graph, as `tensorrt_build.wiring` looks at it."""

    def __init__(self, gm: Any, name: str, given: dict[str, Any]) -> None:
        from torch_tensorrt.dynamo import partitioning
        from torch_tensorrt.dynamo._settings import CompilationSettings
        from torch_tensorrt.dynamo.conversion import _TRTInterpreter
        from torch_tensorrt.dynamo.conversion._conversion import infer_module_output_dtypes

        module = gm.get_submodule(name)
        specs = partitioning.construct_submodule_inputs(module)
        examples = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
        zeros = [torch.zeros(value.shape, dtype=value.dtype) for value in examples]
        self.network = network.Network(zeros)
        builder = type("Builder", (), {"__init__": lambda *_: None, "create_network": lambda *_: self.network})
        _TRTInterpreter.trt.Builder = builder
        made = _TRTInterpreter.TRTInterpreter(
            module,
            specs,
            output_dtypes=infer_module_output_dtypes(module, truncate_double=False),
            compilation_settings=CompilationSettings(**given),
        )
        made._construct_trt_network_def()
        self.input_binding_names, self.output_binding_names = made._input_names, made._output_names


@contextmanager
def passes_left_out(name: str) -> Iterator[None]:
    """Steps are built without one of our passes inside; "": with all."""
    from zsmerge_compile.lower import tensorrt_build

    kept = {name: getattr(tensorrt_build, name) for name in ("slot_access", "tensorrt_spelling", "several_indices")}
    if name:
        setattr(tensorrt_build, name, lambda _: 0)
        tensorrt_build.several_indices = lambda _: []
    try:
        yield
    finally:
        vars(tensorrt_build).update(kept)


def step(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """One model's step, with the cache of a policy where the name has one ("llama-gqa/cam")."""
    import zsmerge_compile as zs
    from tests.models_zoo import prompt, tiny
    from tests.policies.test_models import policy_for
    from zsmerge_compile.lower import tensorrt_build
    from zsmerge_compile.lower.standard import graphs

    model, _, policy = name.partition("/")
    config = policy_for(policy, model) if policy else zs.ZSMergeConfig(12, residual=2)
    base = zs.compile(tiny(model, dtype), config, BATCH, "eager")
    given = {key: value for key, value in tensorrt_build.settings(base.program).items() if key != "device"}
    graph, weights = tensorrt_build.step_graph(base.program)
    gm = compiled(tensorrt_build.step_program(graph, weights), graph.example, given)
    engines, others, rest = tensorrt_build.segments(gm)
    operators, known = covered(gm)
    told = {"engines": len(engines), "others": others, "rest": sorted(rest), "operators": operators, "known": known}
    if len(engines) != 1 or others:
        return told
    segment = Segment(gm, engines[0], given)
    binding = tensorrt_build.wiring(gm, segment)

    made = graphs(base.program)
    constants = [made.weights[name] for name in made.decode.weights]
    given_prompt = prompt(BATCH, 30, pads=(0, 27))  # past the budget, and into slots that are mostly empty
    base.prefill(given_prompt["input_ids"], given_prompt["attention_mask"])
    held = [number for number, tensor in enumerate(base.cache.flat) if tensor.numel()]  # what an engine has inputs for
    errors: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    for number in range(STEPS):
        ids = torch.randint(128, (BATCH, 1), generator=generator)
        active = torch.tensor([True, number % 5 != 3])
        state, before = base.cache.flat, [base.cache.flat[number].clone() for number in held]
        inputs = dict(zip(binding.inputs, (ids, base.cache.seen_tokens, active, *before), strict=True))
        results = dict(
            zip(segment.output_binding_names, segment.network.run(*(inputs[n] for n in segment.input_binding_names)),
                strict=True)
        )  # fmt: skip
        with torch.no_grad():
            logits = made.decode.module(ids, base.cache.seen_tokens, active, *state, *constants)
        base.cache.seen_tokens.add_(active)
        found = [results[name] for name in binding.outputs]
        after = list(state)
        for number, one in zip(held, found[1:], strict=True):
            assert one.dtype == state[number].dtype and one.shape == state[number].shape, (number, one.dtype)
            after[number] = one
        pairs = [("logits", found[0][active], logits[active])]
        count = len(base.program.policy.state_fields)
        for first in range(0, len(state), count):
            mine, its = (slots(base, tensors[first : first + count]) for tensors in (after, state))
            pairs += [(field, mine[field], its[field]) for field in its]
        for field, one, other in pairs:
            if other.numel():
                spread = float(other.float().max() - other.float().min()) or 1.0
                error = float((one.float() - other.float()).abs().max()) / spread
                errors[field] = max(errors.get(field, 0.0), error)
    return told | {"layers": sum(segment.network.layers.values()), "errors": errors}


def slots(base: Any, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """One layer's state with its live slots in an order of their own, as TensorRT may take another of empty ones."""
    from zsmerge_compile.bench.differences import ordered
    from zsmerge_compile.ops.state import State

    size = len(State._fields)
    more = zip(base.program.policy.state_fields[size:], tensors[size:], strict=True)
    return ordered(State(*tensors[:size])) | dict(more)


class Control(nn.Module):
    """Arithmetic around one operator that TensorRT has no layer for."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        x = (x + 1).relu()
        if self.kind == "linalg_qr":
            x = torch.linalg.qr(x)[0]
        elif self.kind == "searchsorted":
            x = torch.searchsorted(x[0], x).float()
        elif self.kind == "custom":
            x = torch.ops.zsmerge_control.twice(x)
        return (x * 2).sigmoid()


def control(kind: str) -> dict[str, Any]:
    from zsmerge_compile.errors import UnsupportedGraphError
    from zsmerge_compile.lower import tensorrt_build

    library = torch.library.Library("zsmerge_control", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: 2 * x, "CompositeExplicitAutograd")
    x = torch.rand(4, 4)
    gm = compiled(torch.export.export(Control(kind), (x,)), [x], {"min_block_size": 1})
    operators, known = covered(gm)
    engines, others, rest = tensorrt_build.segments(gm)
    refusal = ""
    try:
        tensorrt_build.check_segments(gm, 1)
    except UnsupportedGraphError as error:
        refusal = str(error)
    return {"operators": operators, "known": known, "engines": len(engines), "others": others, "refusal": refusal}


def names(kind: str) -> dict[str, Any]:
    """Which of the names that our driver uses TensorRT's bindings lack."""
    import tensorrt as trt

    from zsmerge_compile.lower import plan

    used = {
        trt: ("Logger", "Runtime"),
        trt.Runtime: ("deserialize_cuda_engine",),
        trt.ICudaEngine: (
            *("num_io_tensors", "get_tensor_name", "get_tensor_dtype", "get_tensor_shape", "get_aliased_input_tensor"),
            *("is_shape_inference_io", "create_execution_context", "serialize"),
        ),
        trt.IExecutionContext: ("set_tensor_address", "execute_async_v3"),
        trt.DataType: tuple(plan.DTYPES),
    }
    return {"missing": [name for owner, listed in used.items() for name in listed if not hasattr(owner, name)]}


def layout(kind: str) -> dict[str, Any]:
    """What one layer's step takes in each of the two layouts."""
    from tests.tensorrt import regions
    from zsmerge_compile.lower import tensorrt_build

    module = {"scatter": regions.Scatter, "regions": regions.Regions}[kind]()
    inputs = (*regions.examples(), *module.state())
    with torch.no_grad():
        program = tensorrt_build.respelled(torch.export.export(module, inputs, strict=False))
    given: dict[str, Any] = {"min_block_size": 1}
    gm = compiled(program, inputs, given)
    (engine,), others, _ = tensorrt_build.segments(gm)
    segment = Segment(gm, engine, given)
    return {"operators": covered(gm)[0], "others": others, "layers": dict(segment.network.layers)}


def main(parts: Path, cases: Sequence[str]) -> None:
    without_libraries.load(parts, network.install)
    logging.disable(logging.ERROR)
    for case in cases:
        name, kind, without = (*case.split(":"), "", "")[:3]
        try:
            if name in ("control", "layout", "names"):
                told = {"control": control, "layout": layout, "names": names}[name](kind)
            else:
                with passes_left_out(without):
                    told = step(name, getattr(torch, kind))
        except Exception as error:  # of a case without one of our passes: how it fails is what is asked
            told = {"failed": f"{type(error).__name__}: {error}"[:400]}
        print(json.dumps({"case": case, **told}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
