"""Every network of the component keeps the contract."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import pytest

from mflux_vae import VAE, SettingsError
from mflux_vae.errors import PluginError
from mflux_vae.networks.vector_latent import FlatAutoencoder, FlatConfig
from mflux_vae.pretrained.families import FAMILIES
from tests.contracts.network_contract import check_network
from tests.mflux_vae.small_models import (
    drawn,
    small_flux2,
    small_kl,
    small_plain,
    small_qwen_image,
    small_taehv,
    small_tiny,
    small_wan,
)

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "AutoencoderKL": small_kl,
    "AutoencoderKLFlux2": small_flux2,
    "AutoencoderKLQwenImage": small_qwen_image,
    "AutoencoderKLWan": small_wan,
    "AutoencoderTiny": small_tiny,
    "TAEHV": small_taehv,
    "PlainAutoencoder": small_plain,
    "FlatAutoencoder": lambda: drawn(FlatAutoencoder(FlatConfig(hidden_dims=(8, 16), image_size=32, latent_dim=3))),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str) -> None:
    check_network(NETWORKS[name](), side=32)


def test_every_autoencoder_is_covered() -> None:
    """LatentActionQuantizer encodes pairs of frames and is not an autoencoder of images."""
    assert set(NETWORKS) == set(FAMILIES) - {"LatentActionQuantizer"}


def test_vae_names_missing_members() -> None:
    with pytest.raises(SettingsError, match=r"encode, .*config\.vectors"):
        VAE(network=nn.Linear(2, 2))


def test_vae_names_a_result_of_another_kind() -> None:
    network = small_kl()
    broken = type("Broken", (type(network),), {"encode": lambda self, pixels: pixels})(network.config)
    with pytest.raises(PluginError, match=r"Broken.encode\(\) returned an array; expected a DiagonalGaussian"):
        VAE(network=broken).encode(mx.zeros((1, 3, 32, 32)))
