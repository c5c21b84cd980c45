"""Adafactor: second moments of a matrix from its rows' and columns' (Shazeer and Stern 2018, arXiv:1804.04235)."""

from __future__ import annotations

import mlx.core as mx

from mflux_vae_train.optimizers.base import Optimizer, State

_TINY = 1e-30
"""Epsilon 1 of the paper: added to squares."""


class Adafactor(Optimizer):
    """Algorithm 4 of the paper, without momentum, with clipping of each update's RMS, beta2 at update n 1 - n^decay.

    The rate is the user's and the schedule's, as `relative_step=False, scale_parameter=False` have it elsewhere: an
    adapter that begins at zero would otherwise begin with rates of almost zero. A convolution (O, kH, kW, I) counts as
    a matrix (O, kH kW I). State: a row's and a column's worth of numbers for a matrix, all for a vector.
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

    def start(self, weights: mx.array, state: State) -> None:
        if weights.ndim > 1:
            state["rows"] = mx.zeros((weights.shape[0], 1))
            state["columns"] = mx.zeros((1, weights.size // weights.shape[0]))
        else:
            state["v"] = mx.zeros_like(weights)

    def updated(self, gradient: mx.array, weights: mx.array, state: State) -> mx.array:
        share = self.step.astype(mx.float32) ** self.decay  # 1 - beta2: all of it at the first update
        g = gradient.reshape(gradient.shape[0], -1) if gradient.ndim > 1 else gradient
        squares = mx.square(g) + _TINY
        if g.ndim > 1:
            rows = state["rows"] + share * (squares.mean(axis=1, keepdims=True) - state["rows"])
            columns = state["columns"] + share * (squares.mean(axis=0, keepdims=True) - state["columns"])
            state["rows"], state["columns"] = rows, columns
            # product of two roots: that of the means themselves would leave float32's range
            direction = g * mx.rsqrt(rows / rows.mean()) * mx.rsqrt(columns)
        else:
            state["v"] = state["v"] + share * (squares - state["v"])
            direction = g * mx.rsqrt(state["v"])
        rms = mx.sqrt(mx.mean(mx.square(direction)))
        step = self.learning_rate * direction / mx.maximum(1.0, rms / self.clip)
        return weights * (1 - self.learning_rate * self.weight_decay) - step.reshape(weights.shape)
