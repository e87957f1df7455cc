"""What one method says about the material at one budget. Plain lists, so that another process can hand them over."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Answers:
    """losses [texts]: mean nats per token of the truth; greedy [texts, TRUTH]: what is written instead of it;
    right [recalls, questions]: whether both answer tokens were the most likely ones; seconds: for all of it."""

    losses: list[float]
    greedy: list[list[int]]
    right: list[list[bool]]
    seconds: float

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Answers:
        return cls(**json.loads(path.read_text()))
