"""A gradient tape: computes gradients of a network layer by layer, which is faster than `mx.grad` on a CPU.

`mx.grad` traces a whole network before it computes anything, and inside a trace MLX's CPU back end fuses nothing, uses
one core for all but matrix products, and keeps every intermediate result. A tape computes eagerly. The network gets a
`Variable` in slot of an array, and `mflux_vae.kernels.overrides` dispatches functions of it: each computes its value
as usual and records its backward function. Convolutions, also with normalization, have gradients in closed form
(`mflux_vae.kernels.cpu.conv_gradients`) and keep only their inputs; all other functions use `mx.vjp`, which computes
them again in the backward pass.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mflux_vae import kernels
from mflux_vae.kernels.cpu import conv_gradients
from mflux_vae.kernels.cpu.conv_algorithms import normalize_padding

Backward: TypeAlias = Callable[[mx.array], None]
"""Takes the gradient of a function's result and adds the gradients of its arguments to their slots."""


class GradSlot:
    """Accumulates the gradient of a recorded array."""

    gradient: mx.array | None = None

    def add(self, gradient: mx.array) -> None:
        self.gradient = gradient if self.gradient is None else self.gradient + gradient
        mx.async_eval(self.gradient)  # or its inputs stay alive


class Tape:
    """One forward and backward pass.

    Args:
        parameters: tree of the arrays to differentiate by: the same objects that the network's layers hold.
    """

    def __init__(self, parameters: Any):
        self._parameters = parameters
        self._slots = {id(array): GradSlot() for array in dict(tree_flatten(parameters)).values()}
        self._records: list[tuple[GradSlot, Backward]] = []

    def slot(self, argument: Any) -> GradSlot | None:
        """Slot of a variable or a parameter; None if the argument needs no gradient."""
        return argument.slot if isinstance(argument, Variable) else self._slots.get(id(argument))

    def constant(self, value: mx.array) -> Variable:
        """A variable that needs no gradient."""
        return Variable(self, value, None)

    def record(self, value: mx.array, backward: Backward, *arguments: Any) -> Variable:
        """A variable for `value`; records `backward` if one of the arguments needs a gradient."""
        if all(self.slot(argument) is None for argument in arguments):
            return self.constant(value)
        slot = GradSlot()
        self._records.append((slot, backward))
        return Variable(self, value, slot)

    def checkpoint(self, part: Callable[[Any], Any], x: Variable, parameters: Any) -> Variable:
        """part(x); keeps only x and computes the part again in the backward pass (gradient checkpointing).

        Args:
            part: a part of the network, which has these parameters; called twice, with variables.
        """
        value = value_of(part(Tape({}).constant(x.value)))
        arrays = dict(tree_flatten(parameters))
        names = [name for name, array in arrays.items() if self.slot(array) is not None]
        kept, slot = x.value, x.slot

        def backward(gradient: mx.array) -> None:
            inner = Tape({name: arrays[name] for name in names})
            again = Variable(inner, kept, None if slot is None else GradSlot())
            found = inner.gradients([(part(again), gradient)])
            _accumulate([self.slot(arrays[name]) for name in names], [found[name] for name in names])
            if slot is not None and again.slot is not None and again.slot.gradient is not None:
                slot.add(again.slot.gradient)

        return self.record(value, backward, x, *(arrays[name] for name in names))

    def gradients(self, outputs: Sequence[tuple[Any, mx.array]]) -> Any:
        """Run the backward pass; possible once.

        Args:
            outputs: variables with the gradients of the loss by them.

        Returns:
            tree of the parameters' gradients; zeros for unused parameters.
        """
        for recorded, gradient in outputs:
            if (slot := self.slot(recorded)) is not None:
                slot.add(gradient)
        while self._records:
            slot, backward = self._records.pop()  # frees the arrays that it keeps
            if slot.gradient is not None:
                backward(slot.gradient)
                slot.gradient = None
        return tree_map(self._gradient_of, self._parameters)

    def _gradient_of(self, array: mx.array) -> mx.array:
        gradient = self._slots[id(array)].gradient
        return mx.zeros_like(array) if gradient is None else gradient


def _operator(function: Callable[[Any, Any], Any]) -> Callable[[Variable, Any], Any]:
    return lambda self, other: self.__mlx_function__(function, (self, other), {})


class Variable:
    """An array on a tape.

    Attributes:
        value: the array.
        slot: accumulates its gradient; None if it needs none.
    """

    def __init__(self, tape: Tape, value: mx.array, slot: GradSlot | None):
        self.tape, self.value, self.slot = tape, value, slot
        self.shape, self.ndim, self.dtype = value.shape, value.ndim, value.dtype

    def __mlx_function__(self, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        return _RULES.get(function, _vjp_rule(function))(self.tape, *arguments, **named)

    def astype(self, dtype: mx.Dtype) -> Any:
        return self if dtype == self.dtype else self.__mlx_function__(_astype, (self, dtype), {})

    __getitem__ = _operator(operator.getitem)
    __add__ = __radd__ = _operator(operator.add)
    __sub__ = _operator(operator.sub)
    __rsub__ = _operator(lambda x, y: y - x)
    __mul__ = __rmul__ = _operator(operator.mul)
    __truediv__ = _operator(operator.truediv)


def _astype(x: mx.array, dtype: mx.Dtype) -> mx.array:
    return x.astype(dtype)


def value_of(argument: Any) -> Any:
    """The array of a variable; any other argument unchanged."""
    return argument.value if isinstance(argument, Variable) else argument


def _add(tape: Tape, x: Any, y: Any) -> Any:
    """x + y for equal shapes; `mx.vjp` handles broadcasting."""
    if getattr(x, "shape", None) != getattr(y, "shape", None):
        return _vjp_rule(operator.add)(tape, x, y)
    slots = [slot for slot in (tape.slot(x), tape.slot(y)) if slot is not None]

    def backward(gradient: mx.array) -> None:
        for slot in slots:
            slot.add(gradient)

    return tape.record(value_of(x) + value_of(y), backward, x, y)


def _conv2d(
    tape: Tape,
    x: Any,
    weight: mx.array,
    bias: mx.array | None = None,
    *,
    stride: int = 1,
    padding: kernels.Padding = 0,
) -> Any:
    kept, to_x, to_weight, to_bias = value_of(x), *(tape.slot(argument) for argument in (x, weight, bias))
    (top, bottom), (left, right) = normalize_padding(padding)
    kh, kw = weight.shape[1:3]
    if stride > 2 or max(top, bottom) >= kh or max(left, right) >= kw:
        return _vjp_rule(kernels.conv2d)(tape, x, weight, bias, stride=stride, padding=padding)

    def backward(gradient: mx.array) -> None:
        if to_bias is not None:
            to_bias.add(conv_gradients.sum_of_rows(gradient))
        if to_weight is not None:
            to_weight.add(conv_gradients.conv2d_weight(kept, gradient, (kh, kw), stride=stride, padding=padding))
        if to_x is not None:
            to_x.add(conv_gradients.conv2d_input(gradient, weight, kept.shape, stride=stride, padding=padding))

    return tape.record(kernels.conv2d(kept, weight, bias, stride=stride, padding=padding), backward, x, weight, bias)


def _norm_silu_conv2d(
    tape: Tape,
    x: Any,
    norm: tuple[int, mx.array, mx.array, float],
    weight: mx.array,
    bias: mx.array | None = None,
    *,
    padding: kernels.Padding = 0,
    residual: Any = None,
) -> Any:
    kept, arguments = value_of(x), (x, norm[1], norm[2], weight)
    slots, to_bias, to_residual = [tape.slot(a) for a in arguments], tape.slot(bias), tape.slot(residual)

    def backward(gradient: mx.array) -> None:
        if to_residual is not None:
            to_residual.add(gradient)
        if to_bias is not None:
            to_bias.add(conv_gradients.sum_of_rows(gradient))
        _accumulate(slots, conv_gradients.norm_silu_conv2d(kept, norm, weight, gradient, padding=padding))

    y = kernels.norm_silu_conv2d(kept, norm, weight, bias, padding=padding, residual=value_of(residual))
    return tape.record(y, backward, *arguments, bias, residual)


def _step_by_step(function: Any) -> Callable[..., Any]:
    """Rule for a function in `kernels.FUSED`: record the functions that it calls."""
    return lambda _, *arguments, **named: function.__wrapped__(*arguments, **named)


def _repeat_conv2d(
    tape: Tape, x: Any, weight: mx.array, bias: mx.array | None = None, *, padding: kernels.Padding = 0
) -> Any:
    kept, slots, to_bias = value_of(x), (tape.slot(x), tape.slot(weight)), tape.slot(bias)

    def backward(gradient: mx.array) -> None:
        if to_bias is not None:
            to_bias.add(conv_gradients.sum_of_rows(gradient))
        _accumulate(slots, conv_gradients.repeat_conv2d(kept, weight, gradient, padding=padding))

    return tape.record(kernels.repeat_conv2d(kept, weight, bias, padding=padding), backward, x, weight, bias)


def _batch_norm(tape: Tape, x: Any, weight: mx.array, bias: mx.array, eps: float) -> tuple[Any, mx.array, mx.array]:
    kept, slots = value_of(x), [tape.slot(argument) for argument in (x, weight, bias)]
    y, mean, variance = kernels.batch_norm(kept, weight, bias, eps)

    def backward(gradient: mx.array) -> None:
        _accumulate(slots, conv_gradients.batch_norm(kept, weight, mean, variance, eps, gradient))

    return tape.record(y, backward, x, weight, bias), mean, variance


def _leaky_relu(tape: Tape, x: Any, slope: float) -> Any:
    y, slot = kernels.leaky_relu(value_of(x), slope), tape.slot(x)
    return tape.record(y, lambda gradient: _accumulate([slot], [conv_gradients.leaky_relu(y, slope, gradient)]), x)


def _accumulate(slots: Sequence[GradSlot | None], gradients: Sequence[mx.array]) -> None:
    for slot, gradient in zip(slots, gradients, strict=True):
        if slot is not None:
            slot.add(gradient)


def _vjp_rule(function: Callable[..., Any]) -> Callable[..., Any]:
    """Rule for any function: keeps its arguments and differentiates it with MLX in the backward pass."""

    def rule(tape: Tape, *arguments: Any, **named: Any) -> Any:
        values = [value_of(argument) for argument in arguments]
        modules = {i: a for i, a in enumerate(arguments) if isinstance(a, nn.Module)}
        module_arrays = {i: dict(tree_flatten(module.trainable_parameters())) for i, module in modules.items()}
        inputs = [(i, "", a) for i, a in enumerate(arguments) if i not in module_arrays]
        inputs += [(i, name, array) for i, arrays in module_arrays.items() for name, array in arrays.items()]
        inputs = [given for given in inputs if tape.slot(given[2]) is not None]

        def call(*arrays: mx.array) -> mx.array:
            replaced = list(values)
            for (i, name, _), array in zip(inputs, arrays, strict=True):
                if name:
                    values[i].update(tree_unflatten([(name, array)]))
                else:
                    replaced[i] = array
            y: mx.array = function(*replaced, **named)
            return y

        def backward(gradient: mx.array) -> None:
            before = [value_of(array) for _, _, array in inputs]
            try:
                _, gradients = mx.vjp(call, before, [gradient])
            finally:  # differentiation leaves placeholders in modules
                for i, arrays in module_arrays.items():
                    values[i].update(tree_unflatten(list(arrays.items())))
            _accumulate([tape.slot(array) for _, _, array in inputs], gradients)

        return tape.record(function(*values, **named), backward, *(array for _, _, array in inputs))

    return rule


_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.add: _add,
    kernels.conv2d: _conv2d,
    kernels.norm_silu_conv2d: _norm_silu_conv2d,
    kernels.repeat_conv2d: _repeat_conv2d,
    kernels.rms_norm_silu_conv2d: _step_by_step(kernels.rms_norm_silu_conv2d),
    kernels.batch_norm: _batch_norm,
    kernels.leaky_relu: _leaky_relu,
}
