"""Options of transformers' generate that a compiled model refuses."""

from typing import Any

from zsmerge_compile.errors import InputError, must

_NO_COPIES = "beam search would have to copy one row's cache over another's"
_NO_UNDO = "assisted generation would have to take tokens back out of a compressed cache"
_ONE_CACHE = "a compiled model has one cache, its own"

# argument -> the values accepted beside None, and why no other
_ONLY: dict[str, tuple[tuple[object, ...], str]] = {
    "num_beams": ((1,), _NO_COPIES),
    "num_beam_groups": ((1,), _NO_COPIES),
    "constraints": ((), _NO_COPIES),
    "force_words_ids": ((), _NO_COPIES),
    "assistant_model": ((), _NO_UNDO),
    "prompt_lookup_num_tokens": ((), _NO_UNDO),
    "assistant_early_exit": ((), _NO_UNDO),
    "use_mtp": ((False,), _NO_UNDO),
    "penalty_alpha": ((0,), "contrastive search would have to try several tokens on one cache"),
    "dola_layers": ((), "only the last layer's logits are computed"),
    "guidance_scale": ((1,), "classifier-free guidance would need a second cache"),
    "negative_prompt_ids": ((), "classifier-free guidance would need a second cache"),
    "token_healing": ((False,), "it calls generate within generate"),
    "custom_generate": ((), "the loop is transformers' own"),
    "use_cache": ((True,), _ONE_CACHE),
    "cache_implementation": ((), _ONE_CACHE),
    "prefill_chunk_size": ((), 'compile with ZSMergeConfig(prefill="chunked") for a prompt fed in chunks'),
    "output_attentions": ((False,), "attention weights do not leave the cache op"),
    "output_hidden_states": ((False,), "only logits leave the compiled graph"),
    "inputs_embeds": ((), "pass input_ids"),
    "position_ids": ((), "positions follow the attention_mask"),
}


class Options:
    """An option as transformers resolves it: the argument, else the given generation_config, else the model's own."""

    def __init__(self, arguments: dict[str, Any], given: Any, default: Any) -> None:
        self._arguments, self._configs = arguments, (given, default)

    def __getitem__(self, name: str) -> Any:
        values = [self._arguments.get(name), *(getattr(config, name, None) for config in self._configs)]
        return next((value for value in values if value is not None), None)


def check_options(options: Options) -> None:
    """Raises InputError naming the first option a compressed cache cannot honour."""
    for name, (accepted, why) in _ONLY.items():
        value = options[name]
        if value is not None and value not in accepted:
            shown = value if isinstance(value, str | int | float) else type(value).__name__
            raise InputError(must(name, accepted[0] if accepted else "None", shown, why))
