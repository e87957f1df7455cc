"""A tokenizer for the tiny models: every token but two is a word, w2 ... w127."""

from typing import Any

from tests.models_zoo import VOCAB


def word_tokenizer() -> Any:
    """0 is the pad, 1 the begin token; pads on the left."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<s>": 1} | {f"w{i}": i for i in range(2, VOCAB)}
    core = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
