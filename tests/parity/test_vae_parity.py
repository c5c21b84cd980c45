"""AutoencoderKL against diffusers, live, in float32; folders opened by one and written by the other."""

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
from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae import VAE, AutoencoderKL, AutoencoderKLConfig  # noqa: E402
from mflux_vae.weights.diffusers import AUTOENCODER_KL  # noqa: E402
from mflux_vae.weights.rules import from_mlx  # noqa: E402
from tests.vae.small import pictures, small_kl  # noqa: E402

LIMIT = 1e-4
"""Largest difference, relative to the largest value."""

CONFIGS: dict[str, dict[str, Any]] = {
    "stable diffusion": {},
    "flux": {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1159},
    "no attention": {"latent_channels": 16, "mid_block_add_attention": False},
    "only one quant conv": {"use_quant_conv": False},
    "two layers": {"layers_per_block": 2, "block_out_channels": (8, 16, 24), "norm_num_groups": 8},
    "wide": {"block_out_channels": (32, 64, 128, 128), "norm_num_groups": 32, "layers_per_block": 2},
    "no downsampling": {"block_out_channels": (8,)},
}
SIZES = [(32, 32), (24, 56), (72, 16)]


def theirs_of(ours: AutoencoderKL) -> Any:
    """diffusers' model with the same configuration and weights; strict, so the keys are the same, too."""
    settings = {key: value for key, value in ours.config.to_dict().items() if key != "_class_name"}
    model = diffusers.AutoencoderKL(**settings)
    tensors = from_mlx(dict(tree_flatten(ours.parameters())), AUTOENCODER_KL)
    model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in tensors.items()}, strict=True)
    return model.eval()


def to_torch(nhwc: mx.array) -> Any:
    return torch.from_numpy(np.array(nhwc.transpose(0, 3, 1, 2)))


def error(ours: mx.array, theirs: Any) -> float:
    """NHWC against NCHW."""
    expected = theirs.detach().numpy().transpose(0, 2, 3, 1)
    assert ours.shape == expected.shape
    return float(np.abs(np.array(ours) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("size", SIZES, ids="{0[0]}x{0[1]}".format)
def test_encoder_and_decoder_agree(changes: dict[str, Any], size: tuple[int, int]) -> None:
    ours = small_kl(seed=7, **changes)
    theirs = theirs_of(ours)
    pixels = mx.random.uniform(-1, 1, (2, *size, 3), key=mx.random.key(1))
    factor = ours.config.downsampling
    latents = mx.random.normal(
        (2, size[0] // factor, size[1] // factor, ours.config.latent_channels), key=mx.random.key(2)
    )
    with torch.no_grad():
        posterior = theirs.encode(to_torch(pixels)).latent_dist
        decoded = theirs.decode(to_torch(latents)).sample
    mine = ours.encode(pixels)
    errors = {
        "mean": error(mine.mean, posterior.mean),
        "logvar": error(mine.logvar, posterior.logvar),
        "decoded": error(ours.decode(latents), decoded),
    }
    assert max(errors.values()) <= LIMIT, errors


def test_gradients_agree() -> None:
    ours = small_kl(seed=3)
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
    slopes = from_mlx(dict(tree_flatten(gradients)), AUTOENCODER_KL)
    largest = max(float(parameter.grad.abs().max()) for parameter in theirs.parameters())
    for name, parameter in theirs.named_parameters():
        np.testing.assert_allclose(slopes[name], parameter.grad, rtol=0, atol=1e-4 * largest, err_msg=name)


@pytest.mark.parametrize("changes", [CONFIGS["stable diffusion"], CONFIGS["flux"]], ids=["stable diffusion", "flux"])
def test_diffusers_opens_what_we_save(changes: dict[str, Any], tmp_path: Path) -> None:
    vae = VAE(network=small_kl(**changes, scaling_factor=0.3))
    vae.save_pretrained(tmp_path)
    theirs, told = diffusers.AutoencoderKL.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values()), told
    assert theirs.config.scaling_factor == 0.3 and theirs.config.shift_factor == vae.config.shift_factor
    image = pictures()
    with torch.no_grad():
        expected = theirs.encode(torch.from_numpy(np.array(image)).float() / 127.5 - 1).latent_dist.mode()
    expected = (expected - vae.shift_factor) * 0.3
    np.testing.assert_allclose(vae.encode(image), expected, rtol=0, atol=LIMIT * float(expected.abs().max()))


@pytest.mark.parametrize("changes", [CONFIGS["stable diffusion"], CONFIGS["flux"]], ids=["stable diffusion", "flux"])
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_we_open_what_diffusers_saves(changes: dict[str, Any], sharded: bool, tmp_path: Path) -> None:
    ours = small_kl(seed=5, **changes)
    theirs_of(ours).save_pretrained(tmp_path, max_shard_size="60KB" if sharded else "1GB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").exists() == sharded
    again = VAE.from_pretrained(tmp_path).network
    assert again.config == ours.config
    expected = dict(tree_flatten(ours.parameters()))
    opened = dict(tree_flatten(again.parameters()))
    assert opened.keys() == expected.keys()
    assert all(mx.array_equal(opened[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, 83_653_863),
        (
            {
                "latent_channels": 16,
                "use_quant_conv": False,
                "use_post_quant_conv": False,
                "scaling_factor": 0.3611,
                "shift_factor": 0.1159,
                "sample_size": 1024,
            },
            83_819_683,
        ),
    ],
    ids=["stable diffusion", "flux"],
)
def test_names_and_shapes_at_published_size(changes: dict[str, Any], parameters: int) -> None:
    ours = AutoencoderKL(AutoencoderKLConfig(**changes))  # nothing is computed: arrays are lazy
    settings = {key: value for key, value in ours.config.to_dict().items() if key != "_class_name"}
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(**settings)
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    mine = from_mlx(dict(tree_flatten(ours.parameters())), AUTOENCODER_KL)
    assert {key: tuple(value.shape) for key, value in mine.items()} == shapes
    assert sum(value.size for value in mine.values()) == parameters
