"""What the optimizers have in common: float32 inside, master copies of half-precision parameters, bytes of state."""

from __future__ import annotations

from typing import Any, TypeAlias

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from mflux_vae_train.optimizers.parallel_map import parallel_tree_map

State: TypeAlias = "dict[str, Any]"
"""Of one parameter: named arrays, or dicts of them."""

MASTER = "master"


class Optimizer(optim.Optimizer):
    """An optimizer that says how one float32 array of weights is updated.

    Half precision cannot hold small updates: in bfloat16 1 + 1/500 is 1, so that weights would stand still at usual
    rates. The weights of such parameters are therefore kept in the state in float32, and rounded from there.
    """

    consumes = False
    """Whether gradients may be given up by who calls `apply_gradients`: their memory is then used again, on a CPU."""

    def __init__(self, learning_rate: float = 0.0) -> None:
        super().__init__()
        self.learning_rate = learning_rate

    def start(self, weights: mx.array, state: State) -> None:
        """Put into an empty `state` what is kept of a parameter; `weights` are its float32 ones."""
        raise NotImplementedError

    def updated(self, gradient: mx.array, weights: mx.array, state: State) -> mx.array:
        """Gradient and weights, float32 -> weights after the update, float32; changes `state`."""
        raise NotImplementedError

    def init_single(self, parameter: mx.array, state: State) -> None:
        weights = parameter.astype(mx.float32)
        if parameter.dtype != mx.float32:
            state[MASTER] = weights
        self.start(weights, state)

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        self.prepare(gradients, parameters)
        super().apply_gradients({}, {})  # counts, and asks its schedules
        return parallel_tree_map(self.apply_single, gradients, parameters, self.state, consumed=self.consumes)

    def prepare(self, gradients: Any, parameters: Any) -> None:
        """Initializes the state if `init` was not called: from weights, where MLX takes gradients for their shapes."""
        if not self._initialized:
            self.init(tree_map(lambda _, parameter: parameter, gradients, parameters))

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: State) -> mx.array:
        return rounded(self.updated(gradient.astype(mx.float32), exact(parameter, state), state), parameter, state)

    def exact(self, parameters: Any) -> Any:
        """Parameters, or a part of them -> their master copies where there are some, else themselves."""
        return tree_map(exact, parameters, self.state)

    def state_bytes(self, parameter: mx.array) -> int:
        """What is kept for such a parameter, its master copy included. Nothing is computed or allocated."""
        state: State = {}
        self.init_single(parameter, state)
        return sum(array.nbytes for array in dict(tree_flatten(state)).values())


def exact(parameter: mx.array, state: State) -> mx.array:
    """The parameter in float32: its master copy where there is one."""
    weights: mx.array = state.get(MASTER, parameter)
    return weights


def rounded(weights: mx.array, parameter: mx.array, state: State) -> mx.array:
    """New float32 weights in the parameter's dtype, after keeping them where there is a master copy."""
    if MASTER in state:
        state[MASTER] = weights
    return weights.astype(parameter.dtype)
