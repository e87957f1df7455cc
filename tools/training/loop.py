"""The training loop, and the checkpoint it can go on from."""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer
from transformers import PreTrainedModel

from training.curriculum import PHASES, Batch, Curriculum, Forms, draw_batch
from training.stream import Stream
from training.tasks import ANSWER, CODE, COPIED

_WARM_UP = 100  # steps
_DECAY_SHARE = 0.25  # of the steps, at the end
_MIN_RATE = 0.03  # of the full learning rate
_CURVE_EVERY = 50  # steps
_CLIP = 1.0


@dataclass(frozen=True)
class Plan:
    family: str
    seed: int
    steps: int
    lr: float


@dataclass
class Progress:
    """What has been done so far; its plain values are part of a checkpoint."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    extended: list[list[int]] = field(default_factory=list)  # [step, steps planned until then] of each longer plan


class Trainer:
    """Runs a Plan step by step; every step's batch depends only on the seed and the step's number."""

    def __init__(self, model: PreTrainedModel, optimizers: list[Optimizer], plan: Plan) -> None:
        self.model, self.optimizers, self.plan = model, optimizers, plan
        self.progress, self.curriculum = Progress(), Curriculum()

    def step(self, forms: Forms, source: Stream, console: Console) -> None:
        begun, progress = time.perf_counter(), self.progress
        rng = np.random.default_rng([self.plan.seed, progress.step])
        length = self.curriculum.length(progress.step)
        batch = draw_batch(rng, forms, source, PHASES[self.curriculum.phase], length)
        self._set_rates()
        losses = self._update(batch)
        progress.step += 1
        progress.tokens += batch.tokens
        progress.seconds += time.perf_counter() - begun
        if progress.step % _CURVE_EVERY == 0:
            row = {"step": progress.step, "tokens": progress.tokens, "seconds": round(progress.seconds, 1)}
            progress.curve.append(row | {"length": length} | {name: round(x, 4) for name, x in losses.items()})
        if self.curriculum.observe(losses.get("answer_loss"), progress.step, self.plan.steps):
            lengths = PHASES[self.curriculum.phase].lengths
            console.print(f"step {progress.step}, {progress.seconds:.0f} s: sequences of {lengths} tokens from here on")

    def save(self, path: Path) -> None:
        """Writes beside the target first: an interrupt leaves the last good checkpoint."""
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        torch.save(
            {
                "plan": asdict(self.plan),
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "progress": asdict(self.progress),
                "curriculum": self.curriculum.state_dict(),
            },
            draft,
        )
        draft.replace(path)

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint of the same plan, or of one of fewer steps; ValueError for another plan's."""
        saved: dict[str, Any] = torch.load(path, weights_only=True)
        plan = Plan(**saved["plan"])
        if replace(plan, steps=self.plan.steps) != self.plan or plan.steps > self.plan.steps:
            raise ValueError(f"the checkpoint's plan must be {asdict(self.plan)} or shorter, got {asdict(plan)}")
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.progress, self.curriculum = Progress(**saved["progress"]), Curriculum(**saved["curriculum"])
        if plan.steps < self.plan.steps:
            self.progress.extended.append([self.progress.step, plan.steps])

    def _set_rates(self) -> None:
        left = (1 - self.progress.step / self.plan.steps) / _DECAY_SHARE
        share = min(1.0, (self.progress.step + 1) / _WARM_UP, max(_MIN_RATE, left))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.plan.lr * share

    def _update(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on the sum of the mean losses of each kind of token, in nats per token."""
        hidden = self.model.base_model(batch.ids[:, :-1], use_cache=False).last_hidden_state
        kinds = {"code_loss": CODE, "answer_loss": ANSWER, "copy_loss": COPIED}
        losses = {
            name: self._mean_loss(hidden, batch, chosen)
            for name, kind in kinds.items()
            if (chosen := batch.kind[:, 1:] == kind).any()
        }
        torch.autograd.backward(list(losses.values()))
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return {name: loss.item() for name, loss in losses.items()}

    def _mean_loss(self, hidden: Tensor, batch: Batch, chosen: Tensor) -> Tensor:
        """hidden: [B, T, D]; chosen: bool [B, T], the targets that count."""
        return functional.cross_entropy(self.model.get_output_embeddings()(hidden[chosen]), batch.ids[:, 1:][chosen])
