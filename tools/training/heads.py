"""Multi-query attention at full speed: on a CPU, the fast kernel of SDPA wants as many key/value as query heads.

Falcon's model code leaves one head to broadcasting, and the kernel that takes it writes out every T x T matrix.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.nn import functional


@contextmanager
def whole_heads() -> Iterator[None]:
    """Within it, `scaled_dot_product_attention` sees key and value expanded (not copied) to the query's heads."""
    plain = functional.scaled_dot_product_attention

    def expanded(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        heads = (-1, query.shape[1], -1, -1)
        if key.shape[1] == 1:
            key, value = key.expand(heads), value.expand(heads)
        return plain(query, key, value, *args, **kwargs)

    functional.scaled_dot_product_attention = expanded
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = plain
