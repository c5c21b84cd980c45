"""Opened weights lie in MLX's memory order, so that they compute the same bits as the network that was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae import VAE
from mflux_vae.networks.vector_latent import FlatAutoencoder, FlatConfig
from mflux_vae.pretrained import loading
from mflux_vae.pretrained.families import FAMILIES
from mflux_vae.runtime.device import eval_each
from tests.helpers.memory_order import views
from tests.helpers.peak_memory import peak_of
from tests.mflux_vae.naming_samples import NETWORKS, arrays
from tests.mflux_vae.small_models import drawn, small_kl
from tests.mflux_vae.weights.torch_writer import of_arrays, write_old, write_zip

FLAT = FlatConfig(hidden_dims=(4, 6), latent_dim=3, image_size=8)
EXAMPLE = FlatConfig(
    hidden_dims=(4, 8, 16), latent_dim=3, image_size=64, upsampling="repeat", last_conv=False
)  # the layers that MLX's example has
BUILDERS = NETWORKS | {"flat": lambda: drawn(FlatAutoencoder(FLAT)), "example": lambda: drawn(FlatAutoencoder(EXAMPLE))}
NAMINGS = [
    (name, naming)
    for name, build in BUILDERS.items()
    for naming in FAMILIES[type(build()).__name__].tables
    if naming != "mlx-examples" or name == "example"
]


def outputs(network: Any) -> list[np.ndarray]:
    """Both halves of an autoencoder."""
    config = network.config
    x = mx.random.uniform(
        -1, 1, (2, *[getattr(config, "image_size", 16)] * 2, config.in_channels), key=mx.random.key(0)
    )
    mean = network.encode(x).mean
    return [np.array(mean), np.array(network.decode(mean))]


def assert_same_bits(one: Any, other: Any) -> None:
    for a, b in zip(outputs(one), outputs(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("name", "naming"), NAMINGS)
def test_every_naming(name: str, naming: str, tmp_path: Path) -> None:
    network = BUILDERS[name]().eval()
    loading.save_network(network, tmp_path / "folder")
    loading.convert(tmp_path / "folder", tmp_path / "a.safetensors", naming)
    opened = loading.open_network(tmp_path / "a.safetensors")
    assert not views(opened.parameters())
    assert_same_bits(opened, network)


@pytest.mark.parametrize("write", [write_zip, write_old])
def test_torch_files(write: Any, tmp_path: Path) -> None:
    network = drawn(FlatAutoencoder(FLAT)).eval()
    turned = {key: np.asfortranarray(array) for key, array in arrays(network, "pytorch-vae").items()}
    write(tmp_path / "a.pt", *of_arrays(turned))
    opened = loading.open_network(tmp_path / "a.pt", config=network.config.to_dict())
    assert not views(opened.parameters())
    assert_same_bits(opened, network)


def test_npz_with_columns_first(tmp_path: Path) -> None:
    network = drawn(FlatAutoencoder(FLAT)).eval()
    np.savez(tmp_path / "a.npz", **{key: np.asfortranarray(array) for key, array in arrays(network).items()})
    opened = loading.open_network(tmp_path / "a.npz", config=network.config.to_dict())
    assert not views(opened.parameters())
    assert_same_bits(opened, network)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_in_half_precision(dtype: str, tmp_path: Path) -> None:
    loading.save_network(small_kl(), tmp_path / "half", dtype)
    opened = loading.open_network(tmp_path / "half")
    loading.save_network(opened, tmp_path / "full")
    assert not views(opened.parameters())
    assert_same_bits(loading.open_network(tmp_path / "full"), opened)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_reading_holds_one_array_twice(dtype: str, tmp_path: Path) -> None:
    loading.save_network(small_kl(block_out_channels=(32, 64, 64, 128)), tmp_path, dtype)
    network = loading.new_network(tmp_path / "config.json")
    weights = [array.nbytes for _, array in tree_flatten(network.parameters())]
    del network
    opened: list[nn.Module] = []

    def read() -> None:
        opened.append(loading.open_network(tmp_path))
        eval_each(opened[0].parameters())

    peak = peak_of(read)
    assert sum(weights) <= peak < sum(weights) + 2.5 * max(weights)


@pytest.mark.parametrize("name", ["kl", "linear attention", "flux2", "tiny", "plain"])
def test_pixels_and_latents_in_another_order_compute_the_same_bits(name: str) -> None:
    """Latents of `encode` are transposed views, those that were saved are not."""
    vae = VAE(network=BUILDERS[name]())
    image = mx.random.uniform(0, 255, (2, vae.config.in_channels, 40, 24), key=mx.random.key(0))
    latents = vae.encode(image)
    np.testing.assert_array_equal(vae.encode(channels_last(image)), latents)
    np.testing.assert_array_equal(vae.decode(channels_last(latents)), vae.decode(mx.contiguous(latents)))


def channels_last(x: mx.array) -> mx.array:
    """The same (B, C, H, W), in memory (B, H, W, C)."""
    return mx.contiguous(x.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
