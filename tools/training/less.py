"""`tools/train_less FAMILY`: trains LESS's feature maps for a shipped model (`zsmerge_compile/policies/less.py`).

Layer by layer, as in the paper: the maps are to make the attention layer's output, after its last projection, that of
full attention, while only the tokens of H2O (or StreamingLLM: --eviction) attend by their logits and the evicted ones
by phi(q) psi(k). Queries, keys and values are those of the model on its training text; which tokens are held at each
step is found beforehand.

RATE and START were chosen from three pairs on the LLaMA. They were first compared by their errors on held-out text,
so the recorded errors of held-out text are not wholly independent of that choice; compared again on a tenth of the
training files, set aside for it, the same pair is the best in the layer whose error is a thousand times the others'.
LENGTH and SHARES are those of the README's comparison, where maps of 512 tokens and one share had lost more than h2o.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.corpus import split_by_file, stdlib_files
from training.publish import environment
from training.stream import Stream
from training.train import ROOT, SPLIT_SEED
from zsmerge_compile import tensor_file
from zsmerge_compile.capture import capture
from zsmerge_compile.errors import must
from zsmerge_compile.models.registry import spec_for
from zsmerge_compile.ops.contracts import ATTENTION
from zsmerge_compile.ops.less import Maps
from zsmerge_compile.passes.graph import PassContext, attention_sites, calling
from zsmerge_compile.passes.pipeline import CANONICALISE
from zsmerge_compile.policies.less import EVICTIONS, FILE, SHIPPED, expected

LENGTH = 1792  # tokens of a sequence: of how many tokens phi(q) z is a sum, so train at the lengths to be served
SHARES = (0.2, 0.1, 0.05)  # of them is the budget, half of it recent; sequences take them in turn
SINKS = 4  # of StreamingLLM
QUERIES = 256  # of a sequence, drawn anew for each step
RANK, HIDDEN = 8, 64  # the paper: 8 and 512, for heads of 128 dimensions; these have 32
TRAINED, JUDGED = 64, 16  # sequences of training text, of held-out text
RATE, START = 1e-2, 1.0  # learning rate, and d1 at the start; 1e-3 and 1e-4 as published learn little in minutes
_PROJECTIONS = ("o_proj", "dense")


class Layer(NamedTuple):
    """What one layer's attention sees, for N sequences: query [N, H, T, D], key and value [N, G, T, D]."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    projection: Tensor  # [hidden, H * D], of the heads' outputs


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("tools/train_less", description=__doc__)
    parser.add_argument("family", choices=SHIPPED)
    parser.add_argument("--eviction", choices=EVICTIONS, default="h2o", help="beside which the maps will be used (h2o)")
    parser.add_argument("--steps", type=int, default=600, help="of each layer, four sequences a step (600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens of a sequence ({LENGTH})")
    parser.add_argument("--output", type=Path, help="(beside the shipped model's weights)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options, console = parse_arguments(arguments), Console(highlight=False)
    folder = ROOT / "zsmerge_compile" / "assets" / f"{options.family}-stdlib"
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    windows = [window for window in spec_for(model).windows if window is not None]
    if windows and min(windows) < options.length:  # what a window has passed stays in the policy's low-rank state
        raise SystemExit(must("--length", f"at most the window of {min(windows)} tokens", options.length))
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    split, rng = split_by_file(stdlib_files(), SPLIT_SEED), np.random.default_rng(options.seed)
    seen, unseen = (
        layers_of(model, sequences(Stream(files, tokenizer), count, options.length, rng))
        for files, count in ((split.train, TRAINED), (split.held_out, JUDGED))
    )
    torch.manual_seed(options.seed)
    tensors: dict[str, Tensor] = {}
    errors = []
    for number, (layer, judged) in enumerate(zip(seen, unseen, strict=True)):
        started = time.perf_counter()
        maps = train(layer, kept(layer, options.eviction), options.steps, rng)
        held = kept(judged, options.eviction)
        bare, ours = (float(judge(judged, held, m)) for m in (None, maps))
        errors.append({"layer": number, options.eviction: bare, "less": ours})
        seconds = time.perf_counter() - started
        console.print(f"layer {number}: error of held-out outputs {bare:.4f} -> {ours:.4f} of theirs, {seconds:.0f} s")
        tensors |= {f"{number}.{name}": tensor.contiguous() for name, tensor in maps._asdict().items()}
    told: dict[str, Any] = {"rank": RANK, "hidden": HIDDEN, "eviction": options.eviction, "shares": SHARES}
    told |= {"tokens": options.length, "steps": options.steps, "seed": options.seed, "errors": errors, **environment()}
    output = options.output or folder / FILE
    tensor_file.write(tensors, output, {name: json.dumps(value) for name, value in told.items()})
    console.print(f"written to {output}")


def sequences(source: Stream, count: int, length: int, rng: np.random.Generator) -> Tensor:
    """`count` windows of the text: [count, length]."""
    return torch.tensor(np.stack([source.window(rng, length).ids for _ in range(count)]))


@torch.no_grad()
def layers_of(model: nn.Module, ids: Tensor) -> list[Layer]:
    """Runs the model's canonical graph and takes down what its attentions are given."""
    spec = spec_for(model)
    gm, context, found = capture(model, spec, 1).prefill, PassContext(spec), []
    for _, rewrite in CANONICALISE:
        rewrite(gm, context)
    order = [layer for layer, _ in attention_sites(gm)]

    def noted(query: Tensor, key: Tensor, value: Tensor, mask: Any, is_causal: bool, scale: float) -> Tensor:
        found.append((query, key, value, scale))
        return ATTENTION(query, key, value, mask, is_causal, scale)

    run = calling(gm, ATTENTION, noted)
    for batch in ids.split(4):
        columns = torch.arange(ids.shape[1]).expand_as(batch).contiguous()
        run(batch, torch.ones_like(batch), columns)
    layers = []
    for layer in range(len(order)):
        mine = [call for place, call in enumerate(found) if order[place % len(order)] == layer]
        query, key, value = (torch.cat(parts) for parts in zip(*(call[:3] for call in mine), strict=True))
        layers.append(Layer(query, key, value, mine[0][3], projection(model, layer)))
    return layers


def projection(model: nn.Module, layer: int) -> Tensor:
    """The weight that joins a layer's heads."""
    modules = ((name, module) for name, module in model.named_modules() if f".{layer}." in name)
    (found,) = (module for name, module in modules if name.rpartition(".")[2] in _PROJECTIONS)
    weight: Tensor = found.weight.detach()  # type: ignore[union-attr, assignment]
    return weight


@torch.no_grad()
def kept(layer: Layer, eviction: str = "h2o") -> Tensor:
    """Whether query t attends to key i by its logit: [N, G, T, T]. Budgets are SHARES of the tokens; H2O's half recent,
    StreamingLLM's but for the first SINKS."""
    n, groups, length, _ = layer.key.shape
    budgets = [max(SINKS + 1, round(SHARES[number % len(SHARES)] * length)) for number in range(n)]
    budget, column = torch.tensor(budgets)[:, None, None], torch.arange(length)
    if eviction == "streaming":
        behind = column[:, None] - column
        near = (behind >= 0) & ((behind <= budget - SINKS) | (column < SINKS))
        return near[:, None].expand(-1, groups, -1, -1)
    recent = budget // 2
    query = layer.query.unflatten(1, (groups, -1))
    alive, score = torch.zeros(n, groups, length, dtype=torch.bool), torch.zeros(n, groups, length)
    seen = torch.zeros(n, groups, length, length, dtype=torch.bool)
    for t in range(length):
        alive[..., t] = True
        seen[:, :, t] = alive
        logits = (query[:, :, :, t] @ layer.key.mT) * layer.scale  # [N, G, r, T]
        score += torch.softmax(logits.masked_fill(~alive[:, :, None], -torch.inf), -1).sum(2)
        # budget + 1 tokens attended; the lowest score leaves, of those that are not recent
        rank = score.masked_fill(~alive | (column > t - recent), torch.inf)
        lowest = rank.argmin(2, keepdim=True)
        alive.scatter_(2, lowest, alive.gather(2, lowest) & (t < budget))
    return seen


def error(layer: Layer, held: Tensor, maps: Maps | None, rows: Tensor | None = None) -> Tensor:
    """Squared error of the projected outputs over the squares of full attention's: [N]. maps None: eviction alone.

    Of the queries `rows`, or of all. For texts no longer than the layer's window, if it has one.
    """
    groups, length = layer.key.shape[1], layer.key.shape[2]
    rows = torch.arange(length) if rows is None else rows
    query, causal = layer.query[:, :, rows], torch.arange(length) <= rows[:, None]
    logits = query.unflatten(1, (groups, -1)) @ layer.key[:, :, None].mT * layer.scale
    full = torch.softmax(logits.masked_fill(~causal, -torch.inf), -1)
    low = torch.full_like(logits, -torch.inf)
    if maps is not None:
        phi, psi = maps.phi(query).unflatten(1, (groups, -1)), maps.psi(layer.key)
        low = (phi @ psi[:, :, None].mT + 1e-20).log()
    given = torch.where(held[:, :, None, rows], logits, low).masked_fill(~causal, -torch.inf)
    outs = [(attention @ layer.value[:, :, None]).flatten(1, 2) for attention in (torch.softmax(given, -1), full)]
    ours, theirs = (out.transpose(1, 2).flatten(2) @ layer.projection.T for out in outs)
    return (ours - theirs).square().sum((1, 2)) / theirs.square().sum((1, 2))


@torch.no_grad()
def judge(layer: Layer, held: Tensor, maps: Maps | None) -> Tensor:
    """The mean error, a sequence at a time."""
    each = zip(layer.query, layer.key, layer.value, held, strict=True)
    return torch.stack(
        [error(layer._replace(query=q[None], key=k[None], value=v[None]), h[None], maps)[0] for q, k, v, h in each]
    ).mean()


def train(layer: Layer, held: Tensor, steps: int, rng: np.random.Generator) -> Maps:
    """Adam, its rate falling by a cosine."""
    (n, heads, length, dim), kv_heads = layer.query.shape, layer.key.shape[1]
    shapes = expected(heads, kv_heads, dim, HIDDEN, RANK)
    begun = [torch.randn(shape) * shape[-2] ** -0.5 for shape in shapes[:4]]
    begun += [torch.full(shapes[4], START), torch.zeros(shapes[5]), torch.full(shapes[6], START / 100)]
    maps = Maps(*(nn.Parameter(tensor) for tensor in begun))
    optimizer = torch.optim.Adam(maps, lr=RATE)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        chosen = torch.from_numpy(rng.choice(n, 4, replace=False))
        rows = torch.from_numpy(rng.choice(length, min(QUERIES, length), replace=False))
        batch = layer._replace(**{name: getattr(layer, name)[chosen] for name in ("query", "key", "value")})
        optimizer.zero_grad(set_to_none=True)
        error(batch, held[chosen], maps, rows).mean().backward()
        optimizer.step()
    return Maps(*(tensor.detach() for tensor in maps))


if __name__ == "__main__":
    main()
