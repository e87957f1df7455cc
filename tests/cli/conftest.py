"""Tiny checkpoints on disk."""

from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from tests.models_zoo import tiny
from tests.words import word_tokenizer

logging.get_logger()  # its handler keeps the standard error it first sees, which must not be one test's own


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return word_tokenizer()


@pytest.fixture(scope="session")
def checkpoint(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny LLaMA (2 query heads per key/value head) and its tokenizer."""
    path = tmp_path_factory.mktemp("tiny-llama")
    tiny("llama-gqa").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
