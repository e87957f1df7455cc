"""PyramidKV: SnapKV's choice with more slots in the first layers than in the last.

    least = (budget - window) // beta;  most = 2 (budget - window) - least;  step = (most - least) // (L - 1)
    slots of layer l = most - l * step + window

Source: Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", and its code.

Ours: in the code the pyramid also depends on the length of the prompt, which a static cache cannot know; give `length`
for what it does with a prompt of that length: `budget` in every layer where length < 2 (budget - window), and else
most <= length - window (then least = 2 (budget - window) - most). A list of budgets is taken as it is.
"""

from __future__ import annotations

from typing import Any

from zsmerge_compile.config import SMALLEST
from zsmerge_compile.errors import ConfigError, must
from zsmerge_compile.policies.snapkv import SnapKVPolicy, check_window
from zsmerge_compile.policies.zsmerge import evicting_config


class PyramidKVPolicy(SnapKVPolicy):
    """budget (slots, the mean over layers but for the formula's floors, which add up to one slot per layer and step:
    much where budgets are few and layers many), window (8), kernel (7), pooling ("max"), beta (20), length (None).

    The defaults are those of the published runs.
    """

    name = "pyramidkv"
    keeps = "as snapkv, with more slots in early layers"

    def budgets(self, num_layers: int) -> tuple[int, ...]:
        told = self.describe()
        budget, window, length = told["budget"], told["window"], told["length"]
        if isinstance(budget, tuple):
            return super().budgets(num_layers)
        spread = budget - window
        if num_layers == 1 or (length is not None and length < 2 * spread):
            return (budget,) * num_layers
        least = spread // told["beta"]
        most = 2 * spread - least
        if length is not None and most >= length - window:
            most = length - window
            least = 2 * spread - most
        step = (most - least) // (num_layers - 1)
        found = tuple(most - layer * step + window for layer in range(num_layers))
        if min(found) < SMALLEST:
            got = f"{min(found)} from budget {budget}"
            raise ConfigError(must("slots of the last layer", f"at least {SMALLEST}", got, "a larger budget or window"))
        return found


def make(
    budget: Any,
    window: int = 8,
    kernel: int = 7,
    pooling: str = "max",
    beta: int = 20,
    length: int | None = None,
) -> PyramidKVPolicy:
    """Raises ConfigError."""
    check_window(window)
    config = evicting_config(budget, window, "window")
    most = config.budget if isinstance(config.budget, int) else max(config.budget)
    for name, value, least in (("beta", beta, 1), *([] if length is None else [("length", length, most)])):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(must(name, f"a count of at least {least}", repr(value)))
    return PyramidKVPolicy(config, window=window, kernel=kernel, pooling=pooling, beta=beta, length=length)
