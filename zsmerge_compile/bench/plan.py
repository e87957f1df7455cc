"""From the command line to groups of rows, and which of them a file of results already has."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch

from zsmerge_compile.bench import presets
from zsmerge_compile.bench.presets import Choice
from zsmerge_compile.bench.records import FAILED, MEASURED, SKIPPED, Record, Results
from zsmerge_compile.bench.rows import Group, Row, fits
from zsmerge_compile.bench.runs import machines
from zsmerge_compile.bench.session import CANNOT
from zsmerge_compile.cli.policy import ROOMY
from zsmerge_compile.errors import InputError, must


def planned(options: argparse.Namespace, device: torch.device) -> list[Group]:
    """What the options of `zsmerge-compile bench` ask for on a device.

    Raises InputError where a suite has no rows, ConfigError where a policy cannot be made.
    """
    if options.policies and options.suite and "policies" not in options.suite:
        raise InputError(must("--policies", "given with --suite policies", f"--suite {' '.join(options.suite)}"))
    for policy in options.policies or ():
        policy.with_weights({}).make(ROOMY)  # its mistakes are told before anything is measured
    choice = _choice(options, device)
    if options.suite is None:
        return presets.groups(presets.default_suites(choice), choice)
    for name in options.suite:
        if not presets.groups([name], choice):
            asked = {"--model": options.model, "--batches": options.batches}
            told = ", ".join(f"{option} {value}" for option, value in asked.items() if value)
            raise InputError(must("what is measured", f"rows of --suite {name}", f"none with {told}"))
    return presets.groups(options.suite, choice)


def missing(
    groups: list[Group], results: Results, machine: tuple[object, ...], device: torch.device, memory: int
) -> list[Group]:
    """Groups that are not wholly settled: measured on this machine, out of its memory, or larger than it.

    A group is measured whole or not at all, so that its ratios are between times of one run.
    """
    known = machines(results.runs)
    settled = {r.key for r in results.records if known.get(r.run or 0) == machine and _settled(r)}

    def is_open(group: Group, row: Row) -> bool:
        key = Record(**group.facts(row, device), status=SKIPPED).key
        return key not in settled and fits(group, row, memory) is None

    return [group for group in groups if any(is_open(group, row) for row in group.rows)]


def listing(groups: list[Group], device: torch.device, memory: int) -> Iterator[str]:
    """A line per group, one per row, and the time in all."""
    for group in groups:
        model = f"{group.shape.name}, {group.shape.depth} layers, {str(group.dtype).removeprefix('torch.')}"
        yield f"{group.suite}: {model}, about {group.seconds(device):.0f} s"
        for row in group.rows:
            need = fits(group, row, memory) or f"{group.need(row) / 2**30:.1f} GiB"
            yield f"    batch {row.batch}, {row.context:,} tokens, {row.label()}: {need}"
    yield f"in all about {sum(group.seconds(device) for group in groups) / 60:.0f} minutes"


def unmeasured(groups: list[Group], device: torch.device) -> list[Record]:
    """A record for each row, still to be measured."""
    rows = [(group, row) for group in groups for row in group.rows]
    made = [Record(**group.facts(row, device), status=SKIPPED, reason="not measured") for group, row in rows]
    return list({record.key: record for record in made}.values())  # suites overlap


def _settled(record: Record) -> bool:
    """Another run on the same machine would tell nothing new."""
    tried = record.status == FAILED and (record.reason or "").startswith("out of memory")
    return record.status == MEASURED or tried or (record.reason or "").startswith(CANNOT)


def _choice(options: argparse.Namespace, device: torch.device) -> Choice:
    def several(values: list[int] | None) -> tuple[int, ...] | None:
        return tuple(values) if values else None

    return Choice(
        gpu=device.type == "cuda",
        quick=options.quick,
        model=options.model,
        layers=options.layers,
        dtype=getattr(torch, options.dtype) if options.dtype else None,
        batches=several(options.batches),
        contexts=several(options.contexts),
        budgets=several(options.budgets),
        rounds=options.rounds,
        policies=tuple(dict.fromkeys(policy.text for policy in options.policies or ())) or None,
    )
