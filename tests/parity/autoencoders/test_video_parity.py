"""Wan's and Qwen-Image's autoencoders on one frame against diffusers; TAEF2 and TAEHV against the published code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae import VAE  # noqa: E402
from mflux_vae.networks.tiny import AutoencoderTiny, AutoencoderTinyConfig  # noqa: E402
from mflux_vae.pretrained import loading  # noqa: E402
from mflux_vae.pretrained.families import FAMILIES  # noqa: E402
from mflux_vae.pretrained.presets import PRESETS  # noqa: E402
from mflux_vae.weights.keymaps.rules import from_mlx  # noqa: E402
from tests.mflux_vae.small_models import drawn, small_qwen_image, small_taehv, small_wan  # noqa: E402
from tests.parity.references import tiny_autoencoders  # noqa: E402
from tests.parity.test_vae_parity import LIMIT, error, settings_of, to_torch  # noqa: E402

MID = {"base_dim": 32, "z_dim": 16, "latents_mean": (0.1,) * 16, "latents_std": (2.0,) * 16}
NETWORKS = {
    "qwen-image": small_qwen_image,
    "qwen-image, mid-size": lambda seed: small_qwen_image(seed, **{**MID, "num_res_blocks": 2}),
    "qwen-image, one channel": lambda seed: small_qwen_image(seed, in_channels=1, out_channels=1),
    "qwen-image, two levels": lambda seed: small_qwen_image(seed, dim_mult=(2, 3), temperal_downsample=(True,)),
    "wan": small_wan,
}


def theirs_of(ours: Any, seed: int = 0) -> Any:
    """diffusers' model with the weights of ours; those for past frames are random."""
    torch.manual_seed(seed)
    kind = getattr(diffusers, ours.config.to_dict()["_class_name"])
    model = kind(**settings_of(ours.config))
    family = FAMILIES[type(ours).__name__]
    tensors = from_mlx(dict(tree_flatten(ours.parameters())), family.tables["diffusers"])
    state = model.state_dict()
    for name, value in tensors.items():
        mine = torch.from_numpy(np.array(value))
        state[name] = mine if mine.ndim < 5 else torch.cat([state[name][:, :, :-1], mine[:, :, -1:]], dim=2)
    model.load_state_dict(state)
    return model.eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_one_frame_agrees(name: str) -> None:
    ours = NETWORKS[name](7)
    theirs = theirs_of(ours)
    pixels = mx.random.uniform(-1, 1, (2, 32, 48, ours.config.in_channels), key=mx.random.key(1))
    mine = ours.encode(pixels)
    image = to_torch(pixels).requires_grad_()
    posterior = theirs.encode(image[:, :, None]).latent_dist
    assert error(mine.mean, posterior.mean[:, :, 0]) <= LIMIT
    assert error(mine.logvar, posterior.logvar[:, :, 0]) <= LIMIT
    decoded = theirs.decode(posterior.mean).sample[:, :, 0]
    assert error(mx.clip(ours.decode(mine.mode()), -1, 1), decoded) <= LIMIT

    def loss(pixels: mx.array) -> mx.array:
        return (mx.clip(ours.decode(ours.encode(pixels).mean), -1, 1) ** 2).mean()

    decoded.square().mean().backward()
    assert error(mx.grad(loss)(pixels), image.grad) <= 3 * LIMIT


@pytest.mark.parametrize("name", ["qwen-image", "wan2.1"])
def test_names_and_shapes_at_published_size(name: str, tmp_path: Path) -> None:
    """Nothing is computed. `save_network` adds the convolutions in time, so it runs at a small size."""
    preset = PRESETS[name]
    with torch.device("meta"):
        theirs = getattr(diffusers, preset.family)(**settings_of(preset.config))
    assert type(preset.config).from_dict(theirs.config) == preset.config
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items() if "time_conv" not in key}
    mine = dict(tree_flatten(FAMILIES[preset.family].network(preset.config).parameters()))
    written = from_mlx(mine, FAMILIES[preset.family].tables["diffusers"])
    assert {key: tuple(value.shape) for key, value in written.items()} == shapes
    assert sum(value.numel() for value in theirs.parameters()) == 126_892_531


@pytest.mark.parametrize("build", [small_qwen_image, small_wan])
def test_diffusers_opens_what_we_save(build: Any, tmp_path: Path) -> None:
    """Zeros stand for past frames, and images stay the same."""
    vae = VAE(network=build())
    vae.save_pretrained(tmp_path)
    kind = getattr(diffusers, type(vae.network).__name__)
    theirs, mismatches = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(mismatches.values()), mismatches
    pixels = mx.random.uniform(-1, 1, (1, 32, 32, 3), key=mx.random.key(1))
    expected = theirs.encode(to_torch(pixels)[:, :, None]).latent_dist.mean[:, :, 0]
    assert error(vae.network.encode(pixels).mean, expected) <= LIMIT


def test_conversions_keep_the_weights_for_videos(tmp_path: Path) -> None:
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
    from safetensors.torch import load_file

    theirs = theirs_of(small_qwen_image(num_res_blocks=2))
    theirs.save_pretrained(tmp_path / "theirs")
    loading.convert(tmp_path / "theirs", tmp_path / "wan.safetensors", "wan")
    loading.convert(tmp_path / "wan.safetensors", tmp_path / "back", "diffusers")
    expected = theirs.state_dict()
    back = load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    theirs_renamed = convert_wan_vae_to_diffusers(load_file(tmp_path / "wan.safetensors"))
    for found in (back, theirs_renamed):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_scaled_latents_of_qwen_image_agree() -> None:
    """With what diffusers' pipelines do around the autoencoder."""
    ours = small_qwen_image()
    raw = mx.random.normal((2, 4, 6, 4), key=mx.random.key(2))
    mean, std = (torch.tensor(getattr(ours.config, f"latents_{name}")).view(1, 4, 1, 1) for name in ("mean", "std"))
    assert error(ours.to_scaled(raw), (to_torch(raw) - mean) / std) <= 1e-6
    assert error(ours.from_scaled(raw), to_torch(raw) * std + mean) <= 1e-6


def published(ours: Any) -> Any:
    """The published code with the weights of ours; strict, so the keys are the same."""
    config = ours.config
    if isinstance(ours, AutoencoderTiny):
        blocks = config.num_encoder_blocks, config.num_decoder_blocks
        model = tiny_autoencoders.TAEF2(config.encoder_block_out_channels[0], config.latent_channels, *blocks)
        naming = "taesd"
    else:
        model = tiny_autoencoders.TAEHV(config.encoder_width, config.latent_channels, config.decoder_widths)
        naming = "diffusers"
    weights = dict(tree_flatten(ours.parameters()))
    tensors = from_mlx(weights, FAMILIES[type(ours).__name__].rules(naming, weights))
    model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in tensors.items()})
    return model.eval()


TINY = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "latent_channels": 6}


@pytest.mark.parametrize("name", ["taef2", "taew2.1"])
@torch.no_grad()
def test_tiny_autoencoders_agree(name: str) -> None:
    if name == "taef2":
        ours = drawn(AutoencoderTiny(AutoencoderTinyConfig(pool=True, patch_size=2, **TINY)), 7)
    else:
        ours = small_taehv(7)
    theirs = published(ours)
    encode, decode = (getattr(theirs, way, getattr(theirs, f"{way}r")) for way in ("encode", "decode"))
    pixels = mx.random.uniform(-1, 1, (2, 32, 48, 3), key=mx.random.key(1))
    latents = mx.random.normal((2, 4, 6, ours.config.latent_channels), key=mx.random.key(2))
    assert error(ours.encode(pixels).mean, encode(to_torch(pixels) / 2 + 0.5)) <= LIMIT
    assert error(ours.decode(latents), decode(to_torch(latents)) * 2 - 1) <= LIMIT
    if name == "taef2":  # its denoiser sees patches, as a pixel_unshuffle orders them
        vae = VAE(network=ours)
        expected = torch.nn.functional.pixel_unshuffle(to_torch(latents), 2)
        assert error(vae.scaled(latents), expected) == 0
