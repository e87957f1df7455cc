"""Arguments of transformers' generate: which a compiled model refuses, and which make it look at each token."""

import inspect
from typing import Any

from transformers import GenerationMixin

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
    "custom_generate": ((), "the loop is this package's own, or transformers'"),
    "use_cache": ((True,), _ONE_CACHE),
    "cache_implementation": ((), _ONE_CACHE),
    "prefill_chunk_size": ((), 'compile with ZSMergeConfig(prefill="chunked") for a prompt fed in chunks'),
    "output_attentions": ((False,), "attention weights do not leave the cache op"),
    "output_hidden_states": ((False,), "only logits leave the compiled graph"),
    "inputs_embeds": ((), "pass input_ids"),
    "position_ids": ((), "positions follow the attention_mask"),
}


# what lets a caller see or judge each token as it comes; their absence is None, False or an empty list
_EACH_TOKEN = (
    "streamer",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "stop_strings",
    "max_time",
    "synced_gpus",
)
_HANDLES = ("past_key_values", "cache")  # transformers' older and newer name of one thing
_GENERATE = inspect.signature(GenerationMixin.generate)


def by_name(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call of generate, positional ones included, without the model."""
    arguments = dict(_GENERATE.bind(None, *args, **kwargs).arguments)
    del arguments["self"]
    return arguments | arguments.pop("kwargs", {})


def take_handle(arguments: dict[str, Any]) -> Any:
    """Takes the handle to continue from out of the arguments, under either of its names; raises InputError for two."""
    given = [value for value in (arguments.pop(name, None) for name in _HANDLES) if value is not None]
    if len(given) == 2 and given[0] is not given[1]:
        raise InputError(must("past_key_values", "given once", "past_key_values and cache"))
    return given[0] if given else None


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """A cache for `model`'s forward, under the name that this version of transformers gives it."""
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}


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


def wants_each_token(options: Options) -> bool:
    """Whether the caller, or a clock, has a say after every token."""
    values = [options[name] for name in _EACH_TOKEN]
    return any(value is not None and value is not False and value != [] for value in values)
