"""`compiled`: what the generate tests run over."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.models_zoo import tiny
from tests.runtime.fake_step import FakeStep
from zsmerge_compile.api import compile
from zsmerge_compile.config import ZSMergeConfig

NAMES = ("llama-gqa", "falcon-7b", "falcon-rw")
_model = cache(tiny)


@cache
def _eager(name: str, batch_size: int, number: int) -> Any:
    """Compiling takes seconds, so one is kept for each `number`; every test leaves it as it finds it, but for rows."""
    return compile(_model(name), ZSMergeConfig(budget=128), batch_size=batch_size, backend="eager")


@pytest.fixture(params=("stand-in", "eager"))
def compiled(request: pytest.FixtureRequest) -> Callable[[Any, int], Any]:
    """compiled(model, batch_size) at full budget: a stand-in that recomputes every step, and the real thing.

    Another one at every call within a test.
    """
    calls: Counter[tuple[str, int]] = Counter()

    def make(model: Any, batch_size: int) -> Any:
        if request.param == "stand-in":
            return FakeStep(model, batch_size)
        key = next(name for name in NAMES if _model(name) is model), batch_size
        calls[key] += 1
        return _eager(*key, calls[key])

    return make


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> Any:
    return _model(request.param)


@pytest.fixture
def llama() -> Any:
    return _model("llama-gqa")
