"""Parameter groups with separate optimizers and one learning rate schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map_with_path

Filter: TypeAlias = Callable[[str, mx.array], bool]


class Grouped(optim.MultiOptimizer):
    """Several optimizers with one learning rate, a factor on the peak rate of each.

    Args:
        groups: (optimizer, its peak rate, filter of its parameters); the last group takes the remaining parameters.
    """

    def __init__(self, groups: Sequence[tuple[optim.Optimizer, float, Filter | None]]):
        super().__init__([optimizer for optimizer, _, _ in groups], [f for _, _, f in groups[:-1]])
        self._rates = [rate for _, rate, _ in groups]

    @property
    def learning_rate(self) -> mx.array:
        return self.optimizers[0].learning_rate / self._rates[0]

    @learning_rate.setter
    def learning_rate(self, factor: float | mx.array) -> None:
        for optimizer, rate in zip(self.optimizers, self._rates, strict=True):
            optimizer.learning_rate = factor * rate

    def state_bytes(self, parameter: mx.array) -> int:
        """Bytes of state for such a parameter, see `Optimizer.state_bytes`."""
        fits = (accepts is None or accepts("", parameter) for accepts in [*self.filters[: len(self._rates) - 1], None])
        optimizer = next(one for one, fit in zip(self.optimizers, fits, strict=True) if fit)
        size: int = optimizer.state_bytes(parameter)
        return size

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """The updated parameters in a tree of the same structure; MLX omits branches without parameters."""
        updated: dict[str, mx.array] = dict(tree_flatten(super().apply_gradients(gradients, parameters)))
        return tree_map_with_path(lambda path, _: updated[path], parameters)
