"""Tiny checkpoints on disk."""

from pathlib import Path
from typing import Any

import pytest
from transformers.utils import logging

from tests.models_zoo import VOCAB, tiny

logging.get_logger()  # its handler keeps the standard error it first sees, which must not be one test's own


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Words w2 ... w127, of the tiny models' vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    core = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", padding_side="left")


@pytest.fixture(scope="session")
def checkpoint(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tiny LLaMA (2 query heads per key/value head) and its tokenizer."""
    path = tmp_path_factory.mktemp("tiny-llama")
    tiny("llama-gqa").save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
