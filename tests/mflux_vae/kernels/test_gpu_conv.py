"""Convolutions on Metal and CUDA equal MLX's, and their weight gradients do not gather all windows."""

from __future__ import annotations

from itertools import chain
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mflux_vae import kernels
from mflux_vae.kernels import gpu_conv
from mflux_vae.networks import layers
from mflux_vae.runtime import device
from tests.helpers import gpu_branch as branch
from tests.helpers.peak_memory import peak_of
from tests.mflux_vae.kernels.test_conv import compare, convolutions, relative_error

pytestmark = pytest.mark.usefixtures("gpu_branch")

KINDS = pytest.mark.parametrize("kind", ["mac", "cuda"])


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions(), st.sampled_from(["mac", "cuda"]), st.sampled_from([1, 4000, 1 << 27]))
def test_matches_mlx_for_any_shape(case: tuple[Any, ...], kind: str, window_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        branch.force(patch)
        patch.setattr(device, "kind", lambda: kind)
        patch.setattr(gpu_conv, "WINDOW_BYTES", window_bytes)
        compare(*case)


@KINDS
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_half_precision_are_rounded_once(
    stride: int, compiled: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "kind", lambda: kind)
    monkeypatch.setattr(gpu_conv, "WINDOW_BYTES", 4000)
    x, weight = normal(2, 10, 10, 6).astype(mx.bfloat16), normal(4, 3, 3, 6, seed=1).astype(mx.bfloat16)

    def gradients(convolution: Any, x: mx.array, weight: mx.array) -> list[mx.array]:
        y = convolution(x, weight, stride=stride, padding=1)
        return mx.vjp(lambda *a: convolution(*a, stride=stride, padding=1), [x, weight], [mx.ones_like(y)])[1]

    exact = gradients(mx.conv2d, x.astype(mx.float32), weight.astype(mx.float32))
    run = (mx.compile if compiled else lambda f: f)(lambda x, weight: gradients(kernels.conv2d, x, weight))
    for near, far in zip(run(x, weight), exact, strict=True):
        assert near.dtype == mx.bfloat16
        assert relative_error(near.astype(mx.float32), far) < 2**-8


@pytest.mark.parametrize("compiled", [False, True])
def test_windows_are_gathered_in_parts(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_conv, "WINDOW_BYTES", 1 << 17)
    x, weight, dy = normal(2, 64, 64, 32), normal(8, 3, 3, 32, seed=1), normal(2, 64, 64, 8, seed=2)
    mx.eval(x, weight, dy)

    def peak(convolution: Any) -> int:
        def gradient(weight: mx.array) -> mx.array:
            return mx.vjp(lambda w: convolution(x, w, padding=1), [weight], [dy])[1][0]

        run = mx.compile(gradient) if compiled else gradient
        return peak_of(lambda: run(weight))

    assert peak(kernels.conv2d) < 4 * x.nbytes < 9 * x.nbytes < peak(mx.conv2d)


@pytest.mark.parametrize("size", [8, 7])
def test_strided_convolutions_leave_a_row_out_on_cuda(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It distinguishes MLX's cuDNN plans of input gradients from those of convolutions with stride 1."""
    calls, native = [], mx.conv2d

    def conv2d(x: mx.array, weight: mx.array, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> mx.array:
        calls.append([(n + 2 * pad - 3) % stride for n, pad in zip(x.shape[1:3], padding, strict=True)])
        return native(x, weight, stride, padding)

    monkeypatch.setattr(device, "kind", lambda: "cuda")
    monkeypatch.setattr(mx, "conv2d", conv2d)
    x, weight = normal(1, size, size, 2), normal(3, 3, 3, 2)
    y = kernels.conv2d(x, weight, stride=2, padding=1)
    assert any(calls[0]) and mx.array_equal(y, native(x, weight, 2, 1))


@KINDS
@pytest.mark.parametrize("size", [(10, 14), (9, 13), (10, 13)])
def test_transposed_convolution(size: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "kind", lambda: kind)
    x, weight, dy = normal(2, 5, 7, 4), normal(3, 3, 3, 4, seed=1), normal(2, *size, 3, seed=2)
    extra = size[0] - 9, size[1] - 13

    def theirs(x: mx.array, weight: mx.array) -> mx.array:
        return mx.conv_transpose2d(x, weight, stride=2, padding=1, output_padding=extra)

    ours = mx.vjp(lambda x, w: kernels.conv_transpose2d(x, w, size=size), [x, weight], [dy])
    expected = mx.vjp(theirs, [x, weight], [dy])
    for near, far in zip([*ours[0], *ours[1]], [*expected[0], *expected[1]], strict=True):
        assert relative_error(near, far) < 1e-5


def test_frozen_layers_keep_only_their_inputs() -> None:
    """Group norm, SiLU and convolution: the backward pass computes all but the input again."""
    x = mx.random.normal((1, 32, 32, 32)).astype(mx.bfloat16)
    network = [(layers.GroupNorm(8, 32), layers.Conv2d(32, 32, 3, padding=1)) for _ in range(64)]
    for layer in chain.from_iterable(network):
        layer.set_dtype(mx.bfloat16)
        mx.eval(layer.parameters())

    def loss(x: mx.array, count: int) -> mx.array:
        for norm, conv in network[:count]:
            x = layers.norm_silu_conv(norm, conv, x)
        return x.astype(mx.float32).sum()

    mx.disable_compile()
    try:
        few, many = (peak_of(lambda count=count: mx.grad(loss)(x, count)) for count in (4, 64))
    finally:
        mx.enable_compile()
    assert many - few < 60 * 1.5 * x.nbytes  # buffers of single layers vary by 17 of x
