"""`compiled`: what the generate tests run over."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.models_zoo import tiny
from tests.runtime.fake_step import FakeStep


@pytest.fixture
def compiled() -> Callable[[Any, int], Any]:
    """compiled(model, batch_size), at full budget; the one place to change what these tests run over."""
    return FakeStep


@pytest.fixture(params=("llama-gqa", "falcon-7b", "falcon-rw"))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


@pytest.fixture
def llama() -> Any:
    return tiny("llama-gqa")
