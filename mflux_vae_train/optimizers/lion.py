"""Lion: sign of a momentum (Chen et al. 2023, arXiv:2302.06675, algorithm 2)."""

from __future__ import annotations

import mlx.core as mx

from mflux_vae_train.optimizers.base import Optimizer, State


class Lion(Optimizer):
    """c = beta1 m + (1 - beta1) g;  w <- w - rate (sign c + decay w);  m <- beta2 m + (1 - beta2) g.

    Every weight moves by the full rate: the authors use a tenth to a third of AdamW's. State: half of AdamW's.
    """

    def __init__(
        self, *, beta1: float = 0.9, beta2: float = 0.99, weight_decay: float = 0.0, learning_rate: float = 0.0
    ) -> None:
        super().__init__(learning_rate)
        self.beta1, self.beta2, self.weight_decay = beta1, beta2, weight_decay

    def init_state(self, weights: mx.array, state: State) -> None:
        state["m"] = mx.zeros_like(weights)

    def step_single(self, gradient: mx.array, weights: mx.array, state: State) -> mx.array:
        m, rate = state["m"], self.learning_rate
        direction = mx.sign(self.beta1 * m + (1 - self.beta1) * gradient)
        state["m"] = self.beta2 * m + (1 - self.beta2) * gradient
        return weights * (1 - rate * self.weight_decay) - rate * direction
