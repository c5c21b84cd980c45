"""Muon for matrices, AdamW for the rest, each at its own rate (Jordan et al. 2024; Loshchilov and Hutter 2019)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.optimizers as optim

Filter = Callable[[str, mx.array], bool]


class Grouped(optim.MultiOptimizer):
    """Several optimizers behind one learning rate, which is a factor on each one's own.

    Args:
        groups: (optimizer, its peak rate, which parameters); the last one takes what is left.
    """

    def __init__(self, groups: Sequence[tuple[optim.Optimizer, float, Filter | None]]):
        super().__init__([optimizer for optimizer, _, _ in groups], [f for _, _, f in groups[:-1]])
        self._rates = [rate for _, rate, _ in groups]

    @property
    def learning_rate(self) -> mx.array:
        return self.optimizers[0].learning_rate / self._rates[0]

    @learning_rate.setter
    def learning_rate(self, factor: float) -> None:
        for optimizer, rate in zip(self.optimizers, self._rates, strict=True):
            optimizer.learning_rate = factor * rate


def muon() -> optim.Optimizer:
    return optim.Muon(learning_rate=0.0, momentum=0.95, weight_decay=0.0)


def adamw() -> optim.Optimizer:
    return optim.AdamW(learning_rate=0.0, betas=[0.9, 0.99], weight_decay=0.0, bias_correction=True)
