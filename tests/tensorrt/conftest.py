"""Stand-ins in the place of the two modules."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import pytest

from tests.tensorrt import standin


class Tools(NamedTuple):
    """The stand-in for TensorRT, and the settings of every compilation of the one for torch-tensorrt."""

    trt: standin.TensorRT
    settings: list[dict[str, Any]]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Tools:
    made = Tools(standin.TensorRT(), [])
    monkeypatch.setitem(sys.modules, "tensorrt", made.trt)
    monkeypatch.setitem(sys.modules, "torch_tensorrt", standin.torch_tensorrt(*made))
    return made
