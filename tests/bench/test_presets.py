"""What would be measured, and the memory it is estimated to need."""

from __future__ import annotations

import pytest
import torch

from zsmerge_compile.bench import presets, shapes
from zsmerge_compile.bench.presets import Choice
from zsmerge_compile.bench.rows import Group, Row, fits, pack
from zsmerge_compile.bench.timing import Plan
from zsmerge_compile.cli.bench import SUITES
from zsmerge_compile.errors import InputError

GIB = 2**30
BF16 = torch.bfloat16


def test_shapes_are_the_released_models() -> None:
    billions = {name: shapes.named(name).parameters() / 1e9 for name in shapes.SHAPES}
    expected = {"llama-2-7b": 6.74, "llama-2-13b": 13.02, "llama-3-8b": 8.03, "mistral-7b": 7.25, "falcon-7b": 6.92}
    assert {name: round(billions[name], 2) for name in expected} == expected
    assert shapes.named("llama-2-7b").kv_bytes(1, 1, BF16) == 2**19  # PEERS: 0.524 MB a token
    assert shapes.named("llama-3-8b").kv_bytes(1, 1, BF16) == 2**17
    assert shapes.named("falcon-7b").kv_heads == 1
    with pytest.raises(InputError, match="llama-2-7b"):
        shapes.named("gpt-5")


def test_a_model_is_built_with_its_depth_and_dtype() -> None:
    model = shapes.named("tiny", 1).build("cpu", BF16)
    assert (model.config.num_hidden_layers, model.dtype, model.training) == (1, BF16, False)
    assert sum(p.numel() for p in model.parameters()) == shapes.named("tiny", 1).parameters()


def test_memory_of_the_paper_s_cases() -> None:
    figure3 = presets.figure3(Choice(gpu=True))[0]
    need = {(row.method, row.context): figure3.need(row) / GIB for row in figure3.rows}
    weights = 6.74 * 2e9 / GIB
    assert need["dynamic", 54 * 1024] == pytest.approx(weights + 27 * 33 / 32, rel=0.01)
    assert need["zsmerge", 54 * 1024] == pytest.approx(weights + 9, rel=0.01)
    thirteen = [group for group in presets.table(Choice(gpu=True)) if group.shape.name == "llama-2-13b"][0]
    full = [row for row in thirteen.rows if row.method == "dynamic"][-1]  # 16 rows of 8k: the paper ran out of memory
    reason = fits(thirteen, full, 80 * GIB)
    assert reason is not None and reason.startswith("needs 1") and reason.endswith("GiB")
    assert fits(thirteen, thirteen.rows[0], 80 * GIB) is None


def test_rows_are_packed_as_they_fit() -> None:
    shape = shapes.named("tiny")
    rows = [
        Row("zsmerge", 1, 1000, 100),
        Row("zsmerge", 1, 2000, 100),
        Row("plain", 1, 1000, 100),
        Row("static", 1, 100),
    ]
    group = Group("decode", shape, torch.float32, tuple(rows))
    weights, cache = shape.parameters() * 4, rows[0].need(shape, torch.float32)
    assert pack(group, rows, weights + 10 * cache) == [rows]
    assert pack(group, rows, weights + cache) == [rows[:2], rows[2:3], rows[3:]], "one cache serves both lengths"


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("quick", [False, True])
def test_every_suite_has_rows_and_an_estimate(gpu: bool, quick: bool) -> None:
    choice = Choice(gpu=gpu, quick=quick)
    device = torch.device("cuda" if gpu else "cpu")
    assert tuple(presets.SUITES) == SUITES, "the command line lists them without importing torch"
    for group in presets.groups(list(SUITES), choice):
        assert group.rows and group.seconds(device) > 0
        assert all(row.label() and group.need(row) > 0 for row in group.rows)


def test_the_cpu_preset_covers_the_specification() -> None:
    groups = presets.groups(presets.default_suites(Choice(gpu=False)), Choice(gpu=False))
    rows = {(group.suite, row.method, row.batch, row.context, row.budget) for group in groups for row in group.rows}
    for budget in (1023, 4095, 16_383):
        for method in ("zsmerge", "plain", "op", "op-plain"):
            assert ("slots", method, 1, 4 * (budget + 1), budget) in rows
    for context in (4096, 16_384, 54 * 1024):
        for method in ("dynamic", "static"):
            assert ("decode", method, 1, context, None) in rows
        assert {r[4] for r in rows if r[:2] == ("decode", "zsmerge") and r[3] == context and r[2] == 1} == {
            round(context * share) for share in presets.SHARES
        }
    for batch in (8, 16):  # tools/README.md says so
        assert {r[1] for r in rows if r[0] == "decode" and r[2:4] == (batch, 4096)} == {"dynamic", "static", "zsmerge"}
        assert {r[4] for r in rows if r[:3] == ("decode", "zsmerge", batch)} == {205, 819}


def test_a_step_is_measured_with_layers_outlined_and_not() -> None:
    """On a CPU with all twelve layers, side by side."""
    groups = presets.groups(presets.default_suites(Choice(gpu=False)), Choice(gpu=False))
    (group,) = (group for group in groups if group.suite == "outline")
    assert group.shape.depth == 12 and [row.outline for row in group.rows] == [True, False]
    assert len({row.compiled for row in group.rows}) == 2 and group.rows[0].budget == group.rows[1].budget


def test_table1_is_chosen_by_model_and_batch() -> None:
    for suite in (presets.table, presets.static_table):
        assert {group.shape.name for group in suite(Choice(gpu=True, batches=(16,)))} == {"llama-2-7b", "llama-2-13b"}
        assert suite(Choice(gpu=True, model="llama-125m")) == []
    assert presets.families(Choice(gpu=True, model="llama-3-8b")) == []


def test_a_cpu_s_estimate_counts_on_an_empty_compiler_cache() -> None:
    """Seen on two cores: 46 to 71 s for the twelve layers in one graph, 18 s with layers outlined."""
    shape, plan = shapes.named("llama-125m"), Plan(rounds=1, warmup=0)
    whole, outlined = (
        Group("outline", shape, torch.float32, (Row("zsmerge", 1, 64, 16, outline=how),), plan) for how in (None, True)
    )
    assert 50 < whole.seconds(torch.device("cpu")) < 90 and outlined.seconds(torch.device("cpu")) < 40
