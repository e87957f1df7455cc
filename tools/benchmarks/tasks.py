"""The steps of `tools/gpu_check`, the most valuable first. Imports neither torch nor this package."""

from __future__ import annotations

from dataclasses import dataclass

K = 1024
MINUTES = 9.0  # for everything; with more, every step may take more
SLACK = 1.5  # a step may take this many times its estimate


@dataclass(frozen=True)
class Task:
    """One step: `arguments` of `zsmerge-compile bench`, or none for the tests."""

    name: str
    arguments: tuple[str, ...] = ()


def _bench(name: str, text: str) -> Task:
    return Task(name, tuple(text.split()))


def _decode(context: int, batch: int) -> Task:
    return _bench(f"decode-{context}k-{batch}", f"--suite decode --contexts {context * K} --batches {batch}")


TASKS = (
    Task("tests"),
    _bench("op-16k", "--suite op --budgets 16383"),
    _bench("figure3", "--suite figure3"),
    _bench("slots-16k-1", "--suite slots --budgets 16383 --batches 1"),
    _bench("generate", "--suite generate"),
    _bench("slots-16k-16", "--suite slots --budgets 16383 --batches 16"),
    _bench("flat", "--suite flat"),
    _decode(16, 1),
    _decode(54, 1),
    _bench("prefill", "--suite prefill"),
    _bench("table1-8", "--suite table1 --batches 8"),
    _bench("table1-4", "--suite table1 --batches 4"),
    _bench("table1-16", "--suite table1 --batches 16 --model llama-2-7b"),
    *(_decode(4, 1), _decode(16, 16), _decode(4, 16)),
    _bench("table1-13b", "--suite table1 --model llama-2-13b"),
    *(_decode(16, 8), _decode(4, 8)),
    _bench("slots-4k-1", "--suite slots --budgets 4095 --batches 1"),
    _bench("slots-4k-16", "--suite slots --budgets 4095 --batches 16"),
    _bench("op-4k", "--suite op --budgets 4095"),
    _bench("outline", "--suite outline"),
    _bench("policies-4k-16", "--suite policies --budgets 4095 --batches 16"),
    _bench("policies-4k-1", "--suite policies --budgets 4095 --batches 1"),
    _bench("compile", "--suite compile"),
    _bench("families", "--suite families"),
    *(_decode(54, 8), _decode(54, 16)),
    _bench("table1-static", "--suite table1-static"),
    _bench("slots-1k-1", "--suite slots --budgets 1023 --batches 1"),
    _bench("slots-1k-16", "--suite slots --budgets 1023 --batches 16"),
    _bench("op-1k", "--suite op --budgets 1023"),
    _bench("policies-1k-16", "--suite policies --budgets 1023 --batches 16"),
    _bench("policies-1k-1", "--suite policies --budgets 1023 --batches 1"),
    *(_decode(128, 1), _decode(128, 8), _decode(128, 16)),
)
SUITES = tuple(dict.fromkeys(task.arguments[1] for task in TASKS if task.arguments))


def limit(expected: float, minutes: float) -> float:
    """The seconds after which a step is stopped, of `minutes` for all."""
    return expected * SLACK * max(1.0, minutes / MINUTES)
