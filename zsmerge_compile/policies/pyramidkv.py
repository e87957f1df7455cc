"""PyramidKV: SnapKV's choice with more slots in the first layers than in the last.

    least = (budget - window) // beta;  most = 2 (budget - window) - least;  step = (most - least) // (L - 1)
    slots of layer l = most - l * step + window

Source: Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", and its code.

Ours: in the code `most` also depends on the length of the prompt, which a static cache cannot know; give `length` to
cap it as the code would for a prompt of that length (most = length - window, least = 2 (budget - window) - most).
"""

from __future__ import annotations

from zsmerge_compile.errors import ConfigError, must
from zsmerge_compile.policies.snapkv import SnapKVPolicy
from zsmerge_compile.policies.zsmerge import evicting_config


class PyramidKVPolicy(SnapKVPolicy):
    """budget (slots, the mean over layers but for the formula's floors, which add some), window (8), kernel (7),
    pooling ("max"), beta (20), length (None).

    The defaults are those of the published runs.
    """

    name = "pyramidkv"
    keeps = "as snapkv, with more slots in early layers"

    def budgets(self, num_layers: int) -> tuple[int, ...]:
        told = self.describe()
        window, length = told["window"], told["length"]
        spread = told["budget"] - window
        least = spread // told["beta"]
        most = 2 * spread - least
        if length is not None and most >= length - window:
            most = length - window
            least = 2 * spread - most
        if num_layers == 1:
            return (told["budget"],)
        step = (most - least) // (num_layers - 1)
        return tuple(most - layer * step + window for layer in range(num_layers))


def make(
    budget: int,
    window: int = 8,
    kernel: int = 7,
    pooling: str = "max",
    beta: int = 20,
    length: int | None = None,
) -> PyramidKVPolicy:
    """Raises ConfigError."""
    config = evicting_config(budget, window, "window")
    if not isinstance(config.budget, int):
        raise ConfigError(must("budget of pyramidkv", "one count, which the formula spreads", repr(budget)))
    for name, value, least in (("beta", beta, 1), ("length", length, config.budget)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ConfigError(must(name, f"a count of at least {least}", repr(value)))
    return PyramidKVPolicy(config, window=window, kernel=kernel, pooling=pooling, beta=beta, length=length)
