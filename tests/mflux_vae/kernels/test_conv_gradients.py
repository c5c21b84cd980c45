"""Closed-form gradients match MLX's automatic differentiation up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import pytest

from mflux_vae import kernels
from mflux_vae.kernels.cpu import conv_gradients, parallel


def assert_gradients_match(
    function: Callable[..., mx.array], inputs: Sequence[mx.array], dy: mx.array, ours: Sequence[mx.array]
) -> None:
    _, theirs = mx.vjp(function, list(inputs), [dy])
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert float(mx.abs(a - b).max()) <= 1e-3 * max(float(mx.abs(b).max()), 1e-6)


def random_arrays(*shapes: tuple[int, ...]) -> list[mx.array]:
    keys = mx.random.split(mx.random.key(len(shapes)), len(shapes))
    return [mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=True)]


@pytest.mark.parametrize("elements", [64, 1 << 20])
@pytest.mark.parametrize(
    ("shape", "out", "groups"),
    [((2, 9, 11, 8), 6, 4), ((3, 5, 4, 4), 3, 1), ((1, 20, 17, 64), 96, 32), ((1, 27, 21, 64), 96, 32)],
)
def test_norm_silu_convolution(
    shape: tuple[int, ...], out: int, groups: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "CHUNK_ELEMENTS", elements)
    channels = shape[-1]
    x, gain, bias, weight, dy = random_arrays(shape, (channels,), (channels,), (out, 3, 3, channels), (*shape[:3], out))
    x = x + 3  # a mean far from zero

    def function(x: mx.array, gain: mx.array, bias: mx.array, weight: mx.array) -> mx.array:
        return kernels.norm_silu_conv2d(x, (groups, gain, bias, 1e-6), weight, padding=1)

    norm = groups, gain, bias, 1e-6
    ours = conv_gradients.norm_silu_conv2d(x, norm, weight, dy, padding=1)
    assert_gradients_match(function, (x, gain, bias, weight), dy, ours)


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (1, 8, 7, 64), (1, 13, 12, 64)])
def test_upsampling_convolution(shape: tuple[int, ...]) -> None:
    batch, height, width, channels = shape
    x, weight, dy = random_arrays(shape, (72, 3, 3, channels), (batch, 2 * height, 2 * width, 72))
    ours = conv_gradients.repeat_conv2d(x, weight, dy, padding=1)
    assert_gradients_match(lambda x, weight: kernels.repeat_conv2d(x, weight, padding=1), (x, weight), dy, ours)


def test_batch_norm_and_leaky_relu() -> None:
    x, gain, bias, dy = random_arrays((4, 5, 3, 6), (6,), (6,), (4, 5, 3, 6))
    _, mean, variance = kernels.batch_norm(x, gain, bias, 1e-5)
    ours = conv_gradients.batch_norm(x, gain, mean, variance, 1e-5, dy)
    assert_gradients_match(lambda x, gain, bias: kernels.batch_norm(x, gain, bias, 1e-5)[0], (x, gain, bias), dy, ours)
    assert_gradients_match(
        lambda x: kernels.leaky_relu(x, 0.2), (x,), dy, [conv_gradients.leaky_relu(kernels.leaky_relu(x, 0.2), 0.2, dy)]
    )


def test_sum_of_rows() -> None:
    (x,) = random_arrays((3, 4, 5))
    assert mx.allclose(conv_gradients.sum_of_rows(x), x.sum(axis=(0, 1)), atol=1e-5)


def sum_of_chunks(*values: Any) -> mx.array:
    return parallel.sum_parallel(lambda value=value: mx.full((2,), value) for value in values)


def test_chunks_are_summed() -> None:
    assert sum_of_chunks(1.0).tolist() == [1, 1]
    assert sum_of_chunks(*range(7)).tolist() == [21, 21]
