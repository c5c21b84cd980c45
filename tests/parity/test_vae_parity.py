"""Autoencoders against diffusers, live, in float32, every preset; folders opened by one and written by the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from diffusers import Flux2Pipeline  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae import VAE, AutoencoderKL, AutoencoderKLConfig  # noqa: E402
from mflux_vae.pretrained.families import FAMILIES  # noqa: E402
from mflux_vae.pretrained.presets import PRESETS  # noqa: E402
from mflux_vae.weights.keymaps.rules import from_mlx  # noqa: E402
from tests.mflux_vae.pretrained.test_presets import PARAMETERS  # noqa: E402
from tests.mflux_vae.small_models import drawn, narrow, pictures, small_flux2, small_kl, small_tiny  # noqa: E402
from tests.parity.references.latent_diffusion import TheirAutoencoderKL  # noqa: E402

LIMIT = 1e-4
"""Largest difference, relative to the largest value."""

ELSEWHERE = ("qwen-image", "wan2.1", "taef2", "taew2.1")
"""Presets of `autoencoders.test_video_parity`."""

IN_DIFFUSERS = [name for name in PRESETS if name not in ELSEWHERE]

CONFIGS: dict[str, dict[str, Any]] = {
    "one channel": {"in_channels": 1, "out_channels": 1},
    "only one quant conv": {"use_quant_conv": False},
    "two layers": {"layers_per_block": 2, "block_out_channels": (8, 16, 24), "norm_num_groups": 8},
    "wide": {"block_out_channels": (32, 64, 128, 128), "norm_num_groups": 32, "layers_per_block": 2},
    "no downsampling": {"block_out_channels": (8,)},
    "five levels": {"block_out_channels": (8, 8, 8, 8, 16)},
    "attention": {"encoder_attention": (1, 3), "decoder_attention": (0, 3)},
    "attention but in the middle": {"encoder_attention": (3,), "mid_block_add_attention": False},
}
SIZES = [(32, 32), (24, 56), (72, 16)]


def settings_of(config: Any) -> dict[str, Any]:
    """What diffusers' class is built from; it takes no other names than its own."""
    return {key: value for key, value in config.to_dict().items() if not key.startswith("_")}


def theirs_of(ours: Any) -> Any:
    """diffusers' model with the same configuration and weights; strict, so the keys are the same, too."""
    name = ours.config.to_dict()["_class_name"]
    model = getattr(diffusers, name)(**settings_of(ours.config))
    tensors = from_mlx(dict(tree_flatten(ours.parameters())), FAMILIES[name].tables["diffusers"])
    model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}, strict=True)
    return model.eval()


def to_torch(nhwc: mx.array) -> Any:
    return torch.from_numpy(np.array(nhwc.transpose(0, 3, 1, 2)))


def error(ours: mx.array, theirs: Any) -> float:
    """NHWC against NCHW."""
    expected = theirs.detach().numpy().transpose(0, 2, 3, 1)
    assert ours.shape == expected.shape
    return float(np.abs(np.array(ours) - expected).max() / np.abs(expected).max())


@torch.no_grad()
def errors(ours: Any, theirs: Any, size: tuple[int, int]) -> dict[str, float]:
    """Of encoding, decoding, and both in a row, for two images."""
    config = ours.config
    pixels = mx.random.uniform(-1, 1, (2, *size, config.in_channels), key=mx.random.key(1))
    shape = (2, size[0] // config.downsampling, size[1] // config.downsampling, config.latent_channels)
    latents = mx.random.normal(shape, key=mx.random.key(2))
    encoded, mine = theirs.encode(to_torch(pixels)), ours.encode(pixels)
    if hasattr(encoded, "latents"):  # TAESD's, without variances
        assert mx.array_equal(mine.sample(mx.random.key(0)), mine.mode())
        found = {"mean": error(mine.mean, encoded.latents)}
        mode = encoded.latents
    else:
        mode = encoded.latent_dist.mode()
        logvar = encoded.latent_dist.logvar
        found = {"mean": error(mine.mean, mode), "logvar": error(mine.logvar, logvar)}
    found["decoded"] = error(ours.decode(latents), theirs.decode(to_torch(latents)).sample)
    found["round trip"] = error(ours.decode(mine.mode()), theirs.decode(mode).sample)
    return found


@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_every_preset_agrees(name: str) -> None:
    ours = narrow(PRESETS[name], seed=7)
    found = errors(ours, theirs_of(ours), (32, 48))
    assert max(found.values()) <= LIMIT, found


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_other_configurations_agree(changes: dict[str, Any], size: tuple[int, int]) -> None:
    if size[0] % 2 ** (len(changes.get("block_out_channels", ".")) - 1):
        size = (32, 48)
    ours = small_kl(seed=7, **changes)
    found = errors(ours, theirs_of(ours), size)
    assert max(found.values()) <= LIMIT, found


@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_names_and_shapes_at_published_size(name: str) -> None:
    """Nothing is computed: our arrays are lazy, theirs are on the meta device."""
    preset = PRESETS[name]
    ours = FAMILIES[preset.family].network(preset.config)
    with torch.device("meta"):
        theirs = getattr(diffusers, preset.family)(**settings_of(preset.config))
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    mine = from_mlx(dict(tree_flatten(ours.parameters())), FAMILIES[preset.family].tables["diffusers"])
    assert {key: tuple(value.shape) for key, value in mine.items()} == shapes
    count = sum(value.size for _, value in tree_flatten(ours.trainable_parameters()))
    assert (count, len(mine)) == PARAMETERS[name]
    assert count == sum(value.numel() for value in theirs.parameters())


@pytest.mark.parametrize("name", IN_DIFFUSERS)
def test_presets_are_configurations_of_diffusers(name: str) -> None:
    """What diffusers makes of ours, ours reads back."""
    config = PRESETS[name].config
    with torch.device("meta"):
        theirs = getattr(diffusers, PRESETS[name].family)(**settings_of(config))
    assert type(config).from_dict(theirs.config) == config


def test_scaled_latents_of_flux2_agree() -> None:
    """With what diffusers' pipeline does around its autoencoder."""
    ours = small_flux2(seed=4)
    theirs = theirs_of(ours)
    raw = mx.random.normal((2, 4, 6, 3), key=mx.random.key(2))
    mean = theirs.bn.running_mean.view(1, -1, 1, 1)
    std = torch.sqrt(theirs.bn.running_var.view(1, -1, 1, 1) + theirs.config.batch_norm_eps)
    expected = (Flux2Pipeline._patchify_latents(to_torch(raw)) - mean) / std
    assert error(ours.to_scaled(raw), expected) <= 1e-6
    scaled = mx.random.normal((2, 2, 3, 12), key=mx.random.key(3))
    expected = Flux2Pipeline._unpatchify_latents(to_torch(scaled) * std + mean)
    assert error(ours.from_scaled(scaled), expected) <= 1e-6


def test_scaled_latents_of_playground_agree() -> None:
    """With what diffusers' SDXL pipeline does before it decodes."""
    ours = narrow(PRESETS["playground"])
    scaled = mx.random.normal((2, 4, 6, 4), key=mx.random.key(2))
    mean = torch.tensor(ours.config.latents_mean).view(1, 4, 1, 1)
    std = torch.tensor(ours.config.latents_std).view(1, 4, 1, 1)
    expected = to_torch(scaled) * std / ours.config.scaling_factor + mean
    assert error(ours.from_scaled(scaled), expected) <= 1e-6


DDCONFIG: dict[str, Any] = {
    "ch": 32,
    "out_ch": 3,
    "ch_mult": (1, 2, 2),
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "in_channels": 3,
    "resolution": 32,
    "double_z": True,
    "z_channels": 5,
}
"""Seed of all those below: attention at the lowest resolution, besides the middle."""


@pytest.mark.parametrize(
    ("changes", "embed_dim"),
    [
        ({}, 5),
        ({"attn_resolutions": [16, 32]}, 5),
        ({"attn_resolutions": []}, 5),
        ({"attn_type": "none"}, 5),
        ({"attn_type": "linear", "attn_resolutions": [16]}, 5),
        ({"use_linear_attn": True}, 5),
        ({"resamp_with_conv": False, "num_res_blocks": 2}, 5),
        ({"dropout": 0.3}, 5),
        ({}, 3),
        ({"ch_mult": (2, 1, 3)}, 5),
        ({"double_z": False}, 4),
        ({"in_channels": 1, "out_ch": 1, "ch_mult": (1,)}, 5),
    ],
    ids=lambda value: ", ".join(f"{k} {v}" for k, v in value.items()) or "as is" if isinstance(value, dict) else None,
)
@torch.no_grad()
def test_ddconfig_agrees_with_latent_diffusion(changes: dict[str, Any], embed_dim: int) -> None:
    ddconfig = {**DDCONFIG, **changes}
    ours = AutoencoderKL(AutoencoderKLConfig.from_ddconfig(ddconfig, embed_dim))
    drawn(ours, 3)
    theirs = TheirAutoencoderKL(embed_dim=embed_dim, **ddconfig).eval()
    weights = dict(tree_flatten(ours.parameters()))
    tensors = from_mlx(weights, FAMILIES["AutoencoderKL"].rules("compvis", weights))
    theirs.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}, strict=True)
    pixels = mx.random.uniform(-1, 1, (2, 32, 48, ddconfig["in_channels"]), key=mx.random.key(1))
    mine = ours.encode(pixels)
    moments = theirs.quant_conv(theirs.encoder(to_torch(pixels)))
    mean = moments[:, :embed_dim]
    found = {"mean": error(mine.mean, mean), "decoded": error(ours.decode(mine.mean), theirs.decode(mean))}
    if ddconfig["double_z"]:
        found["logvar"] = error(mine.logvar, moments[:, embed_dim:].clamp(-30, 20))
    assert max(found.values()) <= LIMIT, found


def test_gradients_agree() -> None:
    ours = small_kl(seed=3, decoder_attention=(2,))
    theirs = theirs_of(ours)
    pixels = mx.random.uniform(-1, 1, (2, 24, 32, 3), key=mx.random.key(1))

    def loss(network: AutoencoderKL) -> mx.array:
        posterior = network.encode(pixels)
        return mx.square(network.decode(posterior.mean) - pixels).mean() + 1e-3 * posterior.kl().mean()

    value, gradients = nn.value_and_grad(ours, loss)(ours)
    image = to_torch(pixels)
    posterior = theirs.encode(image).latent_dist
    expected = (theirs.decode(posterior.mean).sample - image).square().mean() + 1e-3 * posterior.kl().mean()
    expected.backward()
    assert float(value) == pytest.approx(expected.item(), rel=1e-5)
    slopes = from_mlx(dict(tree_flatten(gradients)), FAMILIES["AutoencoderKL"].tables["diffusers"])
    largest = max(float(parameter.grad.abs().max()) for parameter in theirs.parameters())
    for name, parameter in theirs.named_parameters():
        np.testing.assert_allclose(slopes[name], parameter.grad, rtol=0, atol=1e-4 * largest, err_msg=name)


def test_gradients_of_taesd_agree() -> None:
    ours = small_tiny(seed=3)
    theirs = theirs_of(ours)
    pixels = mx.random.uniform(-1, 1, (2, 24, 32, 3), key=mx.random.key(1))

    def loss(network: nn.Module) -> mx.array:
        return mx.square(network.decode(network.encode(pixels).mode()) - pixels).mean()

    _, gradients = nn.value_and_grad(ours, loss)(ours)
    image = to_torch(pixels)
    (theirs.decode(theirs.encode(image).latents).sample - image).square().mean().backward()
    slopes = from_mlx(dict(tree_flatten(gradients)), FAMILIES["AutoencoderTiny"].tables["diffusers"])
    largest = max(float(parameter.grad.abs().max()) for parameter in theirs.parameters())
    for name, parameter in theirs.named_parameters():
        np.testing.assert_allclose(slopes[name], parameter.grad, rtol=0, atol=1e-4 * largest, err_msg=name)


FOLDERS = {
    "stable diffusion": lambda: small_kl(scaling_factor=0.3),
    "flux": lambda: narrow(PRESETS["flux1"]),
    "playground": lambda: narrow(PRESETS["playground"]),
    "attention": lambda: small_kl(encoder_attention=(1,), decoder_attention=(0, 2)),
    "flux 2": small_flux2,
    "taesd": small_tiny,
}


@pytest.mark.parametrize(
    "build", [*FOLDERS.values(), lambda: small_kl(dropout=0.2)], ids=[*FOLDERS, "dropout, which diffusers forgets"]
)
def test_diffusers_opens_what_we_save(build: Any, tmp_path: Path) -> None:
    vae = VAE(network=build())
    vae.save_pretrained(tmp_path)
    kind = getattr(diffusers, type(vae.network).__name__)
    theirs, told = kind.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    found = errors(vae.network, theirs.eval(), (32, 32))
    assert max(found.values()) <= LIMIT, found
    for name in ("scaling_factor", "shift_factor", "latents_mean"):
        if name in theirs.config and kind is not diffusers.AutoencoderKLFlux2:
            assert theirs.config[name] == settings_of(vae.config)[name]


@pytest.mark.parametrize("name", ["sd1", "flux1"])
@torch.no_grad()
def test_images_become_the_same_scaled_latents(name: str) -> None:
    vae, image = VAE(network=narrow(PRESETS[name])), pictures()
    theirs = theirs_of(vae.network)
    expected = theirs.encode(torch.from_numpy(np.array(image)).float() / 127.5 - 1).latent_dist.mode()
    expected = (expected - (theirs.config.shift_factor or 0)) * theirs.config.scaling_factor
    np.testing.assert_allclose(vae.encode(image), expected, rtol=0, atol=LIMIT * float(expected.abs().max()))


def test_diffusers_refuses_what_it_has_not(tmp_path: Path) -> None:
    """By its name: not as a network with some weights drawn at random."""
    VAE(network=small_kl(attention_type="linear")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="AutoencoderKLExtended"):
        diffusers.AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("build", FOLDERS.values(), ids=FOLDERS.keys())
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_we_open_what_diffusers_saves(build: Any, sharded: bool, tmp_path: Path) -> None:
    ours = build()
    theirs_of(ours).save_pretrained(tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists() == sharded
    again = VAE.from_pretrained(tmp_path).network
    assert type(again) is type(ours) and again.config == ours.config
    expected = dict(tree_flatten(ours.parameters()))
    opened = dict(tree_flatten(again.parameters()))
    assert opened.keys() == expected.keys()
    assert all(mx.array_equal(opened[name], expected[name]) for name in expected)
