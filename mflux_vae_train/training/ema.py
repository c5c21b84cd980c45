"""Exponential moving average of trainable parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map


class EMA:
    """average <- d average + (1 - d) parameters, with d = min(decay, (1 + n) / (10 + n)) at update n (0-based).

    The warm-up of d (as in TensorFlow's ExponentialMovingAverage with `num_updates`) forgets the initial
    parameters quickly. Averages are kept in float32.

    Args:
        parameters: tree of arrays to start from.
        decay: in [0, 1).
    """

    def __init__(self, parameters: Any, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; at least 0 and below 1 is allowed")
        self.decay = decay
        # (x + 0) makes a copy: the average must not follow the parameters' own arrays
        self.state: dict[str, Any] = {
            "updates": mx.array(0.0),
            "average": tree_map(lambda x: mx.contiguous(x.astype(mx.float32)) + 0.0, parameters),
        }
        mx.eval(self.state)

    def update(self, parameters: Any) -> None:
        """Take in the parameters after an update. Lazy: may run inside a compiled function that captures `state`."""
        n = self.state["updates"]
        keep = mx.minimum(self.decay, (1 + n) / (10 + n))
        self.state["average"] = tree_map(
            lambda a, p: a + (1 - keep) * (p.astype(mx.float32) - a), self.state["average"], parameters
        )
        self.state["updates"] = n + 1

    @contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[None]:
        """Within the block the module computes with the averages, in its own dtype."""
        own = module.trainable_parameters()
        module.update(tree_map(lambda p, a: a.astype(p.dtype), own, self.state["average"]))
        try:
            yield
        finally:
            module.update(own)
