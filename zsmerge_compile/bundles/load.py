"""From a bundle to a runner: no model code, no pickle, nothing outside the folder."""

from __future__ import annotations

import json
import os
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from zsmerge_compile.bundles import manifest as manifests
from zsmerge_compile.bundles.export import FORMATS
from zsmerge_compile.bundles.manifest import WEIGHTS, Manifest
from zsmerge_compile.errors import BundleError, InputError, must
from zsmerge_compile.runtime.runner import Runner


class BundleRunner(Runner):
    """What `zsmerge_compile.load` returns: prefill, decode, reset and generate of the model that was exported.

    manifest   `Manifest`: what the bundle says of itself
    tokenizer  folder with the tokenizer's files, or None
    """

    manifest: Manifest
    tokenizer: Path | None


def load(path: str | os.PathLike[str]) -> BundleRunner:
    """The bundle in the folder `path`, checked file by file (SHA-256). Raises BundleError, InputError."""
    folder = Path(path)
    manifest = manifests.read(folder)
    if manifest.format not in FORMATS:
        raise BundleError(must("bundle's format", f"one of {', '.join(FORMATS)}", repr(manifest.format)))
    _check_torch(manifest)
    if manifest.format == "tensorrt":
        import_module("zsmerge_compile.bundles.tensorrt").check_here()
    device = _device(manifest)
    interface = manifest.interface(device)
    specs = (spec for layer in interface.state for spec in layer.values())
    empty = [torch.empty(spec.shape, dtype=spec.dtype, device="meta") for spec in specs]
    state = list(zip(interface.state_names, empty, strict=True))
    weights = _weights(folder, manifest, device)
    kind = import_module(f"zsmerge_compile.bundles.{manifest.format}")
    graphs = {}
    for name, program in manifest.programs.items():
        if hasattr(kind, "read_step") and name == "decode":
            graphs[name] = kind.read_step(folder, program["file"], interface, manifest.files)
        else:
            chosen = _chosen(weights, program["weights"])
            graphs[name] = kind.read(folder / program["file"], program["inputs"], state, chosen)
    config, generation_config = _configs(folder, manifest)
    runner = BundleRunner(
        interface,
        graphs["prefill"],
        graphs["decode"],
        chunk=manifest.chunk,
        config=config,
        generation_config=generation_config,
    )
    runner.manifest = manifest
    runner.tokenizer = folder / "tokenizer" if any(name.startswith("tokenizer/") for name in manifest.files) else None
    return runner


def _check_torch(manifest: Manifest) -> None:
    """Machine code needs the PyTorch it was written with; a program one that is not older. Raises BundleError."""
    written, here = str(manifest.versions.get("torch")), torch.__version__
    numbers = [_numbers(text) for text in (written, here)]
    if not numbers[0]:
        raise BundleError(must("manifest's version of torch", "a version", repr(written)))
    if manifest.format in ("aoti", "tensorrt") and written != here:
        expected = f"{written}, with which this {manifest.format} bundle was written"
        raise BundleError(must("torch", expected, here, "export it again"))
    if manifest.format == "pt2" and numbers[0] > numbers[1]:
        raise BundleError(must("torch", f"at least {written}, with which this bundle was written", here))


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 13) of "2.13.0+cpu"; () of what is no version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return tuple(int(part) for part in found.groups()) if found else ()


def _device(manifest: Manifest) -> torch.device:
    name = manifest.cache.get("device")
    if name not in ("cpu", "cuda"):
        raise BundleError(must("bundle's device", "cpu or cuda", repr(name)))
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError(must("this machine", "one with a CUDA device, as the bundle was written on", "none"))
    return torch.device(name)


def _weights(folder: Path, manifest: Manifest, device: torch.device) -> dict[str, Tensor]:
    if WEIGHTS not in manifest.files:
        raise BundleError(must("manifest's files", f"with {WEIGHTS}", "without"))
    try:
        return load_file(folder / WEIGHTS, device=str(device))
    except (SafetensorError, ValueError, KeyError) as error:
        raise BundleError(must(WEIGHTS, "a safetensors file", f"{type(error).__name__}: {error}")) from error


def _chosen(weights: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    missing = [name for name in names if name not in weights]
    if missing:
        raise BundleError(must(WEIGHTS, "complete", f"none named {missing[0]!r}"))
    return {name: weights[name] for name in names}


def _configs(folder: Path, manifest: Manifest) -> tuple[Any, Any]:
    """transformers' base classes with the exported model's values: no class of a model is looked up."""
    if "generation_config.json" not in manifest.files:
        return None, None
    from transformers import GenerationConfig, PreTrainedConfig

    try:
        told = [json.loads((folder / f"{name}.json").read_text()) for name in ("config", "generation_config")]
        return PreTrainedConfig(**told[0]), GenerationConfig(**told[1])
    except (ValueError, TypeError, OSError, AttributeError, KeyError) as error:
        raise BundleError(
            must("the bundle's configs", "transformers' own", f"{type(error).__name__}: {error}")
        ) from error
