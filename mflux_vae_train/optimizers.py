"""AdamW and Adam as torch computes them, Muon for matrices and convolutions, and groups of both behind one schedule.

Learning rates are arrays in the optimizer's state, set for each update by the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.optimizers as optim

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class AdamW(optim.AdamW):
    """AdamW (arXiv:1711.05101) with bias correction, step for step torch.optim.AdamW.

    mlx's own corrects the bias only on request, and loses four digits of 1 - beta2^n at the first updates,
    where it is a difference of float32 numbers near 1; expm1 keeps them.
    """

    def __init__(
        self,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 1e-4,
        learning_rate: float = 0.0,
    ) -> None:
        super().__init__(
            learning_rate, betas=[beta1, beta2], eps=epsilon, weight_decay=weight_decay, bias_correction=True
        )

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        rate = self.learning_rate.astype(mx.float32)
        n = self.step.astype(mx.float32)
        beta1, beta2 = self.betas
        g, w = gradient.astype(mx.float32), parameter.astype(mx.float32)
        m = beta1 * state["m"] + (1 - beta1) * g
        v = beta2 * state["v"] + (1 - beta2) * mx.square(g)
        state["m"], state["v"] = m, v
        m = m / _one_minus_power(beta1, n)
        v = v / _one_minus_power(beta2, n)
        w = w * (1 - rate * self.weight_decay) - rate * m / (mx.sqrt(v) + self.eps)
        return w.astype(parameter.dtype)

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        # Moments in float32 whatever the parameter's dtype: squares of small gradients vanish in half precision.
        state["m"] = mx.zeros(parameter.shape, mx.float32)
        state["v"] = mx.zeros(parameter.shape, mx.float32)


class Adam(AdamW):
    """Adam (arXiv:1412.6980), step for step torch.optim.Adam: weight decay is part of the gradient."""

    def __init__(self, *, weight_decay: float = 0.0, **settings: float) -> None:
        super().__init__(weight_decay=0.0, **settings)
        self.decay = weight_decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        return super().apply_single(gradient + self.decay * parameter, parameter, state)


class Muon(optim.Optimizer):
    """Muon (kellerjordan.github.io/posts/muon): momentum, orthogonalized by Newton-Schulz iterations.

    Differs from mlx's own in three points: weight decay is decoupled; a convolution (O, kH, kW, I) counts as
    a matrix (O, kH kW I) in the factor sqrt(max(1, rows / columns)) too; the iteration runs in float32.
    """

    def __init__(
        self,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        learning_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.momentum, self.weight_decay, self.steps = momentum, weight_decay, steps

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        state["v"] = mx.zeros(parameter.shape, mx.float32)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        if gradient.ndim < 2:
            raise ValueError(f"Muon is for matrices and convolutions; a parameter of shape {gradient.shape} is AdamW's")
        rate = self.learning_rate.astype(mx.float32)
        g = gradient.astype(mx.float32)
        v = self.momentum * state["v"] + (1 - self.momentum) * g
        state["v"] = v
        update = self.momentum * v + (1 - self.momentum) * g  # Nesterov
        matrix = update.reshape(update.shape[0], -1)
        rows, columns = matrix.shape
        update = orthogonalize(matrix, self.steps).reshape(update.shape) * math.sqrt(max(1.0, rows / columns))
        w = parameter.astype(mx.float32)
        return (w * (1 - rate * self.weight_decay) - rate * update).astype(parameter.dtype)


def orthogonalize(matrix: mx.array, steps: int = 5) -> mx.array:
    """(rows, columns) -> the nearest matrix with singular values near 1 (about 0.7 to 1.2 after five steps)."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (mx.sqrt(mx.sum(mx.square(x))) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x


Filter: TypeAlias = Callable[[str, mx.array], bool]


class Grouped(optim.MultiOptimizer):
    """Several optimizers behind one learning rate, which is a factor on each one's own peak rate.

    Args:
        groups: (optimizer, its peak rate, which parameters are its); the last one takes what is left.
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


def _one_minus_power(beta: float, n: mx.array) -> mx.array:
    return -mx.expm1(n * math.log(beta)) if beta > 0 else mx.array(1.0)
