"""Gradients of a network layer by layer, each computed at once: the fast way backwards on a CPU.

`mx.grad` traces a whole network before it computes anything, and inside a trace MLX's CPU fuses nothing, uses one core
for all but products, and keeps every intermediate result. A tape computes as it goes. It hands the network a stand-in
for an array, whose functions answer through `mflux_vae.kernels.overrides`: each computes its value as it does without
gradients, and notes how to go back. Convolutions and normalised ones know their gradients in closed form
(`mflux_vae.kernels.cpu.conv_gradients`) and keep their inputs alone; any other function is left to `mx.vjp`, which
computes it again on the way back.
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
from mflux_vae.kernels.cpu.conv_algorithms import sides_of

Pull: TypeAlias = Callable[[mx.array], None]
"""Takes the gradient for a function's result, and gives its arguments theirs."""


class GradSlot:
    """Where a recorded array's gradient gathers."""

    gradient: mx.array | None = None

    def add(self, gradient: mx.array) -> None:
        self.gradient = gradient if self.gradient is None else self.gradient + gradient
        mx.async_eval(self.gradient)  # else it holds on to all that it is made of


class Tape:
    """One way through a network and back.

    Args:
        parameters: the tree of arrays whose gradients are wanted, as the network's layers hold them.
    """

    def __init__(self, parameters: Any):
        self._parameters = parameters
        self._places = {id(array): GradSlot() for array in dict(tree_flatten(parameters)).values()}
        self._noted: list[tuple[GradSlot, Pull]] = []

    def place(self, argument: Any) -> GradSlot | None:
        """That of a recorded array or a parameter; None for anything else, which needs no gradient."""
        return argument.place if isinstance(argument, Variable) else self._places.get(id(argument))

    def constant(self, value: mx.array) -> Variable:
        """A stand-in for an array that needs no gradient itself."""
        return Variable(self, value, None)

    def note(self, value: mx.array, pull: Pull, *arguments: Any) -> Variable:
        """What stands in for `value`, and goes back by `pull` where one of its arguments needs a gradient."""
        if all(self.place(argument) is None for argument in arguments):
            return self.constant(value)
        place = GradSlot()
        self._noted.append((place, pull))
        return Variable(self, value, place)

    def checkpoint(self, part: Callable[[Any], Any], x: Variable, parameters: Any) -> Variable:
        """part(x), of which only x is kept: on the way back it is computed again.

        Args:
            part: of a network, with these parameters; called twice, with stand-ins.
        """
        value = value_of(part(Tape({}).constant(x.value)))
        own = dict(tree_flatten(parameters))
        names = [name for name, array in own.items() if self.place(array) is not None]
        kept, place = x.value, x.place

        def pull(gradient: mx.array) -> None:
            inner = Tape({name: own[name] for name in names})
            again = Variable(inner, kept, None if place is None else GradSlot())
            found = inner.gradients([(part(again), gradient)])
            _give([self.place(own[name]) for name in names], [found[name] for name in names])
            if place is not None and again.place is not None and again.place.gradient is not None:
                place.add(again.place.gradient)

        return self.note(value, pull, x, *(own[name] for name in names))

    def gradients(self, ends: Sequence[tuple[Any, mx.array]]) -> Any:
        """Go all the way back, once.

        Args:
            ends: recorded arrays with the gradients for them.

        Returns:
            The tree of the parameters' gradients, zeros where a parameter took no part.
        """
        for recorded, gradient in ends:
            if (place := self.place(recorded)) is not None:
                place.add(gradient)
        while self._noted:
            place, pull = self._noted.pop()  # what it kept is free after it
            if place.gradient is not None:
                pull(place.gradient)
                place.gradient = None
        return tree_map(self._found, self._parameters)

    def _found(self, array: mx.array) -> mx.array:
        gradient = self._places[id(array)].gradient
        return mx.zeros_like(array) if gradient is None else gradient


class Variable:
    """Stands in for an array on a tape.

    Attributes:
        value: the array.
        place: of its gradient; None where none is needed.
    """

    def __init__(self, tape: Tape, value: mx.array, place: GradSlot | None):
        self.tape, self.value, self.place = tape, value, place
        self.shape, self.ndim, self.dtype = value.shape, value.ndim, value.dtype

    def __mlx_function__(self, function: Callable[..., Any], arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        return _RULES.get(function, _by_vjp(function))(self.tape, *arguments, **named)

    def astype(self, dtype: mx.Dtype) -> Any:
        return self if dtype == self.dtype else self.__mlx_function__(_astype, (self, dtype), {})

    def __getitem__(self, index: Any) -> Any:
        return self.__mlx_function__(_at, (self, index), {})

    def __add__(self, other: Any) -> Any:
        return self.__mlx_function__(operator.add, (self, other), {})

    def __sub__(self, other: Any) -> Any:
        return self.__mlx_function__(operator.sub, (self, other), {})

    def __rsub__(self, other: Any) -> Any:
        return self.__mlx_function__(operator.sub, (other, self), {})

    def __mul__(self, other: Any) -> Any:
        return self.__mlx_function__(operator.mul, (self, other), {})

    def __truediv__(self, other: Any) -> Any:
        return self.__mlx_function__(operator.truediv, (self, other), {})

    __radd__, __rmul__ = __add__, __mul__


def _astype(x: mx.array, dtype: mx.Dtype) -> mx.array:
    return x.astype(dtype)


def _at(x: mx.array, index: Any) -> mx.array:
    return x[index]


def value_of(argument: Any) -> Any:
    """The array that an argument stands for; anything else as it is."""
    return argument.value if isinstance(argument, Variable) else argument


def _add(tape: Tape, x: Any, y: Any) -> Any:
    """x + y, of one shape; else `mx.vjp` knows what was broadcast."""
    if getattr(x, "shape", None) != getattr(y, "shape", None):
        return _by_vjp(operator.add)(tape, x, y)
    places = [place for place in (tape.place(x), tape.place(y)) if place is not None]

    def pull(gradient: mx.array) -> None:
        for place in places:
            place.add(gradient)

    return tape.note(value_of(x) + value_of(y), pull, x, y)


def _conv2d(
    tape: Tape,
    x: Any,
    weight: mx.array,
    bias: mx.array | None = None,
    *,
    stride: int = 1,
    padding: kernels.Padding = 0,
) -> Any:
    kept, to_x, to_weight, to_bias = value_of(x), *(tape.place(argument) for argument in (x, weight, bias))
    (top, bottom), (left, right) = sides_of(padding)
    kh, kw = weight.shape[1:3]
    if stride > 2 or max(top, bottom) >= kh or max(left, right) >= kw:
        return _by_vjp(kernels.conv2d)(tape, x, weight, bias, stride=stride, padding=padding)

    def pull(gradient: mx.array) -> None:
        if to_bias is not None:
            to_bias.add(conv_gradients.sum_of_rows(gradient))
        if to_weight is not None:
            to_weight.add(conv_gradients.conv2d_weight(kept, gradient, (kh, kw), stride=stride, padding=padding))
        if to_x is not None:
            to_x.add(conv_gradients.conv2d_input(gradient, weight, kept.shape, stride=stride, padding=padding))

    return tape.note(kernels.conv2d(kept, weight, bias, stride=stride, padding=padding), pull, x, weight, bias)


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
    places, to_bias, to_residual = [tape.place(a) for a in arguments], tape.place(bias), tape.place(residual)

    def pull(gradient: mx.array) -> None:
        if to_residual is not None:
            to_residual.add(gradient)
        if to_bias is not None:
            to_bias.add(conv_gradients.sum_of_rows(gradient))
        _give(places, conv_gradients.norm_silu_conv2d(kept, norm, weight, gradient, padding=padding))

    y = kernels.norm_silu_conv2d(kept, norm, weight, bias, padding=padding, residual=value_of(residual))
    return tape.note(y, pull, *arguments, bias, residual)


def _repeat_conv2d(
    tape: Tape, x: Any, weight: mx.array, bias: mx.array | None = None, *, padding: kernels.Padding = 0
) -> Any:
    kept, places, to_bias = value_of(x), (tape.place(x), tape.place(weight)), tape.place(bias)

    def pull(gradient: mx.array) -> None:
        if to_bias is not None:
            to_bias.add(conv_gradients.sum_of_rows(gradient))
        _give(places, conv_gradients.repeat_conv2d(kept, weight, gradient, padding=padding))

    return tape.note(kernels.repeat_conv2d(kept, weight, bias, padding=padding), pull, x, weight, bias)


def _batch_norm(tape: Tape, x: Any, weight: mx.array, bias: mx.array, eps: float) -> tuple[Any, mx.array, mx.array]:
    kept, places = value_of(x), [tape.place(argument) for argument in (x, weight, bias)]
    y, mean, variance = kernels.batch_norm(kept, weight, bias, eps)

    def pull(gradient: mx.array) -> None:
        _give(places, conv_gradients.batch_norm(kept, weight, mean, variance, eps, gradient))

    return tape.note(y, pull, x, weight, bias), mean, variance


def _leaky_relu(tape: Tape, x: Any, slope: float) -> Any:
    y, place = kernels.leaky_relu(value_of(x), slope), tape.place(x)
    return tape.note(y, lambda gradient: _give([place], [conv_gradients.leaky_relu(y, slope, gradient)]), x)


def _give(places: Sequence[GradSlot | None], answers: Sequence[mx.array]) -> None:
    for place, answer in zip(places, answers, strict=True):
        if place is not None:
            place.add(answer)


def _by_vjp(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a function about which nothing is known: its arguments are kept, and MLX differentiates it later."""

    def rule(tape: Tape, *arguments: Any, **named: Any) -> Any:
        values = [value_of(argument) for argument in arguments]
        modules = {i: a for i, a in enumerate(arguments) if isinstance(a, nn.Module)}
        held = {i: dict(tree_flatten(module.trainable_parameters())) for i, module in modules.items()}
        inputs = [(i, "", a) for i, a in enumerate(arguments) if i not in held]
        inputs += [(i, name, array) for i, arrays in held.items() for name, array in arrays.items()]
        inputs = [given for given in inputs if tape.place(given[2]) is not None]

        def call(*arrays: mx.array) -> mx.array:
            replaced = list(values)
            for (i, name, _), array in zip(inputs, arrays, strict=True):
                if name:
                    values[i].update(tree_unflatten([(name, array)]))
                else:
                    replaced[i] = array
            y: mx.array = function(*replaced, **named)
            return y

        def pull(gradient: mx.array) -> None:
            before = [value_of(array) for _, _, array in inputs]
            try:
                _, answers = mx.vjp(call, before, [gradient])
            finally:  # differentiation leaves its placeholders in modules
                for i, arrays in held.items():
                    values[i].update(tree_unflatten(list(arrays.items())))
            _give([tape.place(array) for _, _, array in inputs], answers)

        return tape.note(function(*values, **named), pull, *(array for _, _, array in inputs))

    return rule


_RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.add: _add,
    kernels.conv2d: _conv2d,
    kernels.norm_silu_conv2d: _norm_silu_conv2d,
    kernels.repeat_conv2d: _repeat_conv2d,
    kernels.batch_norm: _batch_norm,
    kernels.leaky_relu: _leaky_relu,
}
