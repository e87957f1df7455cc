"""Where two sides part: run a failing case again, node by node, and compare the attention outputs of every layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from zsmerge_compile.lower.lowered import Lowered
from zsmerge_compile.passes.graph import layer_index
from zsmerge_compile.runtime.model import CompiledModel
from zsmerge_compile.testing.cases import Call
from zsmerge_compile.testing.compare import Mismatch, allowance
from zsmerge_compile.testing.references import Listed
from zsmerge_compile.testing.subject import Subject
from zsmerge_compile.testing.tolerance import LOGITS_FP32


class Recorder(fx.Interpreter):
    """A graph run node by node; `outputs` are those of its cache ops in the latest run, by layer."""

    def __init__(self, graph: fx.GraphModule, op: Any) -> None:
        super().__init__(graph)
        self.op, self.outputs = op, dict[int, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is self.op:
            self.outputs[layer_index(n)] = result
        return result

    def __call__(self, *inputs: Tensor) -> Tensor:
        result: Any = self.run(*inputs)
        logits: Tensor = result if isinstance(result, Tensor) else result[0]  # a compiler may have made it a tuple
        return logits


def where_parts(subject: Subject, mismatch: Mismatch) -> str:
    """One sentence: the first layer whose attention outputs part, at the first call where any do."""
    case, compiled = mismatch.case, subject.compiled(mismatch.case)
    if why := subject.why_no_oracle(case):
        return f"The layer is not known: {why}."
    program = compiled.program
    recorders = {
        "prefill": Recorder(program.prefill, program.policy.extend_op),
        "decode": Recorder(program.decode, program.policy.decode_op),
    }
    lowered = Lowered(recorders["prefill"], recorders["decode"], {}, {})
    again = CompiledModel(subject.model, program, lowered, compiled.report, case.chunk, False)
    listed = Listed(subject.oracle(case), case.chunk, subject.half)
    for number, call in enumerate(mismatch.calls, 1):
        listed.before(again)
        answer = listed(call)
        try:
            ours = again.prefill(call.ids, call.mask) if call.kind == "prefill" else again.decode(call.ids, call.mask)
        except Exception as error:
            return f"The graph itself fails at call {number} ({call.kind}), with a {type(error).__name__}."
        at = f"at call {number} of {len(mismatch.calls)} ({call.kind})"
        for layer, found in sorted(recorders[call.kind].outputs.items()):
            share = _difference(found, listed.oracle.outputs[layer], answer.rows)
            if not share <= _limit(subject):
                site = program.sites[layer]
                return (
                    f"Attention outputs part first in layer {layer} of {len(program.sites)} ({site.source}), "
                    f"by {share:.1e} of their range, {at}."
                )
        if _logits_differ(subject, call, ours, answer.logits, answer.rows):
            return f"The attention outputs of every layer agree; the graphs part after the last one, {at}."
    if subject.backend != "eager":
        return f"Run node by node, the graphs give the expected logits: what differs is the code of {subject.backend}."
    return "Attention outputs agree in every layer when the case is run again."


def _limit(subject: Subject) -> float:
    return LOGITS_FP32 if not subject.half else 8 * torch.finfo(subject.dtype).eps


def _difference(ours: Tensor, theirs: Tensor, rows: list[bool]) -> float:
    """Of the last column, over the rows that may be compared, as a share of the range."""
    chosen = [row for row, good in enumerate(rows) if good]
    if not chosen:
        return 0.0
    one, other = (t[chosen, :, -1].double() for t in (ours, theirs))
    return float((one - other).abs().max() / (other.max() - other.min()).clamp_min(1e-30))


def _logits_differ(subject: Subject, call: Call, ours: Tensor, theirs: Tensor, rows: list[bool]) -> bool:
    noise = subject.noise(call.ids, torch.ones_like(call.ids)) if subject.half else None
    return any(
        not float((one.double() - other.double()).abs().max()) <= allowance(other, noise)
        for one, other, good in zip(ours, theirs, rows, strict=True)
        if good
    )
