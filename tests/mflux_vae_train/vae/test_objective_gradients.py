"""Gradients of the objective's tape agree with `mx.grad` for every network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

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

LINEAR = {"attention_type": "linear", "encoder_attention": (0,), "decoder_attention": (1,)}
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


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_tape_agrees_with_mx_grad(name: str, recompute: bool) -> None:
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

    answer = objective.gradients(network, arrays, mx.array(3.0))
    assert answer is not None
    (value, metrics), ours = answer
    moved = dict(tree_flatten(network.parameters()))
    network.update(buffers)

    def traced(parameters: Any) -> tuple[mx.array, Any]:
        network.update(parameters)
        loss, metrics = objective(network, arrays)
        return 3 * loss, (metrics, network.parameters())

    (loss, (other_metrics, after)), theirs = mx.value_and_grad(traced)(parameters)
    network.update(buffers)
    batch_statistics(network)
    assert mx.allclose(3 * value, loss, rtol=1e-5)
    assert other_metrics.keys() == metrics.keys()
    for name, array in dict(tree_flatten(after)).items():  # running statistics, too
        assert mx.allclose(moved[name], array, rtol=1e-4, atol=1e-5), name
    largest = max(float(mx.abs(array).max()) for array in dict(tree_flatten(theirs)).values())
    flat = dict(tree_flatten(ours))
    for name, array in dict(tree_flatten(theirs)).items():
        assert float(mx.abs(flat[name] - array).max()) <= 1e-4 * largest, name
