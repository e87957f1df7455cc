"""The suites: what each measures on a CPU and on a GPU, the most important first. k means 1,024 tokens or slots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from zsmerge_compile.bench import shapes
from zsmerge_compile.bench.policy_steps import FRESH
from zsmerge_compile.bench.rows import Group, Row
from zsmerge_compile.bench.shapes import Shape
from zsmerge_compile.bench.table1 import PAPER, Workload
from zsmerge_compile.bench.timing import Plan
from zsmerge_compile.cli.policy import every_policy

K = 1024
SHARES = (0.05, 0.10, 0.20, 1.0)
FIGURE3 = (54 * K, 20 * K, 37 * K)  # tokens, of the paper's 20k to 54k
FIGURE3_BUDGET = 18 * K
QUICK = 2  # layers of a quick run
PARTIAL = 8  # layers where a whole model's caches would not fit, or would take too long to compile


@dataclass(frozen=True)
class Choice:
    """What the caller asked for; None: the suite's own."""

    gpu: bool
    quick: bool = False
    model: str | None = None
    layers: int | None = None
    dtype: torch.dtype | None = None
    batches: tuple[int, ...] | None = None
    contexts: tuple[int, ...] | None = None
    budgets: tuple[int, ...] | None = None
    rounds: int | None = None
    policies: tuple[str, ...] | None = None

    def shape(self, cpu: str, gpu: str, layers: int | None = None) -> Shape:
        """`layers` of a default shape; all, or --layers, of one that was asked for."""
        name = self.model or (gpu if self.gpu else cpu)
        return shapes.named(name, self.layers or (layers if self.model is None else None))

    def type(self) -> torch.dtype:
        return self.dtype or (torch.bfloat16 if self.gpu else torch.float32)

    def plan(self, rounds: int = 15) -> Plan:
        """Of decode steps: blocks of several on a GPU, whose clock ticks are shorter than a launch."""
        count = self.rounds or (6 if self.quick else rounds)
        return Plan(rounds=count, warmup=3, block=8 if self.gpu else 1)

    def slow_plan(self, long: bool = False) -> Plan:
        """Of prompts and generate calls."""
        return Plan(rounds=self.rounds or (2 if self.quick or long else 3), warmup=0)  # building ran it once


def op(choice: Choice) -> list[Group]:
    """The attention op alone against plain attention."""
    budgets = choice.budgets or ((4095,) if choice.quick else (16_383, 4095, 1023))
    groups = []
    for model in _models(choice):
        for batch in choice.batches or ((16, 1) if choice.gpu else (1,)):
            for budget in budgets:
                rows = tuple(Row(method, batch, 4 * (budget + 1), budget) for method in ("op", "op-plain"))
                groups.append(Group("slots", shapes.named(model, 1), choice.type(), rows, choice.plan(30)))
    return groups


def slots(choice: Choice) -> list[Group]:
    """A step against the same model with plain attention over as many slots; with `op`, one table."""
    budgets = choice.budgets or ((4095,) if choice.quick else (16_383, 4095, 1023))
    depth = choice.layers or (PARTIAL if choice.gpu else QUICK if choice.quick else None)
    groups = []
    for model in _models(choice):
        for batch in choice.batches or ((16, 1) if choice.gpu else (1,)):
            for budget in budgets:
                pair = tuple(Row(method, batch, 4 * (budget + 1), budget) for method in ("zsmerge", "plain"))
                groups.append(Group("slots", shapes.named(model, depth), choice.type(), pair, choice.plan()))
    return groups


def _models(choice: Choice) -> tuple[str, ...]:
    if choice.model:
        return (choice.model,)
    return ("llama-2-7b", "llama-3-8b") if choice.gpu else ("llama-125m",)


def decode(choice: Choice) -> list[Group]:
    """transformers' caches and ours at full budget and at 20, 10 and 5%; a CPU has 4k and two budgets for more rows."""
    shape = choice.shape("llama-125m", "llama-3-8b", QUICK if choice.quick and not choice.gpu else None)
    contexts = choice.contexts or (4 * K, 16 * K, 54 * K, *((128 * K,) if choice.gpu else ()))
    if choice.quick and not choice.contexts:
        contexts = (4 * K,)
    groups = []
    for batch in choice.batches or ((1,) if choice.quick and not choice.gpu else (1, 8, 16)):
        for context in contexts if choice.gpu or batch == 1 or choice.batches else contexts[:1]:
            shares = (0.05, 0.20) if choice.quick or (batch > 1 and not choice.gpu) else SHARES
            ours = [Row("zsmerge", batch, context, _budget(context, share), share) for share in shares]
            theirs = [Row(method, batch, context) for method in ("dynamic", "static")]
            groups.append(Group("decode", shape, choice.type(), (*theirs, *ours), choice.plan()))
    return groups


def flat(choice: Choice) -> list[Group]:
    """A step at one budget, more and more tokens seen."""
    shape = choice.shape("llama-125m", "llama-3-8b", PARTIAL if choice.gpu else QUICK if choice.quick else None)
    contexts = choice.contexts or ((4 * K, 64 * K) if choice.quick else (4 * K, 16 * K, 32 * K, 64 * K))
    budgets = choice.budgets or (1023,)
    rows = [Row("zsmerge", 1, context, budget) for budget in budgets for context in contexts]
    return [Group("flat", shape, choice.type(), tuple(rows), choice.plan(30))]


def figure3(choice: Choice) -> list[Group]:
    """The paper's Figure 3: 20k to 54k tokens, budget 18k, batch 1."""
    shape = choice.shape("llama-2-7b", "llama-2-7b")
    lengths = choice.contexts or FIGURE3
    budget = (choice.budgets or (FIGURE3_BUDGET,))[0]
    ours = [Row("zsmerge", 1, length, budget) for length in lengths]
    dynamic = [Row("dynamic", 1, length) for length in lengths]
    rows = (*ours, *dynamic, Row("static", 1, lengths[0]))
    return [Group("figure3", shape, choice.type(), rows, choice.plan(9))]


def table(choice: Choice) -> list[Group]:
    """Every row of the paper's Table 1; ours at 5% of the prompt's tokens."""
    groups = []
    for work in _workloads(choice):
        shape, budget = shapes.named(work.model, choice.layers), _budget(work.prompt, 0.05)
        lengths = work.lengths()
        steps = [Row("zsmerge", work.batch, length, budget, 0.05) for length in lengths]
        steps += [Row("dynamic", work.batch, length) for length in lengths]
        prompts = (Row("prompt-full", work.batch, work.prompt, budget, 0.05), Row("prompt", work.batch, work.prompt))
        once = Plan(rounds=1, warmup=0)
        groups.append(Group("table1", shape, choice.type(), tuple(steps), choice.plan(4), work.name))
        groups.append(Group("table1", shape, choice.type(), prompts, once, work.name))
    return groups


def _workloads(choice: Choice) -> list[Workload]:
    """Rows of Table 1, of the model and the batches asked for."""
    batches = choice.batches or {work.batch for work in PAPER}
    return [work for work in PAPER if choice.model in (None, work.model) and work.batch in batches]


def static_table(choice: Choice) -> list[Group]:
    """Table 1 with a compiled StaticCache as long as the whole text, which attends to all of it at every step."""
    groups = []
    for work in _workloads(choice):
        rows = (Row("static", work.batch, work.prompt + work.new),)
        shape = shapes.named(work.model, choice.layers)
        groups.append(Group("table1", shape, choice.type(), rows, choice.plan(4), work.name))
    return groups


def prefill(choice: Choice) -> list[Group]:
    """Whole prompts by both merge rules against transformers' prefill; chunked at several lengths."""
    budget = (choice.budgets or (1023,))[0]
    whole = choice.contexts or ((2 * K,) if choice.quick else (4 * K, 16 * K))
    groups = []
    for context in whole:
        long = context > 4 * K and not choice.gpu
        shape = choice.shape(
            "llama-125m", "llama-3-8b", PARTIAL if choice.gpu else QUICK if long or choice.quick else 4
        )
        rows = [Row("prompt-full", 1, context, budget, None, merge) for merge in ("segment", "sequential")]
        groups.append(
            Group("prefill", shape, choice.type(), (*rows, Row("prompt", 1, context)), choice.slow_plan(long))
        )
    shape = choice.shape("llama-125m", "llama-3-8b", PARTIAL if choice.gpu else 2)
    chunks = (K, 2 * K) if choice.quick else (4 * K, 8 * K, 16 * K)
    rows = [Row("prompt-chunked", 1, context, budget) for context in choice.contexts or chunks]
    return [*groups, Group("prefill", shape, choice.type(), tuple(rows), choice.slow_plan())]


def generate(choice: Choice) -> list[Group]:
    """generate() against the bare decode loop."""
    shape = choice.shape("llama-125m", "llama-3-8b", PARTIAL if choice.gpu else QUICK if choice.quick else None)
    rows = [Row(method, 1, 0, (choice.budgets or (1023,))[0]) for method in ("loop", "generate")]
    return [Group("generate", shape, choice.type(), tuple(rows), Plan(rounds=choice.rounds or 5, warmup=1))]


def policies(choice: Choice) -> list[Group]:
    """A step of every cache policy beside plain attention over as many slots; a CPU compiles alike layers once."""
    shape = choice.shape("llama-125m", "llama-3-8b", PARTIAL if choice.gpu else QUICK if choice.quick else None)
    once = None if choice.gpu or choice.quick else True
    names = choice.policies or tuple(policy.text for policy in every_policy())
    groups = []
    for batch in choice.batches or ((16, 1) if choice.gpu else (1,)):
        for budget in choice.budgets or ((1023,) if choice.quick else (4095, 1023)):
            seen = budget + 1 + FRESH
            rows = [Row("policy", batch, seen, budget, outline=once, policy=name) for name in names]
            plain = Row("plain", batch, seen, budget, outline=once)
            groups.append(Group("policies", shape, choice.type(), (plain, *rows), choice.plan(30)))
    return groups


def outline(choice: Choice) -> list[Group]:
    """What it costs a step to compile alike layers once and call the result for each: the same model both ways."""
    shape = choice.shape("llama-125m", "llama-3-8b", PARTIAL if choice.gpu else QUICK if choice.quick else None)
    budget = (choice.budgets or (1023,))[0]
    rows = tuple(Row("zsmerge", 1, 4 * (budget + 1), budget, outline=how) for how in (True, False))
    return [Group("outline", shape, choice.type(), rows, choice.plan(30))]


def compiling(choice: Choice) -> list[Group]:
    """Compile time by depth, with alike layers compiled once and without; a model 768 wide, as width costs nothing."""
    shape = choice.shape("llama-125m", "llama-125m")
    depths = (4,) if choice.quick else (4, 16, 32)
    groups = []
    for how, some in ((True, depths), (False, depths[:2])):  # 32 layers in one graph take many minutes
        rows = tuple(Row("compile", 1, depth, 1023, None, outline=how) for depth in some)
        groups.append(Group("compile", shape, choice.type(), rows))
    return groups


def families(choice: Choice) -> list[Group]:
    """Mistral and Falcon shapes at 5%, beside transformers' cache; `PARTIAL` layers."""
    groups = []
    for model in ("mistral-7b", "falcon-7b"):
        if choice.model not in (None, model):
            continue
        shape, context = shapes.named(model, choice.layers or PARTIAL), (choice.contexts or (16 * K,))[0]
        rows = (Row("zsmerge", 1, context, _budget(context, 0.05), 0.05), Row("dynamic", 1, context))
        groups.append(Group("decode", shape, choice.type(), rows, choice.plan()))
    return groups


def _budget(context: int, share: float) -> int:
    return max(3, round(context * share))


SUITES: dict[str, Callable[[Choice], list[Group]]] = {
    "op": op,
    "figure3": figure3,
    "slots": slots,
    "decode": decode,
    "flat": flat,
    "prefill": prefill,
    "generate": generate,
    "policies": policies,
    "table1": table,
    "table1-static": static_table,
    "families": families,
    "outline": outline,
    "compile": compiling,
}
CPU = ("op", "slots", "decode", "flat", "generate", "prefill", "policies", "outline", "compile")
CPU_QUICK = ("op", "slots", "decode", "flat", "generate")
GPU = tuple(SUITES)  # the most important first


def default_suites(choice: Choice) -> Sequence[str]:
    """What runs when no suite is named."""
    return GPU if choice.gpu else CPU_QUICK if choice.quick else CPU


def groups(names: Sequence[str], choice: Choice) -> list[Group]:
    """The groups of the named suites, in that order."""
    return [group for name in names for group in SUITES[name](choice)]
