"""Autoencoders with half-precision weights on a GPU: as exact as in float32, with Metal's convolution."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_map

from mflux_vae import VAE, kernels
from mflux_vae.pretrained.loading import new_network
from tests.helpers import winograd

pytestmark = pytest.mark.usefixtures("gpu_branch")

EXACT = {mx.bfloat16: 2e-3, mx.float16: 3e-4, mx.float32: 1e-5}
"""Relative error (root mean square) that rounding the result explains."""
LOST = {mx.bfloat16: 0.04, mx.float16: 4e-3, mx.float32: 0.0}
"""And at least what Metal's convolution loses by itself."""


def rms_error(x: mx.array, y: mx.array) -> float:
    """Root mean square of x - y, relative to the deviation of y."""
    x, y = (np.array(a.astype(mx.float32), np.float64) for a in (x, y))
    return float(np.sqrt(np.square(x - y).mean()) / y.std())


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "conv2d", winograd.conv2d)


def sample(dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    keys = mx.random.split(mx.random.key(1), 2)
    x = mx.random.normal((1, 24, 20, 128), key=keys[0])
    return x.astype(dtype), mx.random.normal((128, 3, 3, 128), key=keys[1]).astype(dtype)


@pytest.mark.parametrize("dtype", EXACT, ids=str)
def test_convolutions_lose_no_more_than_rounding(dtype: mx.Dtype, metal: None) -> None:
    x, weight = sample(dtype)
    exact = winograd._native(*(a.astype(mx.float32) for a in (x, weight)), padding=1)
    assert rms_error(mx.conv2d(x, weight, padding=1), exact) >= LOST[dtype]  # the emulation
    ours = kernels.conv2d(x, weight, padding=1)
    assert ours.dtype == dtype and rms_error(ours, exact) < EXACT[dtype]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_gradients_of_convolutions_lose_no_more_than_rounding(dtype: mx.Dtype, metal: None) -> None:
    x, weight = sample(dtype)
    away = mx.random.normal((1, 24, 20, 128), key=mx.random.key(2))

    def gradients(x: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
        return mx.grad(lambda x, w: (kernels.conv2d(x, w, padding=1) * away).sum() * 1e-2, argnums=(0, 1))(x, weight)

    wide = gradients(x.astype(mx.float32), weight.astype(mx.float32))
    for ours, exact in zip(mx.compile(gradients)(x, weight), wide, strict=True):
        assert ours.dtype == dtype and rms_error(ours, exact) < 2 * EXACT[dtype]


def test_autoencoder_of_stable_diffusion_is_as_exact_as_in_float32(metal: None) -> None:
    mx.random.seed(0)
    network = new_network("sd1").eval()
    assert isinstance(network, nn.Module)
    coarse = mx.random.uniform(0, 255, (1, 3, 8, 8), key=mx.random.key(3))
    image = mx.repeat(mx.repeat(coarse, 6, axis=2), 6, axis=3)
    network.update(tree_map(lambda array: array.astype(mx.bfloat16), network.parameters()))
    half = VAE(network=network)
    latents = half.encode(image)
    decoded = half.decode_nhwc(latents.transpose(0, 2, 3, 1))
    mx.eval(latents, decoded)
    network.update(tree_map(lambda array: array.astype(mx.float32), network.parameters()))
    full = VAE(network=network)
    assert rms_error(latents, full.encode(image)) < 5e-3
    assert rms_error(decoded, full.decode_nhwc(latents.transpose(0, 2, 3, 1))) < 5e-3
