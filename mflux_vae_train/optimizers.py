"""AdamW as torch computes it, and Muon for matrices and convolutions beside it.

Learning rates are arrays in the optimizer's state, set for each update by the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

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


class Muon(optim.Optimizer):
    """Muon (kellerjordan.github.io/posts/muon): momentum, orthogonalized by Newton-Schulz iterations.

    Differs from mlx's own in three points: weight decay is decoupled; a convolution (O, kH, kW, I) counts as
    a matrix (O, kH kW I) in the factor sqrt(max(1, rows / columns)) too; the iteration runs in float32.

    Args:
        rate_scale: the learning rate is multiplied by it; a schedule shared with AdamW can serve both.
    """

    def __init__(
        self,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        rate_scale: float = 1.0,
        learning_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.momentum, self.weight_decay, self.steps, self.rate_scale = (
            momentum,
            weight_decay,
            steps,
            rate_scale,
        )

    def init_single(self, parameter: mx.array, state: dict[str, Any]) -> None:
        state["v"] = mx.zeros(parameter.shape, mx.float32)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        if gradient.ndim < 2:
            raise ValueError(f"Muon is for matrices and convolutions; a parameter of shape {gradient.shape} is AdamW's")
        rate = self.learning_rate.astype(mx.float32) * self.rate_scale
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


def muon_with_adamw(muon: Muon, adamw: AdamW, adamw_patterns: Sequence[str] = ()) -> optim.MultiOptimizer:
    """Muon for matrices and convolutions, AdamW for vectors and for what `adamw_patterns` names.

    Args:
        adamw_patterns: fnmatch patterns over parameter paths: embeddings, and the first and last layer.
    """

    def is_muon(path: str, parameter: mx.array) -> bool:
        return parameter.ndim >= 2 and not any(fnmatchcase(path, pattern) for pattern in adamw_patterns)

    return optim.MultiOptimizer([muon, adamw], [is_muon])


def _one_minus_power(beta: float, n: mx.array) -> mx.array:
    return -mx.expm1(n * math.log(beta)) if beta > 0 else mx.array(1.0)
