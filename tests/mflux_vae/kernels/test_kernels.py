"""Norms, activations and attention match their formulas, including gradients and half precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mflux_vae import kernels
from tests.helpers import gpu_branch as branch
from tests.helpers.peak_memory import peak_of

HALF = {mx.float16: 2e-3, mx.bfloat16: 1.6e-2}


@pytest.fixture(params=["cpu", "other"], autouse=True)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run each test with the CPU kernels and with the MLX operations used on Metal and CUDA."""
    branch.force(monkeypatch, cpu=request.param == "cpu")
    yield request.param


def assert_close(ours: mx.array, theirs: mx.array | np.ndarray, limit: float) -> None:
    """Assert that differences are at most `limit` times the largest value."""
    ours, theirs = (np.array(mx.array(a).astype(mx.float32), np.float64) for a in (ours, theirs))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit * max(1.0, np.abs(theirs).max()))


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def gradients_of(fn: Callable[..., mx.array], *arguments: mx.array) -> list[mx.array]:
    """Gradients of a weighted sum of the results, with respect to every argument."""
    weights = normal(*fn(*arguments).shape, seed=99)

    def weighted(arguments: list[mx.array]) -> mx.array:
        return (fn(*arguments).astype(mx.float32) * weights).sum()

    return mx.grad(weighted)(list(arguments))


ACTIVATIONS: dict[str, tuple[Callable[[mx.array], mx.array], Callable[[mx.array], mx.array]]] = {
    "silu": (kernels.silu, lambda x: x / (1 + mx.exp(-x))),
    "quick_gelu": (kernels.quick_gelu, lambda x: x / (1 + mx.exp(-1.702 * x))),
    "gelu": (kernels.gelu, nn.gelu),
    "gelu_tanh": (kernels.gelu_tanh, nn.gelu_approx),
    "sigmoid": (kernels.sigmoid, lambda x: 1 / (1 + mx.exp(-x))),
    "tanh": (kernels.tanh, mx.tanh),
}
activations = pytest.mark.parametrize(("ours", "formula"), ACTIVATIONS.values(), ids=ACTIVATIONS.keys())


@activations
def test_activations_and_their_gradients(ours: Callable, formula: Callable) -> None:
    x = mx.concatenate([mx.linspace(-30, 30, 4001), mx.linspace(-0.01, 0.01, 101)])
    assert_close(ours(x), formula(x), 3e-6)
    assert_close(gradients_of(ours, x)[0], gradients_of(formula, x)[0], 3e-6)


@activations
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_activations_in_half_precision(ours: Callable, formula: Callable, dtype: mx.Dtype) -> None:
    x = mx.linspace(-12, 12, 1001).astype(dtype)
    wide = x.astype(mx.float32)
    assert ours(x).dtype == dtype
    near = np.abs(np.array(ours(x).astype(mx.float32)) - np.array(formula(wide)))
    assert (near <= HALF[dtype] * np.maximum(1, np.abs(np.array(formula(wide))))).all()
    (slope,) = gradients_of(ours, x)
    assert slope.dtype == dtype
    assert_close(slope, gradients_of(formula, wide)[0], 2 * HALF[dtype])


@activations
def test_activations_in_bfloat16_are_rounded_once(ours: Callable, formula: Callable) -> None:
    x = mx.linspace(-6, 6, 4001).astype(mx.bfloat16)
    exact = formula(x.astype(mx.float32))
    error, rounding = (mx.abs(y.astype(mx.float32) - exact).mean().item() for y in (ours(x), exact.astype(mx.bfloat16)))
    assert error <= 1.02 * rounding


@activations
def test_activations_of_large_values_and_nan(ours: Callable, formula: Callable) -> None:
    x = mx.array([-1e6, -100.0, 0.0, 100.0, 1e6])
    np.testing.assert_allclose(ours(x), formula(x), rtol=1e-6, atol=1e-6)
    assert np.isnan(ours(mx.array([float("nan")])).item())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    pixels=st.lists(st.integers(1, 6), min_size=1, max_size=2),
    groups=st.integers(1, 4),
    per_group=st.integers(1, 3),
    offset=st.sampled_from([0.0, 3.0]),
)
def test_group_norm_and_its_gradients(
    batch: int, pixels: list[int], groups: int, per_group: int, offset: float
) -> None:
    channels = groups * per_group
    x = normal(batch, *pixels, channels) + offset
    weight, bias = normal(channels, seed=1), normal(channels, seed=2)

    def formula(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        grouped = x.reshape(batch, -1, groups, per_group)
        centred = grouped - grouped.mean(axis=(1, 3), keepdims=True)
        normed = centred / mx.sqrt(mx.square(centred).mean(axis=(1, 3), keepdims=True) + 1e-3)
        return normed.reshape(x.shape) * weight + bias

    def ours(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        return kernels.group_norm(x, groups, weight, bias, 1e-3)

    assert_close(ours(x, weight, bias), formula(x, weight, bias), 1e-5)
    for a, b in zip(gradients_of(ours, x, weight, bias), gradients_of(formula, x, weight, bias), strict=True):
        assert_close(a, b, 2e-4)


def test_group_norm_is_accurate_on_large_images() -> None:
    x = normal(1, 160, 200, 8) + 1
    ours = kernels.group_norm(x, 2, mx.ones((8,)), mx.zeros((8,)), 1e-6)
    wide = np.array(x, np.float64).reshape(1, -1, 2, 4)
    mean, variance = wide.mean(axis=(1, 3), keepdims=True), wide.var(axis=(1, 3), keepdims=True)
    assert_close(ours, ((wide - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape), 5e-7)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_group_norm_in_half_precision(dtype: mx.Dtype) -> None:
    x = (normal(2, 40, 40, 8) * 40 + 100).astype(dtype)
    weight, bias = normal(8, seed=1).astype(dtype), normal(8, seed=2).astype(dtype)
    ours = kernels.group_norm(x, 4, weight, bias, 1e-6)
    assert ours.dtype == dtype
    wide = kernels.group_norm(*(a if isinstance(a, int) else a.astype(mx.float32) for a in (x, 4, weight, bias)), 1e-6)
    assert_close(ours, wide, HALF[dtype])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_batch_norm_and_its_gradients(dtype: mx.Dtype) -> None:
    x = (normal(3, 50, 40, 6) + 30).astype(dtype)
    weight, bias = (normal(6, seed=seed).astype(dtype) for seed in (1, 2))
    wide = np.array(x.astype(mx.float32), np.float64)
    ours, mean, variance = kernels.batch_norm(x, weight, bias, 1e-5)
    assert ours.dtype == dtype and mean.dtype == variance.dtype == mx.float32
    assert_close(mean, wide.mean(axis=(0, 1, 2)), 1e-5)  # a float32 sum of 6,000 numbers
    assert_close(variance, wide.var(axis=(0, 1, 2)), 1e-4)

    def formula(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        centred = x - x.mean(axis=(0, 1, 2))
        return centred / mx.sqrt(mx.square(centred).mean(axis=(0, 1, 2)) + 1e-5) * weight + bias

    full = [array.astype(mx.float32) for array in (x, weight, bias)]
    limit = HALF.get(dtype, 1e-4)
    assert_close(ours, formula(*full), limit)
    slopes = gradients_of(lambda *given: kernels.batch_norm(*given, 1e-5)[0], x, weight, bias)
    for a, b in zip(slopes, gradients_of(formula, *full), strict=True):
        assert_close(a, b, 2 * limit)


def test_norms_keep_no_float32_copies_on_gpus(device: str) -> None:
    if device == "cpu":
        pytest.skip("a CPU computes in float32")
    x, one, zero = normal(2, 32, 32, 32).astype(mx.bfloat16), mx.ones((32,)), mx.zeros((32,))
    mx.eval(x)

    def kept(norm: Callable[[mx.array], mx.array]) -> float:
        def peak(layers: int) -> int:
            def loss(x: mx.array) -> mx.array:
                for _ in range(layers):
                    x = norm(x)
                return x.astype(mx.float32).sum()

            return peak_of(lambda: mx.grad(loss)(x))

        return (peak(24) - peak(8)) / 16 / x.nbytes

    assert kept(lambda x: kernels.group_norm(x, 4, one, zero, 1e-6)) < 1.3
    assert kept(lambda x: kernels.batch_norm(x, one, zero, 1e-6)[0]) < 1.3


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_and_its_gradients(affine: bool) -> None:
    def formula(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        centred = x - x.mean(axis=-1, keepdims=True)
        y = centred / mx.sqrt(mx.square(centred).mean(axis=-1, keepdims=True) + 1e-5)
        return y * weight + bias if affine else y

    def ours(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        return kernels.layer_norm(x, *((weight, bias) if affine else (None, None)), 1e-5)

    arguments = normal(3, 5, 17) * 2 + 1, normal(17, seed=1), normal(17, seed=2)
    assert_close(ours(*arguments), formula(*arguments), 1e-6)
    for a, b in zip(gradients_of(ours, *arguments), gradients_of(formula, *arguments), strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("affine", [True, False])
def test_rms_norm_and_its_gradients(affine: bool) -> None:
    def formula(x: mx.array, weight: mx.array) -> mx.array:
        y = x / mx.sqrt(mx.square(x).mean(axis=-1, keepdims=True) + 1e-6)
        return y * weight if affine else y

    def ours(x: mx.array, weight: mx.array) -> mx.array:
        return kernels.rms_norm(x, weight if affine else None, 1e-6)

    arguments = normal(3, 5, 16), normal(16, seed=1)
    assert_close(ours(*arguments), formula(*arguments), 1e-6)
    for a, b in zip(gradients_of(ours, *arguments), gradients_of(formula, *arguments), strict=True):
        assert_close(a, b, 1e-5)


def test_rms_norm_does_not_overflow_half_precision() -> None:
    x = mx.full((1, 8), 3000.0, dtype=mx.float16)
    assert kernels.rms_norm(x, None, 1e-6).tolist() == [[1.0] * 8]


def attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    """`kernels.attention` of (B, heads, N, d)."""
    q, k, v = (array.swapaxes(1, 2) for array in (q, k, v))
    return kernels.attention(q, k, v, scale=0.3, mask=mask).swapaxes(1, 2)


def scored(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    scores = 0.3 * (q @ k.swapaxes(-1, -2))
    return mx.softmax(scores if mask is None else scores + mask, axis=-1) @ v


@pytest.mark.parametrize("mask_shape", [None, (5,), (7, 5), (1, 1, 7, 5), (2, 1, 1, 5), (2, 3, 7, 5)])
def test_attention_and_its_gradients(mask_shape: tuple[int, ...] | None) -> None:
    arrays = [normal(2, 3, 7, 8), normal(2, 3, 5, 8, seed=1), normal(2, 3, 5, 8, seed=2)]
    arrays += [] if mask_shape is None else [normal(*mask_shape, seed=3)]
    assert_close(attend(*arrays), scored(*arrays), 1e-6)
    for a, b in zip(gradients_of(attend, *arrays), gradients_of(scored, *arrays), strict=True):
        assert_close(a, b, 1e-5)


def test_rows_without_any_key_average_the_values() -> None:
    """Where the lowest number masks all keys, as text encoders mask padding, all weights are equal."""
    arrays = [normal(1, 2, 4, 8), normal(1, 2, 5, 8, seed=1), normal(1, 2, 5, 8, seed=2)]
    arrays += [mx.full((1, 1, 4, 5), mx.finfo(mx.float32).min)]
    for a, b in zip(gradients_of(attend, *arrays), gradients_of(scored, *arrays), strict=True):
        assert_close(a, b, 1e-5)


@pytest.mark.parametrize("mask_shape", [None, (60,), (1, 1, 50, 60), (2, 1, 1, 60), (2, 3, 50, 60)])
def test_masked_keys_are_not_seen(mask_shape: tuple[int, ...] | None) -> None:
    q, k, v = normal(2, 3, 50, 16), normal(2, 3, 60, 16, seed=1), normal(2, 3, 60, 8, seed=2)
    mask = None if mask_shape is None else mx.where(normal(*mask_shape, seed=3) < 0, -mx.inf, 0.0)
    assert_close(attend(q, k, v, mask), scored(q, k, v, mask), 3e-6)


def test_softmax_of_large_arrays() -> None:
    x = 20 * normal(40, 30, 50)
    assert_close(kernels.softmax(x), mx.softmax(x, axis=-1), 2e-6)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_softmax_and_attention_in_half_precision(dtype: mx.Dtype) -> None:
    weights = kernels.softmax(normal(4, 3000).astype(dtype))
    assert weights.dtype == dtype
    assert_close(weights.astype(mx.float32).sum(axis=-1), mx.ones((4,)), HALF[dtype])
    q, k, v = (normal(1, 2, 50, 16, seed=seed) for seed in range(3))
    ours = kernels.attention(*(a.astype(dtype) for a in (q, k, v)), scale=0.25)
    assert ours.dtype == dtype
    assert_close(ours, kernels.attention(q, k, v, scale=0.25), 2 * HALF[dtype])
