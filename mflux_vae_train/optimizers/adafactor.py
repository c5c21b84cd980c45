"""Adafactor: second moments of a matrix factored into rows and columns (Shazeer and Stern 2018, arXiv:1804.04235)."""

from __future__ import annotations

import mlx.core as mx

from mflux_vae_train.optimizers.base import Optimizer, State

_TINY = 1e-30
"""Epsilon 1 of the paper, added to squared gradients."""


class Adafactor(Optimizer):
    """Algorithm 4 of the paper without momentum: clips the RMS of each update; beta2 is 1 - n^decay at update n.

    The learning rate is absolute, as with `relative_step=False, scale_parameter=False` in transformers: relative rates
    would be almost zero for an adapter, which is initialized to zero. A convolution (O, kH, kW, I) counts as a matrix
    (O, kH kW I). State: one row and one column for a matrix, one value per element for a vector.
    """

    def __init__(
        self,
        *,
        decay: float = -0.8,
        clip: float = 1.0,
        weight_decay: float = 0.0,
        learning_rate: float = 0.0,
    ) -> None:
        super().__init__(learning_rate)
        self.decay, self.clip, self.weight_decay = decay, clip, weight_decay

    def init_state(self, weights: mx.array, state: State) -> None:
        if weights.ndim > 1:
            state["rows"] = mx.zeros((weights.shape[0], 1))
            state["columns"] = mx.zeros((1, weights.size // weights.shape[0]))
        else:
            state["v"] = mx.zeros_like(weights)

    def step_single(self, gradient: mx.array, weights: mx.array, state: State) -> mx.array:
        weight = self.step.astype(mx.float32) ** self.decay  # 1 - beta2: 1 at the first update
        g = gradient.reshape(gradient.shape[0], -1) if gradient.ndim > 1 else gradient
        squares = mx.square(g) + _TINY
        if g.ndim > 1:
            rows = state["rows"] + weight * (squares.mean(axis=1, keepdims=True) - state["rows"])
            columns = state["columns"] + weight * (squares.mean(axis=0, keepdims=True) - state["columns"])
            state["rows"], state["columns"] = rows, columns
            # a product of two roots: the product of the means would leave the range of float32
            direction = g * mx.rsqrt(rows / rows.mean()) * mx.rsqrt(columns)
        else:
            state["v"] = state["v"] + weight * (squares - state["v"])
            direction = g * mx.rsqrt(state["v"])
        rms = mx.sqrt(mx.mean(mx.square(direction)))
        step = self.learning_rate * direction / mx.maximum(1.0, rms / self.clip)
        return weights * (1 - self.learning_rate * self.weight_decay) - step.reshape(weights.shape)
