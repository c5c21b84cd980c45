"""AdamW and Adam, equal to torch's."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mflux_vae.kernels import native
from mflux_vae_train.optimizers.base import Optimizer, State, Update, master, store


class AdamW(Optimizer):
    """AdamW (arXiv:1711.05101) with bias correction, equal to torch.optim.AdamW.

    MLX's AdamW loses four digits of 1 - beta2^n at the first updates, a difference of float32 numbers near 1; expm1
    keeps them.
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
        super().__init__(learning_rate)
        self.beta1, self.beta2, self.epsilon, self.weight_decay = beta1, beta2, epsilon, weight_decay

    def init_state(self, weights: mx.array, state: State) -> None:
        state["m"], state["v"] = mx.zeros_like(weights), mx.zeros_like(weights)

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        if self._in_one_call():
            return self.scaled_update(gradients, parameters, mx.array(1.0)).parameters
        return super().apply_gradients(gradients, parameters)

    def scaled_update(self, gradients: Any, parameters: Any, scale: mx.array) -> Update:
        """One pass over memory with the native extension."""
        if not self._in_one_call():
            return super().scaled_update(gradients, parameters, scale)
        module = native()
        assert module is not None
        self.ensure_init(gradients, parameters)
        self.state["step"] = self.step + 1
        leaves: list[tuple[mx.array, mx.array, State]] = []
        tree_map(lambda *leaf: leaves.append(leaf), gradients, parameters, self.state)
        weights, m, v, (change, before) = module.adamw(
            [master(parameter, state) for _, parameter, state in leaves],
            [gradient for gradient, _, _ in leaves],
            [state["m"] for _, _, state in leaves],
            [state["v"] for _, _, state in leaves],
            *(scale, *self._factors()),
            *(self.beta1, self.beta2, self.epsilon),
        )
        updated = []
        for (_, parameter, state), *new in zip(leaves, weights, m, v, strict=True):
            self.store_moments(state, *new[1:])
            updated.append(store(new[0], parameter, state))
        remaining = iter(updated)
        return Update(tree_map(lambda _: next(remaining), gradients), change, before)

    def _in_one_call(self) -> bool:
        return native() is not None

    def step_single(self, gradient: mx.array, weights: mx.array, state: State) -> mx.array:
        m, v = self.moments(state, weights.shape)
        decay, rate, correction = self._factors()
        m = self.beta1 * m + (1 - self.beta1) * gradient
        v = self.beta2 * v + (1 - self.beta2) * (gradient * gradient)
        self.store_moments(state, m, v)
        return weights * decay - rate * m / (mx.sqrt(v * correction) + self.epsilon)

    def _factors(self) -> tuple[mx.array, mx.array, mx.array]:
        """Factor of the weights, and rate and factor of the second moment with the bias corrections."""
        n, rate = self.step.astype(mx.float32), self.learning_rate
        decay = 1 - rate * self.weight_decay
        return decay, rate / one_minus_power(self.beta1, n), 1 / one_minus_power(self.beta2, n)

    def moments(self, state: State, shape: tuple[int, ...]) -> tuple[mx.array, mx.array]:
        """First and second moments of a parameter of this shape, float32."""
        return state["m"], state["v"]

    def store_moments(self, state: State, m: mx.array, v: mx.array) -> None:
        """Store the updated moments."""
        state["m"], state["v"] = m, v


class Adam(AdamW):
    """Adam (arXiv:1412.6980), equal to torch.optim.Adam: weight decay is part of the gradient."""

    def __init__(self, *, weight_decay: float = 0.0, **settings: float) -> None:
        super().__init__(weight_decay=0.0, **settings)
        self.decay = weight_decay

    def _in_one_call(self) -> bool:
        return self.decay == 0 and super()._in_one_call()

    def step_single(self, gradient: mx.array, weights: mx.array, state: State) -> mx.array:
        return super().step_single(gradient + self.decay * weights, weights, state)


def one_minus_power(beta: float, n: mx.array) -> mx.array:
    """1 - beta^n, in full precision also where it is small."""
    return -mx.expm1(n * math.log(beta)) if beta > 0 else mx.array(1.0)
