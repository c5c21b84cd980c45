"""`kernels.conv2d` is MLX's convolution, forward and backward, whatever the shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mflux_vae import kernels, runtime

FORWARD, BACKWARD = 1e-4, 1e-3


def reference(x: mx.array, weight: mx.array, bias: mx.array | None, stride: int, padding: kernels.Padding) -> mx.array:
    rows, columns = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    y = mx.conv2d(mx.pad(x, [(0, 0), rows, columns, (0, 0)]), weight, stride=stride)
    return y if bias is None else y + bias


def distance(ours: mx.array, theirs: mx.array) -> float:
    """Largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    difference, size = (float(mx.abs(a.astype(mx.float32)).max()) for a in (ours - theirs, theirs))
    return difference / max(size, 1e-6)


def compare(shape: tuple[int, ...], out: int, kernel: tuple[int, int], stride: int, padding: Any, bias: bool) -> None:
    keys = mx.random.split(mx.random.key(sum(shape) + out), 4)
    x = mx.random.normal(shape, key=keys[0])
    weight = mx.random.normal((out, *kernel, shape[-1]), key=keys[1])
    added = mx.random.normal((out,), key=keys[2]) if bias else None

    def of(convolution: Callable[[mx.array, mx.array], mx.array]) -> tuple[mx.array, mx.array, mx.array]:
        y = convolution(x, weight)
        direction = mx.random.normal(y.shape, key=keys[3])
        along = mx.grad(lambda x, weight: (convolution(x, weight) * direction).sum(), argnums=(0, 1))
        return y, *along(x, weight)

    ours = of(lambda x, weight: kernels.conv2d(x, weight, added, stride=stride, padding=padding))
    theirs = of(lambda x, weight: reference(x, weight, added, stride, padding))
    for name, a, b, limit in zip(["y", "x", "w"], ours, theirs, (FORWARD, BACKWARD, BACKWARD), strict=True):
        assert distance(a, b) <= limit, name


sides = st.integers(0, 2)
paddings = st.one_of(sides, st.tuples(st.tuples(sides, sides), st.tuples(sides, sides)))


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, ...]:
    kernel = draw(st.sampled_from([1, 3, 4, 5])), draw(st.sampled_from([1, 3, 4, 5]))
    padding = draw(paddings)
    ((top, bottom), (left, right)) = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    height = draw(st.integers(max(1, kernel[0] - top - bottom), 17))
    width = draw(st.integers(max(1, kernel[1] - left - right), 17))
    shape = draw(st.integers(1, 2)), height, width, draw(st.integers(1, 5))
    return shape, draw(st.integers(1, 5)), kernel, draw(st.sampled_from([1, 2, 3])), padding, draw(st.booleans())


@settings(max_examples=120, deadline=None, derandomize=True)
@given(convolutions())
def test_any_shape(case: tuple[Any, ...]) -> None:
    compare(*case)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 9, 20, 260), (1, 16, 30, 32), (3, 8, 8, 64)])
def test_the_shapes_of_autoencoders(shape: tuple[int, ...], stride: int) -> None:
    compare(shape, 8, (3, 3), stride, 1 if stride == 1 else ((0, 1), (0, 1)), True)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(convolutions())
def test_any_shape_on_other_devices(case: tuple[Any, ...]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "is_cpu", lambda: False)
        compare(*case)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_half_precision_stays_half_precision(dtype: mx.Dtype, stride: int) -> None:
    keys = mx.random.split(mx.random.key(0), 2)
    x = mx.random.normal((2, 8, 14, 4), key=keys[0]).astype(dtype)
    weight = mx.random.normal((3, 3, 3, 4), key=keys[1]).astype(dtype)
    ours = kernels.conv2d(x, weight, stride=stride, padding=1)
    theirs = reference(x.astype(mx.float32), weight.astype(mx.float32), None, stride, 1)
    assert ours.dtype == dtype
    assert distance(ours.astype(mx.float32), theirs) < 0.02


def test_compiled_and_differentiated_twice() -> None:
    keys = mx.random.split(mx.random.key(1), 2)
    x, weight = mx.random.normal((1, 6, 14, 2), key=keys[0]), mx.random.normal((3, 3, 3, 2), key=keys[1])

    def curvature(convolution: Callable[[mx.array, mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        slope = mx.grad(lambda x: mx.square(mx.square(convolution(x, weight))).sum())
        return mx.grad(lambda x: mx.square(slope(x)).sum())

    ours = mx.compile(curvature(lambda x, w: kernels.conv2d(x, w, padding=1)))(x)
    theirs = curvature(lambda x, w: reference(x, w, None, 1, 1))(x)
    assert distance(ours, theirs) <= BACKWARD


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 2, 20, 3), (1, 20, 2, 3), (1, 5, 5, 4)])
def test_what_does_not_fit_is_refused(shape: tuple[int, ...], stride: int) -> None:
    with pytest.raises(ValueError, match="no convolution"):
        kernels.conv2d(mx.zeros(shape), mx.zeros((4, 3, 3, 3)), stride=stride)


def test_an_image_as_large_as_the_kernel_gives_one_pixel() -> None:
    x = mx.array(np.arange(9.0, dtype=np.float32).reshape(1, 3, 3, 1))
    assert kernels.conv2d(x, mx.ones((1, 3, 3, 1))).tolist() == [[[[36.0]]]]
