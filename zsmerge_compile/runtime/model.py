"""The compiled model: a given model's two graphs, lowered, over a cache that never grows."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from typing import Any

from torch import nn

from zsmerge_compile.lower.lowered import Lowered
from zsmerge_compile.program import Program
from zsmerge_compile.runtime.graphs import Recorder, recorder_for
from zsmerge_compile.runtime.report import Report
from zsmerge_compile.runtime.runner import Runner


class CompiledModel(Runner):
    """What `zsmerge_compile.compile` returns.

    model   the given model, unchanged; its parameters are the ones that run
    config  the given model's transformers config; generation_config: a copy of its own, free to change
    cache   `Cache`: layers, seen_tokens, nbytes, save and load
    report  `Report`: sites, rewrites per pass, bytes, compile seconds, kernels
    """

    def __init__(
        self,
        model: nn.Module,
        program: Program,
        lowered: Lowered,
        report: Report,
        chunk: int | None,
        check_nan: bool,
        record: Recorder | None = None,
    ) -> None:
        """record: how the decode step is recorded; None: as a CUDA graph on a GPU, elsewhere not at all."""
        started = time.perf_counter()
        self.model: Any = model
        self.program = program
        super().__init__(
            program.interface(),
            lowered.prefill,
            lowered.decode,
            chunk=chunk,
            check_nan=check_nan,
            record=record or recorder_for(program.device, report.backend),
            config=getattr(model, "config", None),
            generation_config=copy.deepcopy(getattr(model, "generation_config", None)),
        )
        kernels, seconds = report.kernels | {"step": self._step.how}, time.perf_counter() - started
        self.report = replace(report, kernels=kernels, compile_seconds=report.compile_seconds + seconds)
