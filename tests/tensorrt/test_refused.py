"""Where TensorRT is not, and where a step is not one engine, one sentence says so; nothing else runs in its place."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import zsmerge_compile as zs
from tests.models_zoo import tiny
from tests.tensorrt.conftest import Tools
from tests.tensorrt.test_step import eager
from zsmerge_compile import api
from zsmerge_compile.cli import main
from zsmerge_compile.errors import ConfigError, InputError, MissingBackendError, UnsupportedGraphError
from zsmerge_compile.lower import inductor, tensorrt_build, tensorrt_needs

ROOT = Path(__file__).resolve().parents[2]
HERE = importlib.util.find_spec("torch_tensorrt") is not None
SENTENCE = (
    'TensorRT must be installed, got an environment without torch_tensorrt; pip install "zsmerge-compile\\[tensorrt\\]"'
)


@pytest.mark.skipif(HERE, reason="torch-tensorrt is installed")
def test_compile_export_and_the_tool_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MissingBackendError, match=SENTENCE):
        zs.compile(tiny("llama-gqa"), zs.ZSMergeConfig(12), backend="tensorrt")
    with pytest.raises(MissingBackendError, match=SENTENCE):
        zs.export(eager("llama-gqa"), tmp_path / "bundle", "tensorrt")
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "bundle"), "--format", "tensorrt"]) != 0
    assert re.search(SENTENCE, " ".join(capsys.readouterr().err.split()))
    assert not list(tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "tensorrt_tool"], cwd=ROOT / "tools", capture_output=True, text=True, check=False,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tools'}", "OUT": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    assert done.stderr.splitlines() == ["error: " + SENTENCE.replace("\\", "")]


def test_what_is_missing_is_looked_for_in_turn(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_needs, "find_spec", lambda name: None if name == "tensorrt" else name)
    assert "an environment without tensorrt;" in str(tensorrt_needs.missing())
    monkeypatch.setattr(tensorrt_needs, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "must be one with an NVIDIA GPU and its driver" in str(tensorrt_needs.missing())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert tensorrt_needs.missing() is None

    def broken(name: str) -> None:
        raise OSError("libnvinfer.so.11: cannot open shared object file\nand more")

    monkeypatch.setattr(tensorrt_needs, "import_module", broken)
    told = tensorrt_needs.missing()
    assert told is not None and "OSError: libnvinfer.so.11: cannot open shared object file; pip install" in told


def test_options_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny("llama-gqa"), zs.ZSMergeConfig(12)
    for segments in (0, True, "x"):
        with pytest.raises(ConfigError, match="segments must be None, or a number of at least 1"):
            zs.compile(model, config, backend="tensorrt", segments=segments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match='with backend="tensorrt", got 2'):
        zs.compile(model, config, backend="eager", segments=2)
    monkeypatch.setattr(tensorrt_needs, "missing", lambda *_: None)
    with pytest.raises(InputError, match='model must be on the GPU with backend="tensorrt", got on cpu; model.cuda()'):
        zs.compile(model, config, backend="tensorrt")


def test_compile_with_stand_ins(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    """zs.compile itself, but for the check of the machine; prompts by the graph as it is."""
    base = eager("llama-gqa")
    monkeypatch.setattr(api, "_check_backend", lambda *_: None)
    monkeypatch.setattr(
        inductor, "lower_graph", lambda program, *_: inductor.Compiled(program.prefill, 1, "stand-in")
    )  # fmt: skip
    ours = zs.compile(base.model, zs.ZSMergeConfig(12, residual=2), batch_size=3, backend="tensorrt")
    (given,) = tools.settings
    assert given["attn_bias_is_causal"] is False and given["enable_autocast"] is False
    assert given["disable_tf32"] is True and given["truncate_double"] is False and given["min_block_size"] == 1
    assert ours.report.kernels["decode"].startswith("one TensorRT engine; torch_tensorrt 2.13.0")
    assert ours.report.parts == {"prefill": 1, "decode": 1}
    assert ours.report.cache_bytes == ours.cache.nbytes - ours.cache.seen_tokens.nbytes
    ids = torch.arange(2, 40)[None].expand(3, -1)
    assert torch.equal(*(side.generate(ids, max_new_tokens=9, do_sample=False) for side in (ours, base)))


def cut(parts: list[str]) -> fx.GraphModule:
    """A compiled graph of parts in a row."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    modules: dict[str, nn.Module] = {}
    for number, part in enumerate(parts):
        name = f"_run_on_{part}_{number}"
        inner = fx.Graph()
        inner.output(inner.call_function(torch.ops.aten.linalg_qr.default, (inner.placeholder("x"),)))
        modules[name] = fx.GraphModule({}, inner)
        value = graph.call_function(getitem, (graph.call_module(name, (value,)), 0))
    graph.output((value,))
    return fx.GraphModule(modules, graph)


def test_segments_are_counted_and_named() -> None:
    assert tensorrt_build.check_segments(cut(["acc"]), 1) == ("one TensorRT engine", 1)
    found = tensorrt_build.segments(cut(["acc", "gpu", "acc"]))
    assert found[1:] == (1, Counter({"aten.linalg_qr.default": 1})) and len(found[0]) == 2
    message = r"must be 1, got 3 \(2 engines, in PyTorch 1 aten.linalg_qr.default\); segments=3 allows them"
    with pytest.raises(UnsupportedGraphError, match=message):
        tensorrt_build.check_segments(cut(["acc", "gpu", "acc"]), 1, hint=True)
    with pytest.raises(UnsupportedGraphError, match=r"must be 1, got 3 .*aten.linalg_qr.default\)$"):
        tensorrt_build.check_segments(cut(["acc", "gpu", "acc"]), 1)
    assert tensorrt_build.check_segments(cut(["acc", "gpu", "acc"]), 3)[1] == 3
    with pytest.raises(UnsupportedGraphError, match=r"must be 5, got 1 \(0 engines"):
        tensorrt_build.check_segments(cut(["gpu"]), 5)


def test_positions_in_the_cache_are_refused_by_name(tools: Tools) -> None:
    policy = zs.policy("streaming", budget=12, sinks=2)
    base: Any = zs.compile(tiny("llama-gqa"), policy, backend="eager")
    with pytest.raises(UnsupportedGraphError, match="arithmetic of a TensorRT engine must be float32 or less, got flo"):
        tensorrt_build.compiled_step(base.program)


def test_another_torch_tensorrt_is_told(tools: Tools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["torch_tensorrt"].dynamo, "compile", lambda program, arg_inputs: None)
    with pytest.raises(UnsupportedGraphError, match="torch-tensorrt must be 2.13, which takes every setting, got no"):
        tensorrt_build.compiled_step(eager("llama-gqa").program)
