"""Prodigy: Adam that finds its own rate (Mishchenko and Defazio 2023, arXiv:2306.06101, algorithm 4).

d is a lower bound of the distance from the initial weights to the solution; it only grows. Updates are those of Adam at
the rate d times the learning rate, which should be 1 or a schedule from 1, as in the authors' package.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mflux_vae_train.optimizers.adam import one_minus_power
from mflux_vae_train.optimizers.base import Optimizer, State, master, store

_ESTIMATE = "estimate"


class Prodigy(Optimizer):
    """d is one number for all parameters, so each update depends on all gradients.

    Args:
        beta3: decay of the numerator and denominator of d; None means the square root of `beta2`.
        weight_decay: as in AdamW with `decouple`, otherwise part of the gradient.
        use_bias_correction: apply Adam's bias correction as a factor on the rate.
        safeguard_warmup: exclude the low rates of a warm-up from the denominator of d.
        d0: initial d.

    Attributes:
        distance: current d.
    """

    def __init__(
        self,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        beta3: float | None = None,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        decouple: bool = True,
        use_bias_correction: bool = False,
        safeguard_warmup: bool = False,
        d0: float = 1e-6,
        learning_rate: float = 1.0,
    ) -> None:
        super().__init__(learning_rate)
        self.beta1, self.beta2, self.beta3 = beta1, beta2, math.sqrt(beta2) if beta3 is None else beta3
        self.epsilon, self.weight_decay, self.decouple = epsilon, weight_decay, decouple
        self.use_bias_correction, self.safeguard_warmup, self.d0 = use_bias_correction, safeguard_warmup, d0
        self.state[_ESTIMATE] = {"d": mx.array(d0), "numerator": mx.array(0.0)}

    @property
    def distance(self) -> mx.array:
        d: mx.array = self.state[_ESTIMATE]["d"]
        return d

    def metrics(self) -> dict[str, float]:
        """The rate of Adam's step, for the metrics of an update."""
        return {"effective_rate": float(self.distance * self.learning_rate)}

    def init_state(self, weights: mx.array, state: State) -> None:
        for name in ("m", "v", "s"):
            state[name] = mx.zeros_like(weights)
        state["w0"] = weights

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        self.ensure_init(gradients, parameters)
        self.state["step"] = self.step + 1
        d, rate = self.distance, self.learning_rate
        if self.use_bias_correction:
            n = self.step.astype(mx.float32)
            rate = rate * mx.sqrt(one_minus_power(self.beta2, n)) / one_minus_power(self.beta1, n)
        rate = d * rate
        scale = d / self.d0  # keeps both sums in the range of float32
        weight = scale * (d if self.safeguard_warmup else rate)

        def accumulate(gradient: mx.array, parameter: mx.array, state: State) -> mx.array:
            g, w = gradient.astype(mx.float32), master(parameter, state)
            if not self.decouple:
                g = g + self.weight_decay * w
            along = mx.sum(g * (state["w0"] - w))
            state["m"] = self.beta1 * state["m"] + (1 - self.beta1) * d * g
            state["v"] = self.beta2 * state["v"] + (1 - self.beta2) * mx.square(d * g)
            state["s"] = self.beta3 * state["s"] + weight * g
            return mx.stack([along, mx.sum(mx.abs(state["s"]))])

        sums = dict(tree_flatten(tree_map(accumulate, gradients, parameters, self.state)))
        along, size = mx.sum(mx.stack(list(sums.values())), axis=0)
        estimate = self.state[_ESTIMATE]
        estimate["numerator"] = self.beta3 * estimate["numerator"] + scale * rate * along
        new_d = mx.where(size > 0, mx.maximum(d, estimate["numerator"] / mx.maximum(size, 1e-38)), d)
        estimate["d"] = new_d

        def updated(parameter: mx.array, state: State) -> mx.array:
            w = master(parameter, state)
            if self.decouple:
                w = w * (1 - self.weight_decay * rate)
            w = w - rate * state["m"] / (mx.sqrt(state["v"]) + new_d * self.epsilon)
            return store(w, parameter, state)

        return tree_map(lambda _, parameter, state: updated(parameter, state), gradients, parameters, self.state)
