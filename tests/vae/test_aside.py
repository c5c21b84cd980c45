"""What is computed in other threads, while MLX differentiates or part by part, is what one thread computes."""

from __future__ import annotations

from importlib import import_module

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae import kernels, runtime
from mflux_vae_train import lora

pytestmark = pytest.mark.skipif(not runtime.is_cpu(), reason="other devices compute in their own order")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is worth another thread."""
    monkeypatch.setattr(import_module("mflux_vae.kernels.bands"), "_SMALL", 0)
    monkeypatch.setattr(import_module("mflux_vae.kernels.attention"), "_SMALLEST", 0)


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def close(ours: list[mx.array], theirs: list[mx.array]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert mx.abs(b).max() > 1e-3
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * float(mx.abs(b).max()))


@pytest.mark.parametrize("band", [1, 600, 1 << 20])
@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_through_activations_and_attention(
    band: int, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(import_module("mflux_vae.kernels.attention"), "_BAND_SCORES", band)
    q, k, v = (normal(2, 3, 20, 8, seed=seed) for seed in range(3))

    def block(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        y = kernels.attention(kernels.gelu_tanh(2 * q), k, kernels.silu(v), scale=0.4)
        return kernels.attention(y, y, y, scale=0.2)

    def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        y = mx.checkpoint(block)(q, k, v) if recomputed else block(q, k, v)
        return (y * normal(*y.shape, seed=9)).sum()

    gradients = mx.value_and_grad(loss, argnums=(0, 1, 2))
    value, slopes = gradients(q, k, v)
    with kernels.differentiated_once():
        value_aside, slopes_aside = gradients(q, k, v)
    close([value_aside, *slopes_aside], [value, *slopes])


@pytest.mark.parametrize("bias", [False, True])
def test_an_adapter_and_its_gradients(bias: bool) -> None:
    module = nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Linear(5, 4, bias=bias))
    lora.add_lora(module, ["*"], rank=2, alpha=3)
    for seed, layer in enumerate(lora.layers(module).values()):
        layer.lora_b = normal(*layer.lora_b.shape, seed=seed)
    x = normal(2, 3, 6)
    gradients = nn.value_and_grad(module, lambda x: (module(x) * normal(2, 3, 4, seed=9)).sum())
    value, slopes = gradients(x)
    with kernels.differentiated_once():
        value_aside, slopes_aside = gradients(x)
    flat, flat_aside = ([value for _, value in tree_flatten(tree)] for tree in (slopes, slopes_aside))
    assert len(flat) == 4
    close([value_aside, *flat_aside], [value, *flat])


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_parts_of_a_batch_side_by_side(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cores", lambda: 2)
    x, y, weight = normal(batch, 7, 4), normal(batch, 4, seed=1), normal(4, 4, seed=2)

    def function(x: mx.array, y: mx.array) -> tuple[mx.array, mx.array]:
        x = kernels.silu(x @ weight) + y[:, None]
        return x, x.sum(axis=1)

    ours = kernels.side_by_side(function, x, y, constants=weight)
    close(list(ours), list(function(x, y)))
