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

    The warm-up of d, that of TensorFlow's ExponentialMovingAverage with `num_updates`, forgets the initial parameters
    quickly. Averages are float32.

    Args:
        parameters: tree of initial arrays.
        decay: in [0, 1).
    """

    def __init__(self, parameters: Any, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; expected a number in [0, 1)")
        self.decay = decay
        # adding 0 copies the array: the average must not share it with the parameters
        self.state: dict[str, Any] = {
            "updates": mx.array(0.0),
            "average": tree_map(lambda x: mx.contiguous(x.astype(mx.float32)) + 0.0, parameters),
        }
        mx.eval(self.state)

    def update(self, parameters: Any) -> None:
        """Average in the parameters after an update. Lazy: may run in a compiled function that captures `state`."""
        n = self.state["updates"]
        keep = mx.minimum(self.decay, (1 + n) / (10 + n))
        self.state["average"] = tree_map(
            lambda a, p: a + (1 - keep) * (p.astype(mx.float32) - a), self.state["average"], parameters
        )
        self.state["updates"] = n + 1

    @contextmanager
    def swapped_in(self, module: nn.Module) -> Iterator[None]:
        """Within the block the module has the averages as parameters, in its dtype."""
        parameters = module.trainable_parameters()
        module.update(tree_map(lambda p, a: a.astype(p.dtype), parameters, self.state["average"]))
        try:
            yield
        finally:
            module.update(parameters)
