"""Gradients of the objective with the native extension agree with those of MLX's operations, for every network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mflux_vae.kernels import native
from mflux_vae.kernels.cpu import extension
from mflux_vae.networks.layers import batch_statistics
from mflux_vae.networks.vector_latent import FlatAutoencoder, FlatConfig
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.network.gradient_checkpointing import recompute_blocks
from mflux_vae_train.vae.objective import Objective
from tests.mflux_vae.small_models import (
    drawn,
    small_flux2,
    small_kl,
    small_plain,
    small_qwen_image,
    small_taehv,
    small_tiny,
)

LINEAR: dict[str, Any] = {"attention_type": "linear", "encoder_attention": (0,), "decoder_attention": (1,)}
NETWORKS: dict[str, Callable[[], Any]] = {
    "kl": small_kl,
    "linear attention, no convolutions between levels": lambda: small_kl(**LINEAR, resample_with_conv=False),
    "dropout": lambda: small_kl(dropout=0.2),
    "plain": small_plain,
    "statistics of latents": small_flux2,
    "no variances": small_tiny,
    "pooling": lambda: small_tiny(pool=True),
    "norms of pixels": lambda: small_qwen_image(dim_mult=(1, 2), temperal_downsample=(True,)),
    "memory": small_taehv,
    "vectors": lambda: drawn(FlatAutoencoder(FlatConfig(hidden_dims=(8, 16), image_size=24, latent_dim=3))),
    "vectors, odd size": lambda: drawn(
        FlatAutoencoder(FlatConfig(hidden_dims=(8, 16), image_size=15, latent_dim=3, upsampling="repeat"))
    ),
}


@pytest.mark.skipif(native() is None, reason="needs the native extension")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_agree_with_those_of_mlx(name: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    network = NETWORKS[name]()
    network.train()
    mx.eval(network.parameters())
    config = network.config
    objective = Objective(VAETrainingSettings(), network, dataset_size=10)
    if recompute:
        recompute_blocks(network)
    side = getattr(config, "image_size", 24)
    pixels = mx.tanh(mx.random.normal((2, side, side, config.in_channels), key=mx.random.key(0)))
    arrays = {"pixels": pixels, "key": mx.random.split(mx.random.key(1), 2), "beta": mx.array(0.5)}
    parameters, buffers = network.trainable_parameters(), network.parameters()

    def traced(parameters: Any) -> tuple[mx.array, Any]:
        network.update(parameters)
        loss, metrics = objective(network, arrays)
        return 3 * loss, (metrics, network.parameters())

    def computed() -> tuple[mx.array, Any, Any, Any]:
        (loss, (metrics, after)), gradients = mx.value_and_grad(traced)(parameters)
        network.update(buffers)
        batch_statistics(network)
        mx.eval(loss, metrics, after, gradients)
        return loss, metrics, *(dict(tree_flatten(tree)) for tree in (after, gradients))

    loss, metrics, after, ours = computed()
    monkeypatch.setattr(extension, "_module", lambda: None)
    expected, other_metrics, other_after, theirs = computed()
    assert mx.allclose(loss, expected, rtol=1e-5)
    assert metrics.keys() == other_metrics.keys()
    for name, array in other_after.items():  # running statistics, too
        assert mx.allclose(after[name], array, rtol=1e-4, atol=1e-5), name
    largest = max(float(mx.abs(array).max()) for array in theirs.values())
    for name, array in theirs.items():
        assert float(mx.abs(ours[name] - array).max()) <= 1e-4 * largest, name
