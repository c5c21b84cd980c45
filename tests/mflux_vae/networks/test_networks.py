"""Networks follow their configurations: sizes, names, refusals; they train."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mflux_vae import AutoencoderKL, AutoencoderKLConfig, ImageError, PlainAutoencoder, PlainConfig, SettingsError
from mflux_vae.networks import plain
from mflux_vae.networks.flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config
from mflux_vae.networks.latent_scaling import patchify, unpatchify
from mflux_vae.networks.layers import LinearAttention, avg_pool_2x
from mflux_vae.networks.tiny import AutoencoderTiny, AutoencoderTinyConfig
from mflux_vae.pretrained.families import FAMILIES
from mflux_vae.pretrained.locate import family_of
from mflux_vae.runtime.device import is_cpu
from tests.mflux_vae.small_models import small_flux2, small_kl, small_plain, small_tiny

LEVELS = st.integers(1, 4)


def _widths(levels: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.sampled_from([4, 8, 12]), min_size=levels, max_size=levels).map(tuple)


def _some(levels: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.sets(st.integers(0, levels - 1)).map(sorted).map(tuple)


def _network(levels: int) -> dict[str, st.SearchStrategy[Any]]:
    """Settings that AutoencoderKL and FLUX.2's have in common."""
    return {
        "in_channels": st.integers(1, 4),
        "out_channels": st.integers(1, 4),
        "latent_channels": st.integers(1, 8),
        "block_out_channels": _widths(levels),
        "decoder_block_out_channels": st.none() | _widths(levels),
        "layers_per_block": st.integers(1, 3),
        "norm_num_groups": st.sampled_from([1, 2, 4]),
        "mid_block_add_attention": st.booleans(),
        "force_upcast": st.booleans(),
        "sample_size": st.sampled_from([32, 1024]),
        "encoder_attention": _some(levels),
        "decoder_attention": _some(levels),
        "attention_type": st.sampled_from(["vanilla", "linear"]),
        "dropout": st.sampled_from([0.0, 0.5]),
        "resample_with_conv": st.booleans(),
        "double_z": st.booleans(),
        "stem_channels": st.sampled_from([None, 4, 8]),
    }


kl_configs = LEVELS.flatmap(
    lambda levels: st.builds(
        AutoencoderKLConfig,
        scaling_factor=st.floats(0.01, 2),
        shift_factor=st.none() | st.floats(-1, 1),
        use_quant_conv=st.booleans(),
        use_post_quant_conv=st.booleans(),
        **_network(levels),
    )
)
flux2_configs = LEVELS.flatmap(
    lambda levels: st.builds(
        AutoencoderKLFlux2Config,
        z_channels=st.sampled_from([None, 3]),
        batch_norm_eps=st.sampled_from([1e-4, 1e-5]),
        patch_size=st.sampled_from([(1, 1), (2, 2)]),
        **_network(levels),
    )
)
tiny_configs = LEVELS.flatmap(
    lambda levels: st.builds(
        AutoencoderTinyConfig,
        latent_channels=st.integers(1, 8),
        encoder_block_out_channels=st.integers(1, 9).map(lambda width: (width,) * levels),
        decoder_block_out_channels=st.integers(1, 9).map(lambda width: (width,) * levels),
        num_encoder_blocks=st.lists(st.integers(0, 2), min_size=levels, max_size=levels).map(tuple),
        num_decoder_blocks=st.lists(st.integers(0, 2), min_size=levels, max_size=levels).map(tuple),
        scaling_factor=st.floats(0.01, 2),
        shift_factor=st.floats(-1, 1),
    )
)
plain_configs = st.builds(
    PlainConfig,
    latent_channels=st.integers(1, 8),
    channels=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    bottleneck_blocks=st.integers(0, 2),
    shift_factor=st.none() | st.floats(-1, 1),
)


any_config = st.one_of(kl_configs, flux2_configs, tiny_configs, plain_configs)
NETWORKS = {
    AutoencoderKLConfig: AutoencoderKL,
    AutoencoderKLFlux2Config: AutoencoderKLFlux2,
    AutoencoderTinyConfig: AutoencoderTiny,
    PlainConfig: PlainAutoencoder,
}


@settings(max_examples=50, deadline=None, derandomize=True)
@given(any_config)
def test_configurations_there_and_back(config: Any) -> None:
    written = json.loads(json.dumps(config.to_dict()))
    assert type(config).from_dict(written) == config
    assert FAMILIES[family_of(written, "here")].config is type(config)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(any_config, st.integers(1, 2), st.integers(1, 3))
def test_sizes_follow_the_configuration(config: Any, height: int, width: int) -> None:
    """Shapes only: nothing is computed."""
    network = NETWORKS[type(config)](config)
    factor, times = config.downsampling, config.scaled_downsampling // config.downsampling
    posterior = network.encode(mx.zeros((2, factor * times * height, factor * times * width, config.in_channels)))
    raw = (2, times * height, times * width, config.latent_channels)
    assert posterior.mean.shape == posterior.logvar.shape == raw
    assert network.to_scaled(posterior.mean).shape == (2, height, width, config.scaled_channels)
    assert network.from_scaled(network.to_scaled(posterior.mean)).shape == raw
    pixels = network.decode(posterior.mean)
    assert pixels.shape == (2, factor * times * height, factor * times * width, config.out_channels)


@pytest.mark.parametrize(
    "build",
    [
        small_kl,
        partial(small_kl, shift_factor=0.5, scaling_factor=3.0),
        partial(small_kl, latents_mean=(1, 2, 3, 4), latents_std=(4, 3, 2, 1)),
        small_flux2,
        small_tiny,
        partial(small_plain, shift_factor=-1.0, scaling_factor=0.2),
    ],
)
def test_scaled_latents_there_and_back(build: Any) -> None:
    network = build()
    raw = mx.random.normal((2, 4, 6, network.config.latent_channels), key=mx.random.key(0))
    scaled = network.to_scaled(raw)
    assert float(mx.abs(scaled.reshape(-1)[: raw.size] - raw.reshape(-1)).max()) > 0.1 or build is small_tiny
    assert float(mx.abs(network.from_scaled(scaled) - raw).max()) < 1e-5


def test_what_a_configuration_leaves_out_is_what_diffusers_takes() -> None:
    config = AutoencoderKLConfig.from_dict({"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.1"})
    assert (config.block_out_channels, config.layers_per_block, config.sample_size) == ((64,), 1, 32)
    assert (config.scaling_factor, config.force_upcast, config.use_quant_conv) == (0.18215, True, True)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"down_block_types": ["DownEncoderBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"]}, "UpBlock2D"),
        ({"act_fn": "mish"}, "mish"),
        ({"latents_mean": [0.0] * 3}, "latents_mean has 3 values for 4 channels"),
        ({"norm_num_groups": 3}, "multiples of norm_num_groups"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"block_out_channels": 128}, "invalid"),
        ({"block_out_channels": ["128"] * 4}, "invalid"),
        ({"latent_channels": "4"}, "invalid"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "1 down_block_types for 4"),
        ({"decoder_block_out_channels": [128, 256]}, "differ in length, 4 and 2"),
        ({"decoder_block_out_channels": [96, 192, 384, 100]}, "decoder_block_out_channels"),
        ({"attention_type": "flash"}, "vanilla, linear, not 'flash'"),
        ({"dropout": 1.0}, "dropout"),
        ({"stem_channels": 100}, "stem_channels"),
        ({"z_channels": -4}, "z_channels must be positive"),
        ({"scaling_factor": 0.0}, "scaling_factor"),
        ({"z_channels": 8, "use_quant_conv": False}, "z_channels"),
        ({"latent_channels": 0}, "latent_channels must be positive"),
        ({"layers_per_block": 0}, "layers_per_block must be positive"),
    ],
)
def test_unsupported_configurations_are_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        AutoencoderKLConfig.from_dict({**AutoencoderKLConfig().to_dict(), **changes})


def test_one_network_has_one_configuration() -> None:
    said = AutoencoderKLConfig(
        encoder_attention=(3, 1, 3),
        decoder_block_out_channels=(128, 256, 512, 512),
        z_channels=4,
        stem_channels=128,
    )
    assert said == AutoencoderKLConfig(encoder_attention=(1, 3))


@pytest.mark.parametrize("name", ["encoder_attention", "decoder_attention"])
def test_attention_beyond_the_levels_is_refused(name: str) -> None:
    with pytest.raises(SettingsError, match=f"{name} .4. beyond the levels 0 to 3"):
        AutoencoderKLConfig(**{name: (0, 4)})


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"act_fn": "silu"}, "act_fn 'silu' not supported"),
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor 4 not supported"),
        ({"encoder_block_out_channels": [64, 64, 128, 128]}, "must be one number, repeated"),
        ({"num_encoder_blocks": [1, 3]}, "not one per level"),
        ({"num_decoder_blocks": [3, 1], "decoder_block_out_channels": [64, 64]}, "differ in length"),
        ({"latent_channels": 0}, "latent_channels must be positive"),
        ({"num_encoder_blocks": 3}, "invalid"),
        ({"scaling_factor": 0}, "scaling_factor"),
    ],
)
def test_a_tiny_configuration_is_checked(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        AutoencoderTinyConfig.from_dict({**AutoencoderTinyConfig().to_dict(), **changes})


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"patch_size": [2, 3]}, "patch_size"),
        ({"patch_size": [2]}, "patch_size"),
        ({"block_out_channels": 128}, "invalid"),
    ],
)
def test_a_flux2_configuration_is_checked(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        AutoencoderKLFlux2Config.from_dict({**AutoencoderKLFlux2Config().to_dict(), **changes})


def test_flux2_refuses_scaling_factors() -> None:
    with pytest.raises(SettingsError, match="latents_mean"):
        AutoencoderKLFlux2Config(scaling_factor=0.3, latents_mean=(0.0,) * 32)
    hub = {"_class_name": "AutoencoderKLFlux2", "force_upcast": True, "scaling_factor": 0.18215, "shift_factor": None}
    assert AutoencoderKLFlux2Config.from_dict(hub) == AutoencoderKLFlux2Config()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"depth": 3}, "depth"),
        ({"channels": 64}, "invalid"),
        ({"channels": [64, 0]}, "positive"),
        ({"channels": []}, "positive"),
        ({"in_channels": 0}, "in_channels must be positive"),
    ],
)
def test_a_plain_configuration_is_checked(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        PlainConfig.from_dict({**PlainConfig().to_dict(), **changes})


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("build", [small_kl, small_plain, small_flux2, small_tiny])
def test_weights_decide_the_dtype(build, dtype: mx.Dtype) -> None:
    network = build()
    pixels = mx.random.uniform(-1, 1, (1, 16, 24, 3), key=mx.random.key(5))
    mean, decoded = network.encode(pixels).mean, network.decode(network.encode(pixels).mean)
    network.set_dtype(dtype)
    half = network.encode(pixels).mean
    # in evaluation on a GPU, activations of a float32 input stay float32
    expected = dtype if is_cpu() or network.training else mx.float32
    assert half.dtype == mx.float32 and network.decode(half).dtype == expected
    assert float(mx.abs(half - mean).max()) < 0.1 * float(mx.abs(mean).max())
    assert float(mx.abs(network.decode(half).astype(mx.float32) - decoded).max()) < 0.1 * float(mx.abs(decoded).max())


def test_residual_blocks_of_the_plain_network_start_as_the_identity() -> None:
    x = mx.random.normal((1, 4, 4, 5), key=mx.random.key(0))
    assert mx.array_equal(plain.ResBlock(5)(x), x)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("kind", ["plain", "kl"])
def test_a_few_steps_reduce_the_loss(kind: str) -> None:
    mx.random.seed(0)  # layers are initialised from MLX's global state
    if kind == "plain":
        network: nn.Module = PlainAutoencoder(PlainConfig(channels=(8, 12, 16), bottleneck_blocks=1))
    else:
        network = AutoencoderKL(
            AutoencoderKLConfig(block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4)
        )
    rows = mx.linspace(-1, 1, 16)
    pixels = mx.stack([mx.broadcast_to(rows, (16, 16)), mx.broadcast_to(rows[:, None], (16, 16))])
    pixels = mx.stack([pixels, -pixels, mx.zeros_like(pixels)], axis=-1)
    optimizer = optim.Adam(learning_rate=2e-3, bias_correction=True)

    def loss(network: nn.Module, pixels: mx.array, key: mx.array) -> mx.array:
        posterior = network.encode(pixels)
        error = mx.square(network.decode(posterior.sample(key)) - pixels).mean()
        return error + 1e-5 * posterior.kl().mean()

    losses = []
    for step in range(40):
        value, gradients = nn.value_and_grad(network, loss)(network, pixels, mx.random.key(step))
        optimizer.update(network, gradients)
        mx.eval(network.parameters(), optimizer.state)
        losses.append(float(value))
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(mx.abs(gradient).max().item() > 0 for _, gradient in tree_flatten(gradients))


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [
        ({"attention_type": "linear"}, ["attention_type"]),
        ({"resample_with_conv": False, "dropout": 0.1}, ["dropout", "resample_with_conv"]),
        ({"decoder_block_out_channels": (4, 4, 8, 8)}, ["decoder_block_out_channels"]),
        ({"double_z": False}, ["double_z"]),
        ({"z_channels": 6, "stem_channels": 4}, ["z_channels", "stem_channels"]),
        ({"dropout": 0.1}, []),
        ({"encoder_attention": (1,), "mid_block_add_attention": False}, []),
    ],
)
def test_what_diffusers_has_not_says_so(changes: dict[str, Any], reasons: list[str]) -> None:
    written = small_kl(**changes).config.to_dict()
    beyond = [name for name in reasons if name != "dropout"]
    assert written["_class_name"] == ("AutoencoderKLExtended" if beyond else "AutoencoderKL")
    assert written.get("_not_in_diffusers", []) == beyond
    assert all(name in written for name in changes if not name.endswith("_attention"))


def test_levels_with_attention_are_kinds_of_blocks() -> None:
    written = AutoencoderKLConfig(encoder_attention=(3,), decoder_attention=(3, 0)).to_dict()
    assert written["down_block_types"] == ["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"]
    kinds = ["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"]
    assert written["up_block_types"] == kinds  # from the lowest resolution up


def test_dropout_acts_in_training_only() -> None:
    network, plain_network = small_kl(dropout=0.5), small_kl()
    pixels = mx.random.uniform(-1, 1, (1, 16, 16, 3), key=mx.random.key(0))
    expected = plain_network.encode(pixels).mean
    assert mx.array_equal(network.encode(pixels).mean, expected)
    network.train()
    first, second = network.encode(pixels).mean, network.encode(pixels).mean
    assert not mx.array_equal(first, second) and not mx.array_equal(first, expected)
    mx.random.seed(3)
    again = network.encode(pixels).mean
    mx.random.seed(3)
    assert mx.array_equal(network.encode(pixels).mean, again)
    network.eval()
    assert mx.array_equal(network.encode(pixels).mean, expected)


@pytest.mark.parametrize("build", [small_tiny, partial(small_kl, double_z=False)])
def test_without_variances_a_posterior_is_a_point(build: Any) -> None:
    network = build()
    posterior = network.encode(mx.random.uniform(-1, 1, (2, 16, 16, 3), key=mx.random.key(0)))
    assert mx.array_equal(posterior.sample(mx.random.key(1)), posterior.mode())
    assert posterior.kl().tolist() == [0.0, 0.0]
    gradient = mx.grad(lambda mean: type(posterior).point(mean).kl().sum() + mx.square(mean).sum())(posterior.mean)
    assert mx.allclose(gradient, 2 * posterior.mean)


def test_linear_attention_is_a_sum_over_pixels() -> None:
    mx.random.seed(0)
    layer = LinearAttention(3)
    x = mx.random.normal((2, 4, 5, 3))
    q, k, v = np.split(np.array(x).reshape(2, 20, 3) @ np.array(layer.to_qkv.weight).T, 3, axis=-1)
    weights = np.exp(k) / np.exp(k).sum(axis=1, keepdims=True)
    context = np.einsum("bnd,bne->bde", weights, v)
    expected = np.einsum("bnd,bde->bne", q, context) @ np.array(layer.to_out.weight).T + np.array(layer.to_out.bias)
    np.testing.assert_allclose(layer(x), expected.reshape(2, 4, 5, 3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 6), (5, 7)])
def test_pooling_averages_every_four_pixels(size: tuple[int, int]) -> None:
    x = mx.random.normal((2, *size, 3), key=mx.random.key(0))
    whole = np.array(x)[:, :4, :6]
    expected = (whole[:, ::2, ::2] + whole[:, 1::2, ::2] + whole[:, ::2, 1::2] + whole[:, 1::2, 1::2]) / 4
    np.testing.assert_allclose(avg_pool_2x(x), expected, rtol=0, atol=1e-6)


def test_patchify_round_trip() -> None:
    x = mx.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    patches = patchify(x, 2)
    assert mx.array_equal(unpatchify(patches, 2), x)
    assert patches[1, 1, 2].tolist() == [x[1, 2 + i, 4 + j, c].item() for c in range(3) for i in (0, 1) for j in (0, 1)]
    with pytest.raises(ImageError, match="3 x 4"):
        patchify(mx.zeros((1, 3, 4, 2)), 2)


def test_running_statistics_are_no_weights() -> None:
    network = small_flux2()
    for change in (network.freeze, network.unfreeze):
        change()
        assert not any(name.startswith("bn.") for name, _ in tree_flatten(network.trainable_parameters()))
    assert network.trainable_parameters()["decoder"]
    assert [name for name, _ in tree_flatten(network.bn.parameters())] == [
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]
