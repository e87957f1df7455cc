"""kvpress's presses on our material: run by the interpreter of kvpress's own environment, and imports nothing of ours.

    python kvpress_worker.py MODEL MATERIAL.json OUT_FOLDER PRESS:SHARE ...

Each prompt is compressed alone (batch 1), as kvpress expects; the compressed caches are then put together and decoded
as one batch, token by token, as ours are: a press compresses no further, so the cache grows with what follows. Keys
stay where rotary embedding put them, and positions go on from the prompt's real length. Writes one JSON file a job in
the form of `answers.Answers`, its press's settings and tokens kept per layer beside it, or {"why_not": ...};
`full.json`, written first, has the untouched model's logits for the first text.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kvpress
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

NEEDS_WEIGHTS = "ObservedAttentionPress"  # attention weights exist with eager attention only


def main(model: str, material: str, out: str, *jobs: str) -> None:
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    texts, recalls = (json.loads(Path(material).read_text())[name] for name in ("texts", "recalls"))
    loaded = {"sdpa": load(model, "sdpa")}
    logits = loaded["sdpa"](torch.tensor([texts[0]["prompt"]])).logits[0, -1].tolist()
    versions = {library: version(library) for library in ("kvpress", "transformers", "torch")}
    write(Path(out) / "full.json", {"logits": logits, "versions": versions})
    for job in jobs:
        name, share = job.rsplit(":", 1)
        attention = "eager" if name == NEEDS_WEIGHTS else "sdpa"
        if attention not in loaded:
            loaded[attention] = load(model, attention)
        told = attempt(loaded[attention], name, float(share), texts, recalls)
        write(Path(out) / f"{name}_{share}.json", told)
        print(job, flush=True)


def load(model: str, attention: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention).eval()


def write(path: Path, told: dict[str, Any]) -> None:
    draft = path.with_suffix(".part")
    draft.write_text(json.dumps(told))
    draft.replace(path)


def attempt(model: Any, name: str, share: float, texts: list[Any], recalls: list[Any]) -> dict[str, Any]:
    """The answers, or why there are none: a press that breaks at this budget is quoted."""
    try:
        press = getattr(kvpress, name)(compression_ratio=1 - share)
        started = time.perf_counter()
        told = answers(model, press if share < 1 else None, texts, recalls)
        told |= {"seconds": round(time.perf_counter() - started, 2), "parameters": parameters(press)}
        why = lost(name, told["parameters"], told["kept"]) if share < 1 else None
        return {"why_not": why} if why else told
    except (AssertionError, ValueError, RuntimeError, IndexError) as error:
        return {"why_not": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"}


def parameters(press: Any) -> dict[str, Any]:
    """The press's own settings, all at their defaults; the ratio is the job's."""
    found = {field.name: getattr(press, field.name) for field in fields(press)} if is_dataclass(press) else {}
    found.pop("compression_ratio", None)
    return {name: value for name, value in found.items() if isinstance(value, bool | int | float | str)}


def lost(name: str, settings: dict[str, Any], kept: list[int]) -> str | None:
    """What the press no longer does with `kept` tokens per layer: kvpress then goes on without a word."""
    if name == "PyramidKVPress" and len(set(kept)) == 1:
        return "no pyramid: kvpress falls back to SnapKV"
    for part in ("window_size", "n_sink"):
        if settings.get(part, 0) > min(kept):
            return f"{part} must be at most the {min(kept)} tokens kept, got {settings[part]}"
    return None


def answers(model: Any, press: Any, texts: list[Any], recalls: list[Any]) -> dict[str, Any]:
    prompt = compress(model, press, [text["prompt"] for text in texts])
    kept = [key.shape[2] for key, _ in prompt.layers]
    losses, greedy = follow(model, prompt, torch.tensor([text["truth"] for text in texts]))
    prompt = compress(model, press, [recall["prompt"] for recall in recalls])
    return {"losses": losses, "greedy": greedy, "right": ask(model, prompt, recalls), "kept": kept}


class Prompt:
    """Compressed caches of prompts of one length, as a batch: keys and values per layer, and the last logits [B, V]."""

    def __init__(self, layers: list[tuple[torch.Tensor, torch.Tensor]], logits: torch.Tensor, length: int) -> None:
        self.layers, self.logits, self.length = layers, logits, length

    def decoder(self, model: Any) -> Any:
        """A fresh copy of the cache behind a function: tokens [B] -> logits [B, V] of what follows them."""
        cache = DynamicCache()
        for number, (key, value) in enumerate(self.layers):
            cache.update(key.clone(), value.clone(), number)
        position = self.length

        def decode(tokens: torch.Tensor) -> torch.Tensor:
            nonlocal position
            at = torch.full((len(tokens), 1), position)
            position += 1
            return model(tokens[:, None], past_key_values=cache, position_ids=at, use_cache=True).logits[:, -1]

        return decode


def compress(model: Any, press: Any, prompts: list[list[int]]) -> Prompt:
    """Prefill of every prompt alone, under the press."""
    caches, logits = [], []
    for ids in prompts:
        cache = DynamicCache()
        with press(model) if press is not None else nullcontext():
            logits.append(
                model(torch.tensor([ids]), past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            )
        caches.append([(layer.keys, layer.values) for layer in cache.layers])
    layers = [tuple(torch.cat(parts) for parts in zip(*layer, strict=True)) for layer in zip(*caches, strict=True)]
    return Prompt(layers, torch.cat(logits), len(prompts[0]))


def follow(model: Any, prompt: Prompt, truth: torch.Tensor) -> tuple[list[float], list[list[int]]]:
    """Mean loss of the truth [B, T], nats per token; and what is written greedily instead."""
    decode, logits, nats = prompt.decoder(model), prompt.logits, torch.zeros(len(truth))
    for tokens in truth.T:
        nats += functional.cross_entropy(logits, tokens, reduction="none")
        logits = decode(tokens)
    decode, logits, written = prompt.decoder(model), prompt.logits, []
    for _ in range(truth.shape[1]):
        written.append(logits.argmax(-1))
        logits = decode(written[-1])
    return (nats / truth.shape[1]).tolist(), torch.stack(written, 1).tolist()


def ask(model: Any, prompt: Prompt, recalls: list[Any]) -> list[list[bool]]:
    """[recalls][questions]: whether both answer tokens are the most likely ones."""
    right = []
    for questions in zip(*(recall["questions"] for recall in recalls), strict=True):
        decode = prompt.decoder(model)
        for tokens in torch.tensor([question["ids"] for question in questions]).T:
            logits = decode(tokens)
        first, second = torch.tensor([question["answer"] for question in questions]).T
        right.append((logits.argmax(-1) == first) & (decode(first).argmax(-1) == second))
    return torch.stack(right, 1).tolist()


if __name__ == "__main__":
    main(*sys.argv[1:])
