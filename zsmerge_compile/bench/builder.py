"""From rows to steps: what has to be compiled is compiled once per cache, and what runs of ours is checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from zsmerge_compile.bench import our_steps, transformers_steps
from zsmerge_compile.bench.check import Verdict, check_decode, check_extend
from zsmerge_compile.bench.rows import Row
from zsmerge_compile.bench.timing import Step


class Builder:
    """Steps on one model, for rows that are timed side by side.

    verdicts  checks made so far, which later builders need not repeat
    checks    the check that holds for each of our rows
    """

    def __init__(self, model: Any, verdicts: dict[object, Verdict], say: Callable[[str], None]) -> None:
        self.checks: dict[Row, Verdict] = {}
        self._model, self._verdicts, self._say = model, verdicts, say
        self._shared: dict[object, Any] = {}

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
            if row.method == "op":
                self.checks[row] = self._checked(row, program)
            return our_steps.op_step(program, row)
        kind = "prompts" if row.method in ("prompt-full", "loop", "generate") else row.method
        key = (kind, row.batch, row.budget, row.merge)
        full: our_steps.Full = self._once(key, lambda: our_steps.Full(our_steps.compiled_model(self._model, row)))
        if row.method != "plain":
            self.checks[row] = self._checked(row, full.compiled.program)
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

    def _checked(self, row: Row, program: Any) -> Verdict:
        """Each op once per head shape, dtype, batch and size of cache (to a factor of four)."""
        layout = program.layouts[0]
        prompt = row.method.startswith("prompt")
        size = row.merge if prompt else math.ceil(math.log(layout.slots, 4))
        shape = (layout.heads, layout.kv_heads, layout.head_dim, program.dtype, program.batch_size)
        key = (prompt, size, *shape)
        if key not in self._verdicts:
            self._say(f"checking the {'extend' if prompt else 'decode'} op against ops.reference")
            self._verdicts[key] = (check_extend if prompt else check_decode)(program)
        return self._verdicts[key]
