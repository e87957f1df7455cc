"""Ours: decode steps over full caches, the plain model of equal memory, prompts, generate, and the op by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zsmerge_compile.bench.fill import fill
from zsmerge_compile.bench.plain import PLAIN
from zsmerge_compile.bench.rows import CHUNK, Row
from zsmerge_compile.bench.seam import compile_alone, instead, kernel_of, rule_alone
from zsmerge_compile.bench.timing import Step
from zsmerge_compile.ops import contracts
from zsmerge_compile.ops.state import State, allocate
from zsmerge_compile.runtime.graphs import cuda_recorder

NEW_TOKENS = 64  # of each timed generate
PROMPT = 32  # tokens before them
COLD_BYTES = 2**28  # of keys and values between two calls of an op on the same state: more than caches hold
MOST = 64  # states


def compiled_model(model: Any, row: Row) -> Any:
    """The compiled model that a row runs, its cache empty; a plain one runs `plain.PLAIN` in the cache op's place."""
    import zsmerge_compile as zs

    assert row.budget is not None
    chunked = row.method == "prompt-chunked"
    config = zs.ZSMergeConfig(budget=row.budget, merge=row.merge, prefill="chunked" if chunked else "full", chunk=CHUNK)
    options: dict[str, Any] = {} if row.outline is None else {"outline": row.outline}
    if row.method != "plain":
        return zs.compile(model, config, batch_size=row.batch, **options)
    with instead(contracts.DECODE, PLAIN):
        return zs.compile(model, config, batch_size=row.batch, **options)


def program(model: Any, row: Row) -> Any:
    """The program behind an op, traced but not compiled."""
    import zsmerge_compile as zs

    assert row.budget is not None
    return zs.compile(model, zs.ZSMergeConfig(budget=row.budget), batch_size=row.batch, backend="eager").program


@dataclass
class Full:
    """A compiled model whose cache is full; rows at several lengths may share it.

    Steps are counted, so that `seen` moves on through the ring whichever row's turn it is.
    """

    compiled: Any
    steps: int = 0
    filled: bool = False

    @property
    def ring(self) -> int:
        return int(self.compiled.program.layouts[0].proximity) + 1

    def at(self, context: int) -> int:
        """The number of tokens seen, near `context`, that continues the ring where the last step left it."""
        budget = self.compiled.program.layouts[0].budget
        return max(context, budget + 1) // self.ring * self.ring + self.steps + self.ring

    def step(self, row: Row) -> Step:
        """One `CompiledModel.decode`, checks and bookkeeping included, at about `context` tokens seen."""
        compiled, cache = self.compiled, self.compiled.cache
        ids = torch.zeros(row.batch, 1, dtype=torch.int64, device=compiled.device)
        if not self.filled:
            size = len(State._fields)
            for layer, layout in enumerate(compiled.program.layouts):
                state = State(*cache.flat[size * layer : size * (layer + 1)])
                fill(state, layout.proximity, self.at(row.context), seed=layer)
            self.filled = True

        def prepare() -> None:
            cache.seen_tokens.fill_(self.at(row.context))

        def run() -> None:
            compiled.decode(ids)
            self.steps += 1

        return Step(run, prepare, cache_bytes=cache.nbytes, slots=row.slots, facts=facts(compiled))

    def plain_step(self, row: Row) -> Step:
        """The same of plain attention, which reads keys and values only."""
        step, program = self.step(row), self.compiled.program
        layout = program.layouts[0]
        slot = 2 * layout.kv_heads * layout.head_dim * program.dtype.itemsize
        return Step(
            step.run,
            step.prepare,
            cache_bytes=len(program.layouts) * row.batch * layout.slots * slot,
            slots=row.slots,
            facts={**step.facts, "slot_bytes": slot / layout.kv_heads},
        )


def prompt_step(compiled: Any, row: Row) -> Step:
    """`CompiledModel.prefill` of `context` tokens into an empty cache."""
    ids = _ids(compiled, row.batch, row.context)
    return Step(
        lambda: compiled.prefill(ids),
        compiled.reset,
        tokens=row.context,
        cache_bytes=compiled.cache.nbytes,
        slots=row.slots,
        facts=facts(compiled),
    )


def loop_step(compiled: Any, row: Row) -> Step:
    """The barest greedy loop over `CompiledModel.prefill` and `decode`."""
    ids = _ids(compiled, row.batch, PROMPT)

    def run() -> None:
        tokens = [compiled.prefill(ids).argmax(-1, keepdim=True)]
        for _ in range(NEW_TOKENS - 1):
            tokens.append(compiled.decode(tokens[-1]).argmax(-1, keepdim=True))
        torch.cat(tokens, 1).tolist()

    return _loop(compiled, row, run)


def generate_step(compiled: Any, row: Row) -> Step:
    """`CompiledModel.generate`, greedy, of the same prompt length and as many tokens.

    Its end token is none of the vocabulary: nothing ever ends, but `generate` has to look, as it has to for a user.
    """
    ids = _ids(compiled, row.batch, PROMPT)
    never = compiled.program.spec.vocab_size

    def run() -> None:
        compiled.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=never, pad_token_id=0).tolist()

    return _loop(compiled, row, run)


def _loop(compiled: Any, row: Row, run: Callable[[], object]) -> Step:
    return Step(
        run,
        compiled.reset,
        tokens=NEW_TOKENS,
        cache_bytes=compiled.cache.nbytes,
        slots=row.slots,
        facts=facts(compiled),
    )


def op_step(program: Any, row: Row) -> Step:
    """One layer's attention op compiled alone, ours or plain, over full states of its own.

    The states are taken in turn, so that none is left in the processor's cache by its last call: within a model, the
    weights and the other layers come between.
    """
    layout = program.layouts[0]
    kernel = PLAIN if row.method == "op-plain" else kernel_of(program, contracts.DECODE)
    size = 2 * row.batch * layout.kv_heads * layout.slots * layout.head_dim * program.dtype.itemsize
    states = [
        allocate(layout, row.batch, program.dtype, program.device) for _ in range(min(MOST, -(-COLD_BYTES // size)))
    ]
    seen = torch.full((row.batch,), 3 * layout.slots + 1, device=program.device)
    for state in states:
        fill(state, layout.proximity, int(seen[0]))
    active = torch.ones(row.batch, dtype=torch.bool, device=program.device)
    shapes = [(row.batch, heads, 1, layout.head_dim) for heads in (layout.heads, layout.kv_heads, layout.kv_heads)]
    tokens = [torch.randn(shape, dtype=program.dtype, device=program.device) for shape in shapes]
    arguments = contracts.spelled(rule_alone(program, layout))
    call = compile_alone(kernel, (*tokens, *states[0], seen, active), arguments)

    def run() -> Any:
        for state in states:
            call(*tokens, *state, seen, active)
        return seen.add_(1)

    if program.device.type == "cuda":  # as within a model's step: launches would be most of a small op's time
        run = cuda_recorder(program.device)(run).replay
    return Step(
        run,
        tokens=len(states),
        cache_bytes=size if kernel is PLAIN else sum(tensor.nbytes for tensor in states[0]),
        slots=row.slots,
        facts={"kernel": kernel.name},
    )


def facts(compiled: Any) -> dict[str, Any]:
    """What a record says of the compiled model."""
    report = compiled.report
    kernels = "; ".join(f"{op}: {name}" for op, name in report.kernels.items())
    parts = ", ".join(f"{graph} {count}" for graph, count in report.parts.items())  # whether layers were outlined
    return {"kernel": f"{kernels}; graphs compiled: {parts}", "compile_seconds": report.compile_seconds}


def _ids(compiled: Any, batch: int, tokens: int) -> Tensor:
    return torch.randint(0, compiled.program.spec.vocab_size, (batch, tokens), device=compiled.device)
