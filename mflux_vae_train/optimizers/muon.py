"""Muon for matrices and convolutions."""

from __future__ import annotations

import math

import mlx.core as mx

from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.optimizers.base import Optimizer, State
from mflux_vae_train.optimizers.grouped import Grouped

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration."""

ADAMW_RATE = 0.25
"""Learning rate of AdamW relative to Muon's."""


class Muon(Optimizer):
    """Muon (kellerjordan.github.io/posts/muon): momentum orthogonalized by Newton-Schulz iterations.

    Differences from MLX's Muon: weight decay is decoupled; a convolution (O, kH, kW, I) counts as a matrix
    (O, kH kW I) also in the factor sqrt(max(1, rows / columns)); the iteration runs in float32.
    """

    def __init__(
        self,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        learning_rate: float = 0.0,
    ) -> None:
        super().__init__(learning_rate)
        self.momentum, self.weight_decay, self.steps = momentum, weight_decay, steps

    def init_state(self, weights: mx.array, state: State) -> None:
        state["v"] = mx.zeros_like(weights)

    def step_single(self, gradient: mx.array, weights: mx.array, state: State) -> mx.array:
        if gradient.ndim < 2:
            raise ValueError(
                f"Muon takes matrices and convolutions, not shape {gradient.shape}; use AdamW for this parameter"
            )
        rate = self.learning_rate
        v = self.momentum * state["v"] + (1 - self.momentum) * gradient
        state["v"] = v
        update = self.momentum * v + (1 - self.momentum) * gradient  # Nesterov
        matrix = update.reshape(update.shape[0], -1)
        rows, columns = matrix.shape
        update = orthogonalize(matrix, self.steps).reshape(update.shape) * math.sqrt(max(1.0, rows / columns))
        return weights * (1 - rate * self.weight_decay) - rate * update


def muon_with_adamw(*, weight_decay: float = 0.0, **options: float) -> Grouped:
    """Muon for matrices and kernels, AdamW with `options` for all other parameters at `ADAMW_RATE` of the rate."""
    muon, adamw = Muon(weight_decay=weight_decay), AdamW(weight_decay=weight_decay, **options)
    return Grouped([(muon, 1.0, lambda _, weight: weight.ndim > 1), (adamw, ADAMW_RATE, None)])


def orthogonalize(matrix: mx.array, steps: int = 5) -> mx.array:
    """(rows, columns) -> matrix with the same singular vectors and singular values near 1 (0.7 to 1.2 for 5 steps)."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (mx.sqrt(mx.sum(mx.square(x))) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x
