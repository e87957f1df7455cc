"""Checkpoint directories, read without touching a network."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from zsmerge_compile.errors import InputError, must

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(path: Path, dtype: str = "auto", device: str = "cpu") -> Any:
    """The causal language model in a directory, in eval mode; raises InputError where there is none."""
    _check_directory(path)
    from transformers import AutoModelForCausalLM

    _quiet()
    model = _load(AutoModelForCausalLM, path, dtype=dtype).eval()
    try:
        return model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(must("--device", "a device of this machine", device)) from error


def load_tokenizer(path: Path) -> Any:
    """The tokenizer in a directory; raises InputError where there is none."""
    _check_directory(path)
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, path)


def is_bundle(path: Path) -> bool:
    """Whether `export` wrote this directory."""
    return (path / "manifest.json").is_file()


def default_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _check_directory(path: Path) -> None:
    expected = "a checkpoint directory (config.json, weights, tokenizer)"
    if not path.is_dir():
        raise InputError(must("PATH", expected, f"{path}, which is {'a file' if path.exists() else 'not there'}"))
    if not (path / "config.json").is_file():
        raise InputError(must("PATH", expected, f"{path}, which has no config.json"))


def _load(kind: Any, path: Path, **options: Any) -> Any:
    try:
        return kind.from_pretrained(path, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = textwrap.shorten(str(error) or type(error).__name__, 240, placeholder=" ...")
        raise InputError(f"{path} cannot be loaded: {reason}") from error


def _quiet() -> None:
    """No bar for loading weights: the commands show their own progress."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
