"""Autoencoders of video models for single images, on every device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mflux_vae import VAE, Previewer, SettingsError
from mflux_vae.networks.video.taehv import TAEHVConfig
from mflux_vae.networks.video.wan import AutoencoderKLQwenImageConfig, AutoencoderKLWanConfig
from mflux_vae.pretrained import loading
from mflux_vae.weights.formats.files import open_weights
from mflux_vae.weights.keymaps.diffusers import STEM
from tests.helpers import gpu_branch
from tests.mflux_vae.small_models import (
    pictures,
    small_flux2,
    small_qwen_image,
    small_taehv,
    small_tiny,
    small_wan,
)

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "qwen-image": small_qwen_image,
    "wan": small_wan,
    "taehv": small_taehv,
    "tiny with pooling": lambda: small_tiny(pool=True, patch_size=2),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_devices_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pictures(height=30, width=44)
    latents: dict[str, Any] = {}
    images: dict[str, Any] = {}
    network = NETWORKS[name]()
    for cpu in (True, False):
        gpu_branch.force(monkeypatch, cpu=cpu)
        vae = VAE(network=network)
        latents[f"cpu {cpu}"] = vae.encode(image)
        images[f"cpu {cpu}"] = vae.decode(latents["cpu True"], size=(30, 44))
    network.update(tree_map(lambda array: array.astype(mx.bfloat16), network.parameters()))
    half = VAE(network=network)
    assert images["cpu True"].shape == image.shape and images["cpu True"].dtype == mx.float32
    np.testing.assert_allclose(latents["cpu False"], latents["cpu True"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(images["cpu False"], images["cpu True"], rtol=0, atol=0.02)
    np.testing.assert_allclose(half.decode(latents["cpu True"], size=(30, 44)), images["cpu True"], rtol=0, atol=12)


def test_saved_networks_have_zeros_for_videos(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = small_wan()
    with caplog.at_level(logging.WARNING, "mflux_vae"):
        loading.save_network(network, tmp_path)
    assert "single images" in caplog.text
    stored, _ = open_weights(tmp_path / f"{STEM}.safetensors")
    times = {name: tensor.load() for name, tensor in stored.items() if ".time_conv." in name}
    assert {name.rpartition(".time_conv")[0] for name in times if name.endswith("weight")} == {
        *("encoder.down_blocks.5", "encoder.down_blocks.8"),
        *("decoder.up_blocks.0.upsamplers.0", "decoder.up_blocks.1.upsamplers.0"),
    }
    assert not any(tensor.any() for tensor in times.values())
    kernel = stored["encoder.conv_in.weight"].load()
    assert kernel.shape == (8, 3, 3, 3, 3) and kernel[:, :, 2].any() and not kernel[:, :, :2].any()
    again = loading.open_network(tmp_path)
    expected = dict(tree_flatten(network.parameters()))
    assert all(mx.array_equal(value, expected[name]) for name, value in tree_flatten(again.parameters()))
    assert again.config == network.config


def test_half_precision_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights may be float16 on a GPU unless the configuration says that activations overflow."""
    gpu_branch.force(monkeypatch)
    for upcast, dtype in ((False, mx.float16), (True, mx.float32)):
        loading.save_network(small_qwen_image(force_upcast=upcast), tmp_path / str(upcast))
        assert VAE.from_pretrained(tmp_path / str(upcast), dtype=mx.float16).dtype == dtype


def test_tiny_autoencoder_previews_flux2() -> None:
    """Both have patches of 2 x 2 latents."""
    vae = VAE(network=small_flux2())
    latents = vae.encode(pictures(height=32, width=48))
    tiny = VAE(network=small_tiny(latent_channels=3, pool=True, patch_size=2))
    assert Previewer(vae, tiny)(latents).shape == (2, 32, 48, 3)


@pytest.mark.parametrize(
    ("kind", "changes", "word"),
    [
        (AutoencoderKLWanConfig, {"is_residual": True}, "is_residual"),
        (AutoencoderKLWanConfig, {"temperal_downsample": [True]}, "temperal_downsample"),
        (AutoencoderKLWanConfig, {"latents_std": [1.0] * 3}, "latents_std"),
        (AutoencoderKLWanConfig, {"latents_std": [0.0] * 16}, "latents_std"),
        (AutoencoderKLWanConfig, {"dim_mult": [1, 1, 1, 1], "base_dim": 3}, "odd"),
        (AutoencoderKLWanConfig, {"dim_mult": []}, "dim_mult"),
        (AutoencoderKLQwenImageConfig, {"attn_scales": [0.5]}, "attn_scales"),
        (AutoencoderKLQwenImageConfig, {"input_channels": 3, "decoder_base_dim": 4}, "equal channels"),
        (TAEHVConfig, {"decoder_widths": [1, 2]}, "decoder_widths"),
        (TAEHVConfig, {"latent_channels": 0}, "latent_channels"),
    ],
)
def test_configurations_are_checked(kind: Any, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        kind.from_dict({**kind().to_dict(), **changes})
