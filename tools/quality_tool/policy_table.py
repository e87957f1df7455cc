"""One table of all policies, as Markdown: what each keeps, its bytes, its time per step, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from quality_tool.methods import FULL_CACHE, KNOWN_AS, is_policy
from quality_tool.records import Records
from zsmerge_compile.bench.ratios import RED, beside_plain
from zsmerge_compile.bench.records import Record, Results, load
from zsmerge_compile.cli.policy import every_policy, keeps, policy

SHARES = (0.2, 0.1, 0.05)
FIRST = ("full", "zsmerge")  # what the others are held against
NONE = "–"


class Place(NamedTuple):
    """What step times must share to stand in one column."""

    device: str
    model: str
    layers: int
    dtype: str
    batch: int

    @classmethod
    def of(cls, record: Record) -> Place:
        return cls(record.device, record.model, record.layers, record.dtype, record.batch)

    def __str__(self) -> str:
        return f"{self.device}, {self.model}, {self.layers} layers, {self.dtype}, batch {self.batch}"


Pairs = dict[Place, dict[tuple[str, int], tuple[Record, Record]]]  # by policy and slots: its record and plain's


def markdown(records: Records, benches: Sequence[Path]) -> str:
    """The table and what its figures hold for; raises InputError where results of bench cannot be read."""
    results = [load(path) for path in benches]
    pairs = _pairs(chain.from_iterable(result.records for result in results))
    texts = _texts(records, pairs)
    head = ["policy", "keeps"]
    columns = [texts, [keeps(policy(text)) for text in texts]]
    for place, found in pairs.items():
        slots = sorted({count for _, count in found})
        counts = " / ".join(f"{count:,}" for count in slots)
        head += [f"bytes per slot, {place.device}", f"step to plain attention's, {place.device}, {counts} slots"]
        columns.append([_bytes(found, text) for text in texts])
        columns.append([" / ".join(_step(found.get((text, count))) for count in slots) for text in texts])
    shares = " / ".join(f"{share:.0%}" for share in SHARES)
    head += [f"loss added, {shares}", f"recall, {shares}"]
    columns += [[_quality(records, text, measure) for text in texts] for measure in ("loss_added", "recall")]
    lines = [head, ["---"] * len(head), *map(list, zip(*columns, strict=True))]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return "\n\n".join([table, *_remarks(records, results, pairs), *_absent(records, texts)])


def _pairs(records: Iterator[Record]) -> Pairs:
    pairs: Pairs = {}
    for ours, plain in beside_plain([record for record in records if record.suite == "policies"]):
        pairs.setdefault(Place.of(ours), {})[ours.policy or "zsmerge", ours.slots] = ours, plain
    return pairs


def _texts(records: Records, pairs: Pairs) -> list[str]:
    """Every policy there is, and those with parameters that were measured."""
    measured = [text for found in pairs.values() for text, _ in found]
    measured += [method for method in records.methods() if is_policy(method)]
    others = [choice.text for choice in every_policy()] + measured
    return list(dict.fromkeys([*FIRST, *sorted(set(others))]))


def _bytes(found: dict[tuple[str, int], tuple[Record, Record]], text: str) -> str:
    """At each number of slots, once where they are the same."""
    told = [f"{pair[0].slot_bytes:,.0f}" for (name, _), pair in sorted(found.items()) if name == text]
    return " / ".join(dict.fromkeys(told)) or NONE


def _step(pair: tuple[Record, Record] | None) -> str:
    if pair is None:
        return NONE
    ours, plain = pair
    if ours.check == "red":
        return RED
    return f"{(ours.ms or 0) / (plain.ms or 1):.2f}" + ("\\*" if ours.check == "not checked" else "")


def _quality(records: Records, text: str, measure: str) -> str:
    """Means over the models; where only some could be measured, they are named. A full cache: its loss itself."""
    method, models = KNOWN_AS.get(text, text), records.models()
    if method == FULL_CACHE:
        cells = _cells(records, models, method, None)
        told = [cell["loss" if measure == "loss_added" else measure]["mean"] for cell in cells.values()]
        return (f"(loss {mean(told):.2f})" if measure == "loss_added" else f"{mean(told):.0%}") if told else NONE
    parts, served = [], set[tuple[str, ...]]()
    for share in SHARES:
        cells = _cells(records, models, method, share)
        figure = mean(cell[measure]["mean"] for cell in cells.values()) if cells else None
        parts.append(NONE if figure is None else f"{figure:+.2f}" if measure == "loss_added" else f"{figure:.0%}")
        served.add(tuple(cells))
    some = "; ".join(", ".join(one) for one in sorted(served) if one and list(one) != models)
    return " / ".join(parts) + (f" ({some})" if some else "")


def _cells(records: Records, models: list[str], method: str, share: float | None) -> dict[str, dict[str, Any]]:
    """Of the models in which it was measured."""
    found = {model: records.find(model, method, share) for model in models}
    return {model: cell for model, cell in found.items() if cell is not None and "loss" in cell}


def _remarks(records: Records, results: list[Results], pairs: Pairs) -> Iterator[str]:
    """What the figures hold for."""
    models = records.models()
    if models:
        told = records.conditions[models[0]]
        yield (
            f"Loss added to the full cache's (nats per token) and recall: means of {', '.join(models)} at shares of a "
            f"prompt of {told['prompt tokens']:,} tokens, {told['texts']} texts and {told['recall prompts']} recall "
            f"prompts each (`tools/quality`)."
        )
    for place, found in pairs.items():
        plain = {f"{base.slot_bytes:,.0f}" for _, base in found.values()}
        yield (
            f"Step: {place}; time of a decode step over that of the same model with plain static attention, of "
            f"{' / '.join(sorted(plain))} bytes per slot (`tools/bench --suite policies`)."
        )
    for result in results:
        used = {r.run for r in result.records if r.suite == "policies"}
        for run in (run for run in result.runs if run.number in used):
            told = [str(run.conditions.get(name)) for name in ("device", "processor", "torch")]
            yield f"Measured {run.date} on {told[0]} ({told[1]}), torch {told[2]}."
    if any(ours.check == "not checked" for found in pairs.values() for ours, _ in found.values()):
        yield "\\*: the op has no specification in `ops/reference.py` that this run could compare it with."


def _absent(records: Records, texts: list[str]) -> Iterator[str]:
    """Why cells are missing: a line for each policy and reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for cell in records.cells:
        if cell["method"] in texts and "why_not" in cell and cell["share"] in SHARES:
            at = f"{cell['model']} at {cell['share']:.0%}"
            reasons.setdefault((cell["method"], cell["why_not"]), []).append(at)
    if reasons:
        yield "\n".join(f"- {method}, {', '.join(where)}: {why}" for (method, why), where in reasons.items())
