"""`compiled`: what the generate tests run over."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.models_zoo import tiny
from tests.runtime.fake_step import FakeStep
from zsmerge_compile.api import compile
from zsmerge_compile.config import ZSMergeConfig


def _eager(model: Any, batch_size: int) -> Any:
    return compile(model, ZSMergeConfig(budget=128), batch_size=batch_size, backend="eager")


@pytest.fixture(params=("stand-in", "eager"))
def compiled(request: pytest.FixtureRequest) -> Callable[[Any, int], Any]:
    """compiled(model, batch_size), at full budget: over a stand-in that recomputes every step, and the real one."""
    return FakeStep if request.param == "stand-in" else _eager


@pytest.fixture(params=("llama-gqa", "falcon-7b", "falcon-rw"))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


@pytest.fixture
def llama() -> Any:
    return tiny("llama-gqa")
