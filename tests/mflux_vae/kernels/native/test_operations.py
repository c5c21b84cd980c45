"""The native operations and their gradients agree with formulas in float64, for drawn shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

try:
    from mflux_vae.kernels.cpu import _native as native
except ImportError as error:
    pytest.skip(f"the extension for Linux CPUs is not available: {error}", allow_module_level=True)

from tests.mflux_vae.kernels.native.cases import CASES, Case, Draw, check

T = TypeVar("T")


class HypothesisDraw:
    """Draws what Hypothesis chooses, and shrinks."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data

    def integer(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def choice(self, options: Sequence[T]) -> T:
        return self.data.draw(st.sampled_from(list(options)))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_agrees_with_its_formula(case: Callable[[Draw], Case], data: st.DataObject) -> None:
    draw = HypothesisDraw(data)
    check(case(draw), transposed=draw.choice([False, True]))


def adamw_by_formula(w: np.ndarray, g: np.ndarray, m: np.ndarray, v: np.ndarray, *factors: float) -> list[np.ndarray]:
    """One update of AdamW in float32, rounded after each operation."""
    f = np.float32
    scale, decay, rate, correction = (f(x) for x in factors)
    g = g * scale
    m = f(0.9) * m + f(1 - 0.9) * g
    v = f(0.999) * v + f(1 - 0.999) * (g * g)
    return [w * decay - rate * m / (np.sqrt(v * correction) + f(1e-8)), m, v]


@settings(max_examples=15, deadline=None)
@given(shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_adamw_equals_its_formula_to_the_bit(shapes: list[list[int]], seed: int) -> None:
    random = np.random.default_rng(seed)
    lists = [[np.float32(random.normal(size=shape)).reshape(shape) for shape in shapes] for _ in range(4)]
    lists[3] = [np.abs(v) for v in lists[3]]
    factors = (0.7, 0.999, 1e-3, 1.25)
    expected = [adamw_by_formula(*arrays, *factors) for arrays in zip(*lists, strict=True)]
    arrays = [[mx.array(a) for a in values] for values in lists]
    actual = native.adamw(*arrays, *(mx.array(x) for x in factors), 0.9, 0.999, 1e-8)
    for i, parameter in enumerate(expected):
        for part, value in enumerate(parameter):
            np.testing.assert_array_equal(np.array(actual[part][i]), value)
    change = sum(np.square(np.float64(new - w)).sum() for (new, *_), w in zip(expected, lists[0], strict=True))
    before = sum(np.square(np.float64(w)).sum() for w in lists[0])
    np.testing.assert_allclose(actual[3], [change, before], rtol=1e-5)
    np.testing.assert_allclose(native.sum_of_squares(arrays[0]), before, rtol=1e-5)
    for before, kept in zip(lists, arrays, strict=True):  # still referenced, so not overwritten
        for a, b in zip(before, kept, strict=True):
            np.testing.assert_array_equal(np.array(b), a)


def test_adamw_reuses_the_memory_of_weights_and_moments() -> None:
    def values() -> list[mx.array]:
        return [mx.ones((1 << 20,)), mx.ones((1 << 20,))]

    weights, m, v, gradients = values(), values(), values(), values()
    mx.eval(weights, m, v, gradients)
    one = mx.array(1.0)
    mx.eval(one)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    weights, m, v, _ = native.adamw(weights, gradients, m, v, one, one, one, one, 0.9, 0.999, 1e-8)
    mx.eval(weights, m, v)
    assert mx.get_peak_memory() - before < 1 << 22


def test_no_samples_give_empty_results_and_zero_gradients() -> None:
    scale, x = mx.ones(6), mx.zeros((0, 4, 4, 6))
    weight = mx.ones((5, 3, 3, 6))
    gradient = mx.grad(lambda s: native.group_norm(x, 2, s, s, 1e-5).sum())(scale)
    assert gradient.tolist() == [0] * 6
    gradient = mx.grad(lambda w: native.conv2d(x, w, padding=[1, 1, 1, 1]).sum())(weight)
    assert not np.array(gradient).any()
    columns, narrow = mx.zeros((1, 5, 0, 16)), mx.ones((2, 3, 1, 16))
    gradient = mx.grad(lambda w: native.conv2d(columns, w, padding=[0, 0, 1, 1]).sum())(narrow)
    assert not np.array(gradient).any()
    gradient = mx.grad(lambda w: native.linear(x, w).sum())(mx.ones((3, 6)))
    assert not np.array(gradient).any()


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
def test_linear_layers_are_twice_differentiable(shape: tuple[int, ...]) -> None:
    x, w = mx.random.normal(shape), mx.random.normal((4, 5))

    def twice(layer: Callable[[mx.array, mx.array], mx.array]) -> list[mx.array]:
        first = mx.grad(lambda *inputs: layer(*inputs).square().sum(), argnums=[0, 1])
        second = mx.grad(lambda *inputs: sum(g.square().sum() for g in first(*inputs)), argnums=[0, 1])
        return list(second(x, w))

    for ours, theirs in zip(twice(native.linear), twice(lambda x, w: x @ w.T), strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_propagate_as_in_mlx(value: float) -> None:
    x = np.random.default_rng(0).normal(size=(3, 37)).astype(np.float32)
    x[1, 5] = value
    array = mx.array(x)
    pairs: list[tuple[Any, Any]] = [
        (native.softmax(array), mx.softmax(array, -1)),
        (native.activate(array, native.Activation.silu), array * mx.sigmoid(array)),
        (native.activate(array, native.Activation.tanh), mx.tanh(array)),
        (native.norm(array, None, None, 1e-5, False), mx.fast.layer_norm(array, None, None, 1e-5)),
        (native.linear(array, mx.ones((4, 37))), array @ mx.ones((37, 4))),
    ]
    for ours, theirs in pairs:
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=1e-5)


def test_operations_work_in_compiled_checkpointed_and_mapped_functions() -> None:
    x, w, b = mx.random.normal((4, 5, 5, 8)), mx.random.normal((8,)), mx.random.normal((8,))

    def loss(x: mx.array, w: mx.array) -> mx.array:
        return native.group_norm(x, 2, w, b, 1e-5, native.Activation.silu).square().sum()

    expected = mx.grad(loss)(x, w)
    for transformed in (mx.compile(mx.grad(loss)), mx.grad(mx.checkpoint(loss))):
        assert mx.allclose(transformed(x, w), expected, atol=1e-6)
    for axis in (0, 2):  # the second is not contiguous
        mapped = mx.vmap(lambda x: native.group_norm(x, 2, w, b, 1e-5), in_axes=axis)(mx.stack([x, 2 * x], axis))
        assert mx.allclose(mapped[1], native.group_norm(2 * x, 2, w, b, 1e-5), atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: native.conv2d(mx.zeros((1, 4, 4, 3)), mx.zeros((5, 3, 3, 4))),
        lambda: native.conv2d(mx.zeros((1, 2, 2, 3)), mx.zeros((5, 3, 3, 3))),
        lambda: native.conv2d(mx.zeros((1, 4, 4, 3)), mx.zeros((5, 3, 3, 3)), mx.zeros(4)),
        lambda: native.conv_transpose2d(mx.zeros((1, 4, 4, 3)), mx.zeros((5, 3, 3, 4)), None, 2, [1, 1], [8, 8]),
        lambda: native.linear(mx.zeros((2, 3)), mx.zeros((4, 5))),
        lambda: native.lora_linear(mx.zeros((2, 3)), mx.zeros((4, 3)), None, (mx.zeros((3, 2)), mx.zeros((3, 4)), 1.0)),
        lambda: native.quantized_linear(mx.zeros((2, 64)), mx.zeros((4, 64)), *[mx.zeros((4, 1))] * 2, 64, 4),
        lambda: native.group_norm(mx.zeros((1, 2, 5)), 2, mx.zeros(5), mx.zeros(5), 1e-5),
        lambda: native.norm(mx.zeros((2, 3, 8)), mx.zeros((3, 1, 8)), None, 1e-5, False),
        lambda: native.attention(mx.zeros((2, 4, 1, 8)), *[mx.zeros((1, 4, 1, 8))] * 2, 1.0),
        lambda: mx.vmap(native.softmax)(mx.zeros((0, 8))),
        lambda: native.norm_rotary([mx.zeros((1, 2, 3, 5))], [mx.ones(5)], *[mx.zeros((2, 1, 5))] * 2, 1e-6, False),
        lambda: native.adamw([mx.zeros(3)], [mx.zeros(4)], *[[mx.zeros(3)]] * 2, *[mx.array(1.0)] * 4, 0.9, 0.9, 1e-8),
    ],
)
def test_shapes_that_do_not_fit_are_an_error(call: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        call()


def test_the_gradient_of_no_channels_is_zero() -> None:
    x, weight = mx.ones((1, 30, 30, 8)), mx.ones((0, 3, 3, 8))
    gradient = mx.grad(lambda x: native.conv2d(x, weight, None, padding=(1, 1, 1, 1)).sum())(x)
    assert mx.all(gradient == 0)


DIGEST = """
import hashlib
import mlx.core as mx, numpy as np
from tests.mflux_vae.kernels.native.cases import CASES, RandomDraw
digest = hashlib.sha256()
for case in (make(RandomDraw(seed)) for make in CASES for seed in range(8)):
    inputs = [mx.array(a, dtype=mx.float32) for a in case.inputs]
    loss = lambda *x: sum(y.square().sum() for y in case.native(*x))
    for result in [*case.native(*inputs), *mx.grad(loss, argnums=list(range(len(inputs))))(*inputs)]:
        digest.update(np.array(result).tobytes())
print(digest.hexdigest())
"""


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    def digest(threads: int) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        command = [sys.executable, "-c", DIGEST]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert digest(1) == digest(3)
