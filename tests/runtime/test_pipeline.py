"""A compiled model inside transformers' pipelines and streamers."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from transformers import (
    TextIteratorStreamer,
    pipeline,
)

from tests.words import word_tokenizer
from zsmerge_compile.errors import InputError

Compiled = Callable[[Any, int], Any]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return word_tokenizer()


def test_text_generation_pipeline(
    llama: Any, tokenizer: Any, compiled: Compiled, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    """The same texts, and not a word logged or warned that the untouched model does not cause as well."""
    texts = ["w5 w9 w17 w3", "w8 w8", "w101 w9 w33"]

    def run(model: Any) -> tuple[Any, set[str]]:
        caplog.clear(), recwarn.clear()
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        assert type(model).__name__ in repr(pipe)
        out = pipe(texts, batch_size=3, max_new_tokens=8, do_sample=False)
        return out, {record.message for record in caplog.records} | {str(warning.message) for warning in recwarn}

    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        (expected, usual), (got, said) = run(llama), run(compiled(llama, 3))
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert got == expected
    assert said <= usual


def test_text_streamer_in_a_thread(llama: Any, tokenizer: Any, compiled: Compiled) -> None:
    ids = tokenizer("w5 w9 w17", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    run = compiled(llama, 1)
    worker = threading.Thread(target=run.generate, args=(ids,), kwargs=dict(streamer=streamer, max_new_tokens=6))
    worker.start()
    text = "".join(streamer)
    worker.join()
    assert text.split() == tokenizer.decode(llama.generate(ids, max_new_tokens=6)[0, 3:]).split()


def test_stays_on_its_device(llama: Any, compiled: Compiled) -> None:
    run = compiled(llama, 1)
    assert run.to("cpu") is run
    with pytest.raises(InputError, match="device must be cpu"):
        run.to("cuda:1")
