"""A byte-level BPE of 1,024 tokens in which every fact key and every two-digit number is one token."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 1_024
END = "<|end|>"  # ends every file; also the padding
KEYS = [f" K{i:02d}" for i in range(100)]
NUMBERS = [f"{i:02d}" for i in range(100)]
# A newline keeps its indentation, so the first token of every line starts with a newline and a whole line can be
# inserted before it without changing how the lines around it are split.
WORDS = r" ?[A-Za-z_]+|\n[ ]*| ?[^\sA-Za-z0-9_]+|\s+"


def train_tokenizer(texts: Iterable[str], max_length: int) -> PreTrainedTokenizerFast:
    """Learns the merges from `texts`; `max_length` is the model's limit in tokens."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(KEYS) - len(NUMBERS) - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens([AddedToken(END, normalized=False)])
    core.add_tokens([AddedToken(word, normalized=False) for word in KEYS + NUMBERS])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=END,
        padding_side="left",
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
