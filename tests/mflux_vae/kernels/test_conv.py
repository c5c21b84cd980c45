"""`kernels.conv2d` matches MLX's convolution, forward and backward, for any shape."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mflux_vae import kernels

FORWARD, BACKWARD = 1e-4, 1e-3


def reference(x: mx.array, weight: mx.array, bias: mx.array | None, stride: int, padding: kernels.Padding) -> mx.array:
    rows, columns = ((padding, padding),) * 2 if isinstance(padding, int) else padding
    y = mx.conv2d(mx.pad(x, [(0, 0), rows, columns, (0, 0)]), weight, stride=stride)
    return y if bias is None else y + bias


def relative_error(ours: mx.array, theirs: mx.array) -> float:
    """Largest absolute difference divided by the largest value."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    difference, size = (float(mx.abs(a.astype(mx.float32)).max()) for a in (ours - theirs, theirs))
    return difference / max(size, 1e-6)


def compare(shape: tuple[int, ...], out: int, kernel: tuple[int, int], stride: int, padding: Any, bias: bool) -> None:
    keys = mx.random.split(mx.random.key(sum(shape) + out), 4)
    x = mx.random.normal(shape, key=keys[0])
    weight = mx.random.normal((out, *kernel, shape[-1]), key=keys[1])
    extra_bias = mx.random.normal((out,), key=keys[2]) if bias else None

    def outputs_of(convolution: Callable[[mx.array, mx.array], mx.array]) -> tuple[mx.array, mx.array, mx.array]:
        y = convolution(x, weight)
        direction = mx.random.normal(y.shape, key=keys[3])
        along = mx.grad(lambda x, weight: (convolution(x, weight) * direction).sum(), argnums=(0, 1))
        return y, *along(x, weight)

    ours = outputs_of(lambda x, weight: kernels.conv2d(x, weight, extra_bias, stride=stride, padding=padding))
    theirs = outputs_of(lambda x, weight: reference(x, weight, extra_bias, stride, padding))
    for name, a, b, limit in zip(["y", "x", "w"], ours, theirs, (FORWARD, BACKWARD, BACKWARD), strict=True):
        assert relative_error(a, b) <= limit, name


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
def test_matches_mlx_for_any_shape(case: tuple[Any, ...]) -> None:
    compare(*case)


@pytest.mark.parametrize("out", [8, 72])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(1, 9, 20, 260), (1, 16, 30, 32), (3, 8, 8, 64)])
def test_matches_mlx_for_autoencoder_shapes(shape: tuple[int, ...], stride: int, out: int) -> None:
    compare(shape, out, (3, 3), stride, 1 if stride == 1 else ((0, 1), (0, 1)), True)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
def test_half_precision_is_preserved(dtype: mx.Dtype, stride: int) -> None:
    keys = mx.random.split(mx.random.key(0), 2)
    x = mx.random.normal((2, 8, 14, 4), key=keys[0]).astype(dtype)
    weight = mx.random.normal((3, 3, 3, 4), key=keys[1]).astype(dtype)
    ours = kernels.conv2d(x, weight, stride=stride, padding=1)
    theirs = reference(x.astype(mx.float32), weight.astype(mx.float32), None, stride, 1)
    assert ours.dtype == dtype
    assert relative_error(ours.astype(mx.float32), theirs) < 0.02


def test_compiled_second_derivative() -> None:
    keys = mx.random.split(mx.random.key(1), 2)
    x, weight = mx.random.normal((1, 6, 14, 2), key=keys[0]), mx.random.normal((3, 3, 3, 2), key=keys[1])

    def curvature(convolution: Callable[[mx.array, mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        slope = mx.grad(lambda x: mx.square(mx.square(convolution(x, weight))).sum())
        return mx.grad(lambda x: mx.square(slope(x)).sum())

    ours = mx.compile(curvature(lambda x, w: kernels.conv2d(x, w, padding=1)))(x)
    theirs = curvature(lambda x, w: reference(x, w, None, 1, 1))(x)
    assert relative_error(ours, theirs) <= BACKWARD


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 2, 20, 3), (1, 20, 2, 3), (1, 5, 5, 4)])
def test_shapes_that_do_not_fit_raise_error(shape: tuple[int, ...], stride: int) -> None:
    with pytest.raises(ValueError, match="kernel"):
        kernels.conv2d(mx.zeros(shape), mx.zeros((4, 3, 3, 3)), stride=stride)


def test_image_of_kernel_size_gives_one_pixel() -> None:
    x = mx.array(np.arange(9.0, dtype=np.float32).reshape(1, 3, 3, 1))
    assert kernels.conv2d(x, mx.ones((1, 3, 3, 1))).tolist() == [[[[36.0]]]]


def norm_of(channels: int) -> tuple[int, mx.array, mx.array, float]:
    keys = mx.random.split(mx.random.key(channels))
    return channels // 4, mx.random.normal((channels,), key=keys[0]), mx.random.normal((channels,), key=keys[1]), 1e-6


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape", [(1, 12, 16, 32), (3, 7, 9, 32), (2, 16, 5, 8)])
def test_fused_operations_match_separate_ones(shape: tuple[int, ...], residual: bool, traced: bool) -> None:
    keys = mx.random.split(mx.random.key(5), 4)
    out, channels, norm = 36, shape[-1], norm_of(shape[-1])
    x, extra = mx.random.normal(shape, key=keys[0]), mx.random.normal((*shape[:3], out), key=keys[1])
    weight, bias = mx.random.normal((out, 3, 3, channels), key=keys[2]), mx.random.normal((out,), key=keys[3])
    mx.eval(extra, weight, bias)  # else the random numbers are compiled too, and MLX 0.32.2 rounds them differently

    def norm_silu(x: mx.array) -> mx.array:
        given = extra if residual else None
        return kernels.norm_silu_conv2d(x, norm, weight, bias, padding=1, residual=given)

    def repeated(x: mx.array) -> mx.array:
        return kernels.repeat_conv2d(x, weight, bias, padding=1)

    y = reference(kernels.silu(kernels.group_norm(x, *norm)), weight, bias, 1, 1)
    assert relative_error((mx.compile(norm_silu) if traced else norm_silu)(x), y + extra if residual else y) <= FORWARD
    upsampled = mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)
    y = reference(upsampled, weight, bias, 1, 1)
    assert relative_error((mx.compile(repeated) if traced else repeated)(x), y) <= FORWARD
    slope, theirs = (mx.grad(lambda x, f=f: mx.square(f(x)).sum())(x) for f in (repeated, lambda x: reference(
        mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2), weight, bias, 1, 1)))  # fmt: skip
    assert relative_error(slope, theirs) <= BACKWARD


def test_threads_agree() -> None:
    x, weight = mx.random.normal((2, 40, 40, 32)), mx.random.normal((32, 3, 3, 32))
    mx.eval(x, weight)
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda _: np.array(kernels.conv2d(x, weight, padding=1)), range(6)))
    for result in results:
        np.testing.assert_array_equal(result, results[0])
