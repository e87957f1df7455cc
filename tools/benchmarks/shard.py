"""A pytest plugin: `--shard 2/5` runs every fifth test, from the second. pytest-xdist may not be installed."""

from __future__ import annotations

from typing import Any


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--shard", default="1/1", metavar="I/N", help="run tests I, I + N, I + 2N, ...")


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    share, of = (int(number) for number in config.getoption("--shard").split("/"))
    mine = items[share - 1 :: of]
    config.hook.pytest_deselected(items=[item for item in items if item not in mine])
    items[:] = mine
