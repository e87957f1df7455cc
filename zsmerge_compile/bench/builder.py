"""From rows to steps: what has to be compiled is compiled once per cache, and what runs of ours is checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from zsmerge_compile.bench import our_steps, transformers_steps
from zsmerge_compile.bench.check import Verdict, check_decode, check_extend
from zsmerge_compile.bench.policy_steps import compiled_policy, policy_step
from zsmerge_compile.bench.rows import OURS, Row
from zsmerge_compile.bench.timing import Step

CHECKS = {"decode": check_decode, "extend": check_extend}
# the cache ops that a row of ours runs; a plain one runs none
OPS = {
    "zsmerge": ("decode",),
    "op": ("decode",),
    "prompt-full": ("extend",),
    "prompt-chunked": ("extend",),
    "loop": ("extend", "decode"),
    "generate": ("extend", "decode"),
    "policy": ("decode",),
}


class Builder:
    """Steps on one model, for rows that are timed side by side.

    verdicts  checks made so far, which later builders need not repeat
    checks    the check that holds for each of our rows
    """

    def __init__(self, model: Any, verdicts: dict[object, Verdict], say: Callable[[str], None]) -> None:
        self.checks: dict[Row, Verdict] = {}
        self._model, self._verdicts, self._say = model, verdicts, say
        self._shared: dict[object, Any] = {}

    @staticmethod
    def cache_of(row: Row) -> object:
        """Rows that are equal in this run on one cache, which the first of them makes."""
        if row.method not in OURS:
            return row
        return "prompts" if row.method in ("prompt-full", "loop", "generate") else row.method, *row.compiled

    def step(self, row: Row) -> Step:
        """The row's step, ready to run; raises what building it raises."""
        theirs = {
            "dynamic": transformers_steps.dynamic_step,
            "static": transformers_steps.static_step,
            "prompt": transformers_steps.prompt_step,
        }
        if row.method in theirs:
            return theirs[row.method](self._model, row)
        if row.method in ("op", "op-plain"):
            program = self._once(("program", row.batch, row.budget), lambda: our_steps.program(self._model, row))
            self._check(row, program)
            return our_steps.op_step(program, row)
        if row.method == "policy":
            compiled = self._once(self.cache_of(row), lambda: compiled_policy(self._model, row))
            self._check(row, compiled.program)
            return policy_step(compiled, row)
        full: our_steps.Full = self._once(
            self.cache_of(row), lambda: our_steps.Full(our_steps.compiled_model(self._model, row))
        )
        self._check(row, full.compiled.program)
        ours: dict[str, Callable[[], Step]] = {
            "zsmerge": lambda: full.step(row),
            "plain": lambda: full.plain_step(row),
            "prompt-full": lambda: our_steps.prompt_step(full.compiled, row),
            "prompt-chunked": lambda: our_steps.prompt_step(full.compiled, row),
            "loop": lambda: our_steps.loop_step(full.compiled, row),
            "generate": lambda: our_steps.generate_step(full.compiled, row),
        }
        return ours[row.method]()

    def _once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._shared:
            self._shared[key] = make()
        return self._shared[key]

    def _check(self, row: Row, program: Any) -> None:
        """All ops that the row runs."""
        found = [self._verdict(op, row, program) for op in OPS.get(row.method, ())]
        if found:
            ok, checked = all(v.ok for v in found), all(v.checked for v in found)
            self.checks[row] = Verdict(ok, "; ".join(v.text for v in found), checked)

    def _verdict(self, op: str, row: Row, program: Any) -> Verdict:
        """Each op once per policy, head shape, dtype, batch and size of cache (to a factor of four) or merge rule."""
        layout = program.layouts[0]
        variant = row.merge if op == "extend" else math.ceil(math.log(layout.slots, 4))
        shape = (layout.heads, layout.kv_heads, layout.head_dim, program.dtype, program.batch_size)
        key = (op, row.policy, variant, *shape)
        if key not in self._verdicts:
            self._say(f"checking the {op} op against ops.reference")
            self._verdicts[key] = CHECKS[op](program)
        return self._verdicts[key]
