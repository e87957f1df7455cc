"""transformers' own `generate`, driving a compiled step.

`GenerateMixin` gives a class with prefill, decode and reset the whole of transformers' generate (sampling, logits
processors, stopping criteria, streamers) by these hooks (tested with transformers 5.17 and 5.24):

- `generate`                         refuses what a compressed cache cannot do, before anything is written; keeps the
                                     handle to itself: its argument has two names
- `custom_generate`                  where nobody has a say after each token, transformers prepares the call and our own
                                     loop (loop.py) makes the tokens; else transformers' loop does, by the next two
- `_supports_default_dynamic_cache`  False: transformers then makes no cache of its own
- `prepare_inputs_for_generation`    called before every step with all columns so far: the first time they are the
                                     prompt, after that the last column is fed, with the rows that are active
- `forward`                          one prefill or one decode; its answer carries the handle that comes back
- `_get_stopping_criteria`           its result is wrapped, to see which rows each step finishes
- `is_remote_code`, `get_experts_implementation`, `can_generate`, `to`
                                     what generate and the pipelines ask of a PreTrainedModel
- `__init_subclass__`                names the class among the causal language models; a text-generation pipeline
                                     would log the names of all those it knows

A row that has met a stopping criterion is inactive from then on: neither the token it stopped at nor a pad reaches its
cache. In the columns after it transformers writes pads (token 0 for a model with neither pad nor end token; a model of
its own, without an end token, would go on writing tokens there), and output_logits hold zeros.

Continuing: pass the past_key_values of an earlier call (return_dict_in_generate=True) and `sequences` followed by new
columns. Each row is fed those of its tokens that are not in its cache yet, rows padded on the left together, so the
result is that of a new call with the same columns and mask. The attention_mask may have zeros anywhere but in a new
last column; left out, the pads written after a row's stop count as pads.
"""

import dataclasses
from typing import Any, Self

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from zsmerge_compile.errors import CacheStateError, InputError, must
from zsmerge_compile.runtime.handle import CacheHandle, to_the_right
from zsmerge_compile.runtime.loop import Wanted, decode_loop
from zsmerge_compile.runtime.options import Options, by_name, check_options, take_handle, wants_each_token
from zsmerge_compile.runtime.session import Session
from zsmerge_compile.runtime.stopping import LastPosition, stops_of

# what transformers calls the handle in its outputs
_HANDLE = next(f.name for f in dataclasses.fields(CausalLMOutputWithPast) if f.name in ("past_key_values", "cache"))


class GenerateMixin(GenerationMixin):
    """transformers' generate for a class with the attributes and the four methods declared here."""

    config: Any
    generation_config: Any
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    cache: Any  # its seen_tokens is [B]; its changes tell a handle of an older state from one of the current
    max_positions: int | None = None  # tokens a row can hold

    main_input_name = "input_ids"
    input_modalities = ("text",)
    _is_stateful = True
    _session: Session | None = None
    _handle: CacheHandle | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Registration wants a config class of its own to look the model up by; nothing is ever loaded through it.
        config = type(f"{cls.__name__}Config", (PreTrainedConfig,), {"model_type": "zsmerge_compile"})
        AutoModelForCausalLM.register(config, cls)

    def prefill(self, input_ids: Tensor, attention_mask: Tensor | None = None, rows: list[int] | None = None) -> Tensor:
        raise NotImplementedError

    def decode(self, token_ids: Tensor, active: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def reset(self, rows: list[int] | None = None) -> None:
        raise NotImplementedError

    def step(self, token_ids: Tensor, active: Tensor) -> Tensor:
        """A decode of tokens known to be good, in rows known to have room: a class may leave out its checks."""
        return self.decode(token_ids, active)

    def check_prompt(self, input_ids: Tensor, attention_mask: Tensor | None, *, empty: bool) -> None:
        """Raises what prefill would raise for this prompt, into an empty cache or the current one; writes nothing."""
        raise NotImplementedError

    def generate(self, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`, with its arguments and result, from an empty cache or from a returned one.

        inputs or input_ids: [B, T], B the batch compiled for (divided by num_return_sequences, where that is set).
        A row also stops at the model's last position, or where a cache of policy full is full.
        past_key_values: what an earlier call on this model returned; the module's text tells how to continue.

        Raises InputError for what a compressed cache cannot do; the cache is then as it was.
        """
        if self._session is not None:
            raise CacheStateError("generate must have returned before it is called again on one compiled model")
        if self.generation_config is None:
            hint = "drive prefill and decode yourself"
            raise InputError(must("the compiled model", "of a transformers class to generate", "another class", hint))
        arguments = by_name(inputs, generation_config, *args, **kwargs)
        options = Options(arguments, generation_config, self.generation_config)
        check_options(options)
        handle = self._check_call(arguments, take_handle(arguments), options["num_return_sequences"] or 1)
        if not wants_each_token(options):
            arguments["custom_generate"] = type(self)._own_loop
        self._session = session = Session(handle, arguments.get("attention_mask"))
        try:
            result = super().generate(**arguments)
        finally:
            self._session = None
        session.end(self.cache.seen_tokens, self.cache.changes)
        self._handle = handle
        return result

    def _own_loop(
        self, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
    ) -> Any:
        """transformers' `_sample` for this class: the same arguments, and equal results."""
        config, session, stops = generation_config, self._session, stops_of(stopping_criteria)
        if session is None or stops is None or input_ids.device != self.device:
            return self._sample(input_ids, logits_processor, stopping_criteria, generation_config, **kwargs)
        logits = self._prefill_columns(session, input_ids, kwargs.get("attention_mask"))
        keep = [bool(config.return_dict_in_generate and on) for on in (config.output_scores, config.output_logits)]
        wanted = Wanted(stops, logits_processor, config.do_sample, config._pad_token_tensor, *keep)
        made = decode_loop(self.step, self.cache, input_ids, logits, wanted)
        session.generated(made.columns, made.sampled)
        if not config.return_dict_in_generate:
            return made.columns
        answer = {"sequences": made.columns, "scores": made.scores, "logits": made.logits, _HANDLE: session.handle}
        return GenerateDecoderOnlyOutput(**answer)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        active: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step of generate: a decode of the rows in `active` [B], or the prefill where there is none."""
        session = self._session
        if session is None:
            raise InputError("a compiled model must be called by generate; prefill and decode are its steps")
        if active is None:
            logits = self._prefill_columns(session, input_ids, attention_mask)
        else:  # an inactive row's logits are undefined, and a NaN there would fail the sampling of the others
            logits = self.decode(input_ids, active).masked_fill(~active[:, None], 0.0)
        return CausalLMOutputWithPast(**{"logits": logits[:, None], _HANDLE: session.handle})

    __call__ = forward

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """What forward is given; `input_ids` [B, K] are all columns of this call so far."""
        session = self._session
        if session is None:
            raise InputError("prepare_inputs_for_generation must be called by generate")
        if not session.started:
            return {"input_ids": input_ids, "attention_mask": attention_mask}
        tokens = input_ids[:, -1:].to(self.device).masked_fill(~session.active[:, None], 0)  # a pad may be any number
        return {"input_ids": tokens, "active": session.active}

    def _prefill_columns(self, session: Session, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Feeds what the cache does not hold of the columns `ids` [B, T]: logits [B, vocab]."""
        self._check_batch(ids.shape[0], 1)
        ids, mask = session.prompt(ids.to(self.device), None if mask is None else mask.to(self.device))
        every = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        ends = every[:, -1:].all(1).tolist()
        if ids.shape[1] > session.handle.ids.shape[1] and not all(ends):
            got = f"0 in row {ends.index(False)}"
            raise InputError(must("the last column of attention_mask", "1 in every row", got, "pad on the left"))
        if session.continues:
            more, given = session.handle.unfed(ids, every)
            logits = self.decode(more) if more.shape[1] == 1 else self.prefill(more, given)
        else:
            prompt = (ids, None) if mask is None else to_the_right(ids, mask)
            self.check_prompt(*prompt, empty=True)
            self.reset()
            logits = self.prefill(*prompt)
        session.begin(ids, every)
        return logits

    def _check_call(self, arguments: dict[str, Any], handle: Any, returned: int) -> CacheHandle:
        """Refuses the call, or names the handle it goes on from: a new one unless one was given."""
        ids, mask = arguments.get("inputs"), arguments.get("attention_mask")
        ids = arguments.get("input_ids") if ids is None else ids
        for name, given in (("input_ids", ids), ("attention_mask", mask)):
            if given is not None and not isinstance(given, Tensor):
                raise InputError(must(name, "a tensor of shape [batch, length]", type(given).__name__))
        if ids is not None:
            if ids.dim() != 2 or ids.shape[1] == 0:
                raise InputError(must("input_ids", "[batch, length] with at least one column", list(ids.shape)))
            self._check_batch(ids.shape[0], returned)
            if handle is None and mask is not None and mask.shape != ids.shape:
                raise InputError(must("attention_mask", f"of input_ids' shape {list(ids.shape)}", list(mask.shape)))
        if handle is None:
            return CacheHandle(self.batch_size, self.device)
        if not isinstance(handle, CacheHandle):
            expected = "what an earlier generate of this compiled model returned"
            raise InputError(must("past_key_values", expected, type(handle).__name__))
        if handle is not self._handle or handle.changes != self.cache.changes:
            raise InputError(must("past_key_values", "the state that the cache is in", "one of another state"))
        if returned != 1:
            raise InputError(must("num_return_sequences", "1 with past_key_values", returned))
        return handle

    def _check_batch(self, rows: int, returned: int) -> None:
        if rows * returned != self.batch_size:
            got = f"{rows} rows" if returned == 1 else f"{rows} rows times num_return_sequences {returned}"
            raise InputError(must("input_ids", f"{self.batch_size} rows, the batch size compiled for", got))

    def _get_stopping_criteria(self, generation_config: Any, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
        criteria = super()._get_stopping_criteria(generation_config, *args, **kwargs)
        if self.max_positions is not None:
            criteria.append(LastPosition(self.cache, self.max_positions))
        return criteria if self._session is None else self._session.watch(criteria, generation_config)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @classmethod
    def is_remote_code(cls) -> bool:
        return False

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def get_experts_implementation(self) -> dict[str, str]:
        return {}

    def generate_batch(self, *args: Any, **kwargs: Any) -> Any:
        instead = "done with prefill(rows=...), decode and reset(rows=...)"
        raise InputError(must("continuous batching", instead, "generate_batch"))

    def to(self, device: str | int | torch.device) -> Self:
        """Itself, where it is on that device already: a compiled graph cannot move. Pipelines call this."""
        wanted = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if wanted.type != self.device.type or wanted.index not in (None, self.device.index):
            raise InputError(must("device", f"{self.device}, where the model was compiled", wanted))
        return self
