"""Muon in fp32: momentum whose matrices are orthogonalised before they become the update.

Source: https://kellerjordan.github.io/posts/muon/. torch.optim.Muon iterates in bf16, matrix by matrix, which is
slow on a CPU; here the matrices of one shape are stacked and iterated together.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import Parameter

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Newton-Schulz: [n, rows, columns] to matrices whose singular values are near 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if tall else x
    return result


class Muon(torch.optim.Optimizer):
    """For matrices only; the update's root mean square is that of AdamW (0.2 * learning rate)."""

    def __init__(self, matrices: Iterable[Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Parameter]] = {}
            for parameter in group["params"]:
                by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, parameters: list[Parameter], lr: float, momentum: float, weight_decay: float) -> None:
        gradients = torch.stack([p.grad for p in parameters if p.grad is not None])
        averages = torch.stack([self._average(p) for p in parameters]).lerp_(gradients, 1 - momentum)
        updates = orthogonalise(gradients.lerp(averages, momentum))
        scale = 0.2 * max(parameters[0].shape) ** 0.5
        for parameter, average, update in zip(parameters, averages, updates, strict=True):
            self.state[parameter]["average"].copy_(average)
            parameter.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * scale)

    def _average(self, parameter: Parameter) -> Tensor:
        state = self.state[parameter]
        if "average" not in state:
            state["average"] = torch.zeros_like(parameter)
        average: Tensor = state["average"]
        return average
