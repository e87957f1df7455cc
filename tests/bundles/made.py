"""Bundles of tiny models, each exported once per run of the tests, and what they must equal."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import torch
from torch import Tensor
from torch.utils._filelock import FileLock

import zsmerge_compile as zs
from tests.models_zoo import prompt, tiny

BUDGET = 20
PADS = (0, 21, 5)


@cache
def compiled(name: str, batch: int, merge: str = "segment", chunk: int | None = None) -> Any:
    """Eager: the specification."""
    fields: dict[str, Any] = {} if chunk is None else {"prefill": "chunked", "chunk": chunk}
    config = zs.ZSMergeConfig(BUDGET, residual=3, merge=merge, **fields)
    return zs.compile(tiny(name), config, batch_size=batch, backend="eager")


@cache
def bundle(name: str, format: str, batch: int, merge: str = "segment", chunk: int | None = None) -> Path:
    """The folder, the same for all workers of a run; not to be changed (`copy`)."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    folder = Path(gettempdir()) / f"zsmerge-bundles-{run}" / f"{name}-{format}-{batch}-{merge}-{chunk}"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            zs.export(compiled(name, batch, merge, chunk), folder, format)
    return folder


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "bundle"))


def greedy(runner: Any, batch: int, steps: int) -> tuple[Tensor, Tensor]:
    """After a padded prompt of 30 columns: tokens [B, steps], and the logits [B, vocab] they end with."""
    given = prompt(batch, 30, pads=PADS[:batch])
    runner.reset()
    logits, tokens = runner.prefill(given["input_ids"], given["attention_mask"]), []
    for _ in range(steps):
        tokens.append(logits.argmax(-1, keepdim=True))
        logits = runner.decode(tokens[-1])
    return torch.cat(tokens, 1), logits
