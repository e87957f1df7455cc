"""A cache on disk: in another cache of its layout it goes on as if nothing had happened; anything else is refused."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import zsmerge_compile as zs
from tests.bundles.made import BUDGET, bundle, compiled
from tests.models_zoo import prompt, tiny
from zsmerge_compile.testing.tolerance import LOGITS_FP32


def held(model: Any) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in (model.cache.seen_tokens, *model.cache.flat)]


def filled(name: str, batch: int, length: int = 50) -> Any:
    model = compiled(name, batch)
    model.reset()
    model.prefill(prompt(batch, length, seed=length)["input_ids"])
    return model


def assert_goes_on(ours: Any, theirs: Any, batch: int) -> None:
    for step in range(25):
        token = torch.full((batch, 1), 3 + step)
        mine, yours = ours.decode(token), theirs.decode(token)
        error = (mine - yours).abs().amax(-1) / (yours.amax(-1) - yours.amin(-1))
        assert bool((error <= LOGITS_FP32).all())


def other(kind: str, name: str, batch: int) -> Any:
    """A runner of the same model and layout that shares nothing with the one in `compiled`."""
    if kind in ("pt2", "aoti", "onnx"):
        return zs.load(bundle(name, kind, batch))
    return zs.compile(tiny(name), zs.ZSMergeConfig(BUDGET, residual=3), batch_size=batch, backend=kind)


@pytest.mark.parametrize("kind", ["eager", "inductor", "pt2", "aoti", "onnx"])
def test_goes_on_in_every_backend_and_bundle(kind: str, tmp_path: Path) -> None:
    model = filled("llama-gqa", 3)
    model.cache.save(tmp_path / "cache.safetensors")
    loaded = other(kind, "llama-gqa", 3)
    places = [tensor.data_ptr() for tensor in loaded.cache.flat]
    loaded.cache.load(tmp_path / "cache.safetensors")
    assert [tensor.data_ptr() for tensor in loaded.cache.flat] == places
    assert_goes_on(loaded, model, 3)
    loaded.cache.save(tmp_path / "back.safetensors")
    model.reset()
    model.cache.load(tmp_path / "back.safetensors")
    assert_goes_on(model, loaded, 3)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_go_where_they_are_told(data: st.DataObject, tmp_path: Path) -> None:
    model, path = filled("mistral-w8", 3), tmp_path / "rows"
    from_rows = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True))
    to_rows = data.draw(st.permutations([0, 1, 2]))[: len(from_rows)]
    saved = held(model)
    model.cache.save(path, rows=from_rows)
    model.reset()
    model.prefill(prompt(3, 9, seed=9)["input_ids"])
    before = held(model)
    model.cache.load(path, rows=torch.tensor(to_rows))
    for old, new, now in zip(saved, before, held(model), strict=True):
        expected = new.clone()
        expected[to_rows] = old[from_rows]
        assert torch.equal(now, expected)


def test_one_row_of_a_batch_goes_on_alone(tmp_path: Path) -> None:
    many, one = filled("falcon-7b", 3), compiled("falcon-7b", 1)
    many.cache.save(tmp_path / "row", rows=[1])
    one.cache.load(tmp_path / "row")
    alone, among = one.decode(torch.tensor([[4]])), many.decode(torch.full((3, 1), 4))[1:2]
    assert torch.allclose(alone, among, atol=1e-4)


def test_a_loaded_cache_is_another_state_for_generate(tmp_path: Path) -> None:
    model, path = filled("llama-gqa", 1), tmp_path / "cache"
    ids = prompt(1, 12)["input_ids"]
    out = model.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    model.cache.save(path)
    model.cache.load(path)
    with pytest.raises(zs.ZSMergeError, match="past_key_values must be the state that the cache is in"):
        model.generate(out.sequences, past_key_values=out.past_key_values, max_new_tokens=4)


def test_positions_stay_bounded_after_a_load(tmp_path: Path) -> None:
    """The host's own count of the fullest row follows a load."""
    limit = compiled("llama-gqa", 1).max_positions
    model, path = filled("llama-gqa", 1, limit - 1), tmp_path / "full"
    model.cache.save(path)
    fresh = other("eager", "llama-gqa", 1)
    fresh.cache.load(path)
    fresh.decode(torch.tensor([[1]]))
    with pytest.raises(zs.ZSMergeError, match=f"tokens seen must be at most {limit}"):
        fresh.decode(torch.tensor([[1]]))


def test_broken_rows_are_not_saved_and_a_load_mends_them(tmp_path: Path) -> None:
    model, path = filled("llama-gqa", 3), tmp_path / "cache"
    model.cache.save(path, rows=[0])
    model.cache.mark_broken([1])
    with pytest.raises(zs.ZSMergeError, match=r"cache rows \[1\] must be valid"):
        model.cache.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    model.cache.load(path, rows=[1])
    model.cache.save(tmp_path / "other")


def damaged(path: Path, case: str) -> None:
    if case == "short":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif case == "text":
        path.write_text("no cache")
    elif case == "none":
        path.unlink()
    elif case == "foreign":
        save_file({"a": torch.zeros(2)}, path)
    else:
        with safe_open(path, "pt") as file:
            metadata, tensors = file.metadata(), load_file(path)
        if case == "seen":
            tensors["seen_tokens"][0] = -1
        elif case == "missing":
            del tensors["layer0_key"]
        elif case == "dtype":
            tensors["layer0_key"] = tensors["layer0_key"].half()
        elif case == "scalar":
            tensors["seen_tokens"] = torch.tensor(3)
        save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "case, text",
    [
        ("short", "saved cache must be a file that cache.save wrote"),
        ("text", "saved cache must be a file that cache.save wrote"),
        ("none", "saved cache must be a file that cache.save wrote"),
        ("foreign", "kind of the saved cache must be 'zsmerge_compile cache', got None"),
        ("seen", "tokens seen in the saved cache must be 0"),
        ("missing", r"tensors of the saved cache must be this cache's, got \['layer0_key'\]"),
        ("dtype", "layer0_key of the saved cache must be torch.float32"),
        ("scalar", "seen_tokens of the saved cache must be"),
    ],
)
def test_damaged_files_are_refused_and_change_nothing(case: str, text: str, tmp_path: Path) -> None:
    model, path = filled("llama-gqa", 3), tmp_path / "cache"
    model.cache.save(path)
    damaged(path, case)
    before, changes = held(model), model.cache.changes
    with pytest.raises(zs.ZSMergeError, match=text):
        model.cache.load(path)
    assert all(map(torch.equal, held(model), before))
    assert model.cache.changes == changes and not model.cache.broken_rows()


def test_other_layouts_are_refused(tmp_path: Path) -> None:
    model, path = filled("llama-gqa", 3), tmp_path / "cache"
    model.cache.save(path)
    for fields, text in (
        ({"proximity": 5}, "layers of the saved cache must be"),  # same shapes, other parts
        ({"budget": 24}, "layers of the saved cache must be"),
    ):
        config = zs.ZSMergeConfig(**({"budget": BUDGET, "residual": 3} | fields))  # type: ignore[arg-type]
        with pytest.raises(zs.ZSMergeError, match=text):
            zs.compile(tiny("llama-gqa"), config, batch_size=3, backend="eager").cache.load(path)
    with pytest.raises(zs.ZSMergeError, match="saved cache must be of 1 rows, got 3; name the rows"):
        compiled("llama-gqa", 1).cache.load(path)
    with pytest.raises(zs.ZSMergeError, match="rows must be distinct"):
        model.cache.load(path, rows=[0, 0, 1])
    with pytest.raises(zs.ZSMergeError, match="path must be a file in a folder that exists"):
        model.cache.save(tmp_path / "no" / "cache")
    with pytest.raises(zs.ZSMergeError, match="path must be a file in a folder that exists"):
        model.cache.save(tmp_path)


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    cache: Any = compiled("llama-gqa", 1).cache
    for path in (tmp_path / ("x" * 300), f"{tmp_path}/a\0b", bytes(tmp_path / "bytes"), None, "/proc/cache"):
        with pytest.raises(zs.ZSMergeError, match="path must be"):
            cache.save(path)
        with pytest.raises(zs.ZSMergeError, match="saved cache must be a file that cache.save wrote"):
            cache.load(path)
    assert not list(tmp_path.iterdir())


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    """And a link stays one: the file behind it is written."""
    (tmp_path / "plain").touch()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    compiled("llama-gqa", 1).cache.save(tmp_path / "link")
    weights = bundle("llama-gqa", "pt2", 1) / "weights.safetensors"
    modes = {path.stat().st_mode for path in (tmp_path / "plain", tmp_path / "cache", weights)}
    assert len(modes) == 1 and (tmp_path / "link").is_symlink()


def test_many_may_save_to_one_file(tmp_path: Path) -> None:
    cache = compiled("llama-gqa", 1).cache
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: cache.save(tmp_path / "cache"), range(40)))
    cache.load(tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
