"""LESS: eviction as H2O or StreamingLLM does it, and a state of low rank for what leaves (`ops/less.py`).

The feature maps phi and psi are trained for a model, by `tools/train_less`; the models this package ships have theirs.
Source: Dong et al., "Get More with LESS: Synthesizing Recurrence with KV Cache Compression for Efficient LLM
Inference".

Ours: see `ops/less.py`; streaming eviction keeps the positions of the text; in a layer with a sliding window the
low-rank state does not forget what the window has passed. The paper takes the size of the low-rank
state, rank rows of D + 1 numbers in fp32 for each key/value head, out of the budget; here it comes on top.

Measured (README, "Policies side by side"; 1,792 tokens): against h2o on the same model it loses less at 10 and 5% of
the prompt on all shipped models, and at 20% on two of three. Maps must be trained at the lengths they are used at:
those of 512 tokens cost more than they brought. The shipped ones are trained beside H2O; beside StreamingLLM they
brought nothing (LLaMA), for which `tools/train_less --eviction streaming` makes others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zsmerge_compile.config import Split, ZSMergeConfig
from zsmerge_compile.errors import ConfigError, must
from zsmerge_compile.ops import contracts, less
from zsmerge_compile.ops.policy import Site
from zsmerge_compile.ops.state import LayerLayout, allocate
from zsmerge_compile.policies.streaming import config_of, split_of
from zsmerge_compile.policies.zsmerge import Evicting, evicting_config

EVICTIONS = ("h2o", "streaming")
RANK, WIDTHS = 8, 4  # as published: hidden size 512 for heads of 128 dimensions; of random weights
SHIPPED = ("falcon", "llama", "mistral")
FILE = "less.safetensors"
HINT = "train them for this model with tools/train_less"


class LESSPolicy(Evicting):
    """budget; weights (a file of `tools/train_less`, tensors by name, a shipped model: falcon, llama, mistral; or
    "random", of the published sizes, to measure time and memory by); eviction ("h2o" or "streaming"); recent (h2o: a
    count, or a share as float, 0.5), sinks (streaming: tokens, 4); prefill and chunk as `ZSMergeConfig`."""

    name = "less"
    keeps = "as h2o or streaming, what leaves in a state of low rank"
    state_fields = less.STATE_FIELDS

    def __init__(self, config: ZSMergeConfig, tensors: Mapping[str, Tensor] | None, **parameters: Any) -> None:
        super().__init__(config, **parameters)
        self.decode_op, self.extend_op = less.DECODE, less.EXTEND
        self.scoring = "age" if parameters["eviction"] == "streaming" else "received"
        self.tensors = tensors

    def split(self, budget: int, window: int | None) -> Split:
        if self.describe()["eviction"] == "h2o":
            return super().split(budget, window)
        return split_of(self.describe()["sinks"], budget, window)

    def layouts(self, sites: Sequence[Site]) -> tuple[LayerLayout, ...]:
        """As any policy's. Raises ConfigError where the weights are of another model."""
        for site in sites:
            self.maps(site)
        there = {int(name.partition(".")[0]) for name in self.tensors or () if name.partition(".")[0].isdecimal()}
        if there and len(there) != len(sites):
            raise ConfigError(must("layers of LESS weights", f"the model's {len(sites)}", len(there), HINT))
        return super().layouts(sites)

    def maps(self, site: Site) -> less.Maps:
        """A layer's feature maps. Raises ConfigError."""
        if self.tensors is None:
            generator = torch.Generator().manual_seed(site.layer)
            sizes = expected(site.heads, site.kv_heads, site.head_dim, WIDTHS * site.head_dim, RANK)
            return less.Maps(*(torch.randn(size, generator=generator) * 0.02 for size in sizes))
        found = []
        for name in less.Maps._fields:
            if f"{site.layer}.{name}" not in self.tensors:
                raise ConfigError(must(f"LESS weights {name} of layer {site.layer}", "given", "none", HINT))
            found.append(self.tensors[f"{site.layer}.{name}"].float())
            if not found[-1].isfinite().all():
                raise ConfigError(must(f"LESS weights {name} of layer {site.layer}", "finite", "nan or inf", HINT))
        hidden = found[1].shape[-2] if found[1].dim() == 3 else WIDTHS * site.head_dim
        shapes = expected(site.heads, site.kv_heads, site.head_dim, hidden, self.rank)
        for name, tensor, shape in zip(less.Maps._fields, found, shapes, strict=True):
            if tuple(tensor.shape) != shape:
                what = f"LESS weights {name} of layer {site.layer}"
                raise ConfigError(must(what, list(shape), list(tensor.shape), HINT))
        return less.Maps(*found)

    @cached_property
    def state_kind(self) -> str:
        """The low-rank state means something beside the maps it was made with only, and beside its eviction."""
        digest = hashlib.sha256()
        for name, tensor in sorted((self.tensors or {}).items()):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        return f"{self.name}, {self.describe()['eviction']} eviction, weights {digest.hexdigest()[:16]}"

    @property
    def rank(self) -> int:
        """Of every layer's maps, as the first layer has it."""
        first = None if self.tensors is None else self.tensors.get("0.w2")
        return RANK if first is None or first.dim() != 3 else first.shape[-1]

    def allocate(
        self, layout: LayerLayout, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, ...]:
        """An empty state of one layer."""
        rows = (batch_size, layout.kv_heads, self.rank)
        low_rank = torch.zeros(*rows, layout.head_dim, dtype=torch.float32, device=device)
        return (*allocate(layout, batch_size, dtype, device), low_rank, torch.zeros_like(low_rank[..., 0]))

    def arguments(self, site: Site, layout: LayerLayout) -> tuple[Any, ...]:
        """The rule's fields, then the feature maps."""
        return (*contracts.spelled(self.rule(site, layout)), *self.maps(site))


def expected(heads: int, kv_heads: int, head_dim: int, hidden: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Shapes of one layer's feature maps, in the order of `less.Maps`."""
    query, key = ((count, head_dim, hidden) for count in (heads, kv_heads))
    seconds = ((heads, hidden, rank), (kv_heads, hidden, rank))
    return query, seconds[0], key, seconds[1], (kv_heads, rank), (kv_heads, rank, rank), (kv_heads, rank)


def make(
    budget: Any,
    weights: str | Path | Mapping[str, Tensor],
    eviction: str = "h2o",
    recent: int | float | None = None,
    sinks: int | None = None,
    prefill: str = "full",
    chunk: int = 512,
) -> LESSPolicy:
    """Raises ConfigError."""
    if eviction not in EVICTIONS:
        raise ConfigError(must("eviction", f"one of {', '.join(EVICTIONS)}", repr(eviction)))
    unused, given = ("sinks", sinks) if eviction == "h2o" else ("recent", recent)
    if given is not None:
        raise ConfigError(must(unused, f"left out, as {eviction} eviction has none", repr(given)))
    told: dict[str, Any]
    if eviction == "h2o":
        told = {"recent": 0.5 if recent is None else recent}
        config = evicting_config(budget, told["recent"], "recent", decay=1.0, prefill=prefill, chunk=chunk)
    else:
        told = {"sinks": 4 if sinks is None else sinks}
        config = config_of(budget, told["sinks"], "text", prefill, chunk)
    shown = "given" if isinstance(weights, Mapping) else str(weights)
    parameters = {"weights": shown, "eviction": eviction, **told, "prefill": prefill, "chunk": chunk}
    return LESSPolicy(config, _read(weights), **parameters)


def _read(weights: str | Path | Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    if isinstance(weights, Mapping):
        for name, tensor in weights.items():
            if not isinstance(name, str) or not isinstance(tensor, Tensor):
                raise ConfigError(must("weights", "tensors by name", f"{type(tensor).__name__} {name!r}"))
        return weights
    if weights == "random":
        return None
    if not isinstance(weights, str | Path):
        raise ConfigError(must("weights", "a path, a name or tensors by name", repr(weights)))
    path = Path(weights)
    if str(weights) in SHIPPED:
        path = Path(__file__).parents[1] / "assets" / f"{weights}-stdlib" / FILE
    if not path.is_file():
        what = f"a file of tools/train_less, or one of {', '.join(SHIPPED)}, random"
        raise ConfigError(must("weights", what, repr(str(weights))))
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(must("weights", "a safetensors file", f"{path} ({error})")) from error
