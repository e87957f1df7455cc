"""Which batches come when: recall is learnt at short lengths first, and length grows as the answers become right."""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.stream import Stream
from training.tasks import FactFormat, Sample, code_with_facts, copied_code, fact_list, pairs

TOKENS_PER_STEP = 1_024  # progress is limited by steps, not by tokens: small batches
MIN_SEQUENCES = 2
_GATE = 0.5  # nats per answer token, below which the next phase starts
_MIN_STEPS = 60
_SMOOTHING = 1 / 15
_START_LOSS = 9.0  # above any real answer loss


class Phase(NamedTuple):
    deadline: float  # share of all steps after which the next phase starts in any case
    lengths: tuple[int, ...]  # tokens, taken in turn
    code: float  # shares of the batch
    fact_list: float
    pairs: float
    copied: float
    long_keys: float  # share of the samples with facts whose keys are two tokens


CONTEXT = 2_560  # tokens, the longest sequences: past Mistral's window
PHASES = (
    Phase(0.20, (32,), 0.0, 0.3, 0.7, 0.0, 0.0),
    Phase(0.30, (64,), 0.0, 0.5, 0.5, 0.0, 0.3),
    Phase(0.40, (128,), 0.45, 0.3, 0.2, 0.05, 0.5),
    Phase(0.50, (256,), 0.65, 0.2, 0.1, 0.05, 0.5),
    Phase(0.60, (512,), 0.75, 0.2, 0.0, 0.05, 0.5),
    Phase(0.70, (1024, 512), 0.8, 0.15, 0.0, 0.05, 0.5),
    Phase(1.00, (CONTEXT, 1024, 512), 0.8, 0.15, 0.0, 0.05, 0.5),
)


class Batch(NamedTuple):
    ids: Tensor  # [B, T+1]
    kind: Tensor  # [B, T+1]

    @property
    def tokens(self) -> int:
        return self.ids[:, 1:].numel()


@dataclass
class Curriculum:
    """Where training stands; a plain dictionary of it is part of a checkpoint."""

    phase: int = 0
    started: int = 0  # step at which the phase began
    answer_loss: float = _START_LOSS  # moving average, nats

    def state_dict(self) -> dict[str, float]:
        return asdict(self)

    def length(self, step: int) -> int:
        lengths = PHASES[self.phase].lengths
        return lengths[step % len(lengths)]

    def observe(self, answer_loss: float | None, step: int, steps: int) -> bool:
        """Takes in one step's answer loss (None: it had no answers); True when the next phase begins."""
        if answer_loss is not None:
            self.answer_loss += _SMOOTHING * (answer_loss - self.answer_loss)
        due = self.answer_loss < _GATE or step / steps > PHASES[self.phase].deadline
        if self.phase == len(PHASES) - 1 or step - self.started < _MIN_STEPS or not due:
            return False
        self.phase, self.started, self.answer_loss = self.phase + 1, step, _START_LOSS
        return True


class Forms(NamedTuple):
    """Facts whose keys are one token, and two."""

    short: FactFormat
    long: FactFormat


def draw_batch(rng: np.random.Generator, forms: Forms, source: Stream, phase: Phase, length: int) -> Batch:
    """Sequences of length + 1 tokens (inputs and targets), each of a task drawn by the phase's shares."""
    samples = []
    for _ in range(max(MIN_SEQUENCES, TOKENS_PER_STEP // length)):
        task = rng.choice(4, p=[phase.code, phase.fact_list, phase.pairs, phase.copied])
        form = forms.long if rng.random() < phase.long_keys else forms.short
        samples.append(_draw_sample(rng, form, source, int(task), length + 1))
    ids, kind = (torch.from_numpy(np.stack(parts)) for parts in zip(*samples, strict=True))
    return Batch(ids, kind)


def _draw_sample(rng: np.random.Generator, form: FactFormat, source: Stream, task: int, length: int) -> Sample:
    if task == 0:
        return code_with_facts(rng, form, source, length)
    if task == 3:
        return copied_code(rng, source, length)
    return (fact_list if task == 1 else pairs)(rng, form, length)
