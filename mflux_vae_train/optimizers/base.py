"""Base of the optimizers: float32 arithmetic, master copies of half-precision parameters, size of the state."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map

from mflux_vae.kernels import native

State: TypeAlias = "dict[str, Any]"
"""State of one parameter: named arrays, or dicts of them."""

MASTER = "master"


class Update(NamedTuple):
    """Updated parameters, with sums of squares of their change and of the parameters before.

    The change is that of the float32 weights: half precision does not show small ones.
    """

    parameters: Any
    change: mx.array
    before: mx.array


class Optimizer(optim.Optimizer):
    """Base class; a subclass defines `init_state` and `step_single` for one float32 array.

    Half precision cannot represent small updates: in bfloat16 1 + 1/500 is 1, so weights would not move at usual rates.
    The state of such a parameter therefore holds a float32 master copy, from which the parameter is rounded.
    """

    def __init__(self, learning_rate: float = 0.0) -> None:
        super().__init__()
        self.learning_rate = learning_rate

    def init_state(self, weights: mx.array, state: State) -> None:
        """Fill the empty `state` of a parameter with these float32 weights."""
        raise NotImplementedError

    def step_single(self, gradient: mx.array, weights: mx.array, state: State) -> mx.array:
        """(gradient, weights), float32 -> updated weights, float32; changes `state`."""
        raise NotImplementedError

    def init_single(self, parameter: mx.array, state: State) -> None:
        weights = parameter.astype(mx.float32)
        if parameter.dtype != mx.float32:
            state[MASTER] = weights
        self.init_state(weights, state)

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        self.ensure_init(gradients, parameters)
        super().apply_gradients({}, {})  # counts the update
        return tree_map(self.apply_single, gradients, parameters, self.state)

    def ensure_init(self, gradients: Any, parameters: Any) -> None:
        """Initialize the state from the parameters. MLX itself would use the gradients, which suffice for shapes."""
        if not self._initialized:
            self.init(tree_map(lambda _, parameter: parameter, gradients, parameters))

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: State) -> mx.array:
        weights = self.step_single(gradient.astype(mx.float32), master(parameter, state), state)
        return store(weights, parameter, state)

    def master(self, parameters: Any) -> Any:
        """A tree of parameters with master copies in place of those that have one."""
        return tree_map(master, parameters, self.state)

    def scaled_update(self, gradients: Any, parameters: Any, scale: mx.array) -> Update:
        """Apply gradients * scale. Subclasses may need fewer passes over memory."""
        return _scaled_update(self, gradients, parameters, scale)

    def state_bytes(self, parameter: mx.array) -> int:
        """Size of the state of such a parameter, including a master copy. Allocates nothing."""
        state: State = {}
        self.init_single(parameter, state)
        return sum(array.nbytes for array in dict(tree_flatten(state)).values())


def master(parameter: mx.array, state: State) -> mx.array:
    """The parameter's master copy, or the parameter itself if it is float32."""
    weights: mx.array = state.get(MASTER, parameter)
    return weights


def store(weights: mx.array, parameter: mx.array, state: State) -> mx.array:
    """Update the master copy, if there is one, and return the weights in the parameter's dtype."""
    if MASTER in state:
        state[MASTER] = weights
    return weights.astype(parameter.dtype)


def scaled_update(optimizer: optim.Optimizer, gradients: Any, parameters: Any, scale: mx.array) -> Update:
    """Apply gradients * scale with any optimizer."""
    if isinstance(optimizer, Optimizer):
        return optimizer.scaled_update(gradients, parameters, scale)
    return _scaled_update(optimizer, gradients, parameters, scale)


def _scaled_update(optimizer: optim.Optimizer, gradients: Any, parameters: Any, scale: mx.array) -> Update:
    gradients = tree_map(lambda g: widened(g) * scale, gradients)
    if not all(isinstance(single, Optimizer) for single in getattr(optimizer, "optimizers", [optimizer])):
        # MLX's own optimizers return parameters in the dtype of the gradients
        gradients = tree_map(lambda g, p: g.astype(p.dtype), gradients, parameters)
    before = masters(optimizer, parameters)
    changed = optimizer.apply_gradients(gradients, parameters)
    change = tree_map(mx.subtract, masters(optimizer, changed), before)
    return Update(changed, sum_of_squares(change), sum_of_squares(parameters))


def masters(optimizer: optim.Optimizer, parameters: Any) -> Any:
    """Float32 weights; the optimizer's master copies for half precision, which small updates do not change."""
    weights = optimizer.master(parameters) if isinstance(optimizer, Optimizer) else parameters
    return tree_map(lambda array: array.astype(mx.float32), weights)


def widened(array: mx.array) -> mx.array:
    """Half precision as float32; other arrays are unchanged."""
    return array.astype(mx.float32) if array.dtype in (mx.float16, mx.bfloat16) else array


def sum_of_squares(tree: Any) -> mx.array:
    """Sum over all arrays of a tree, in float32."""
    arrays: list[mx.array] = list(dict(tree_flatten(tree)).values())
    if (module := native()) is not None:
        total: mx.array = module.sum_of_squares(arrays)
        return total
    return sum((mx.square(array.astype(mx.float32)).sum() for array in arrays), mx.array(0.0))
