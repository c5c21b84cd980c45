"""Networks follow their configurations: sizes, names, refusals; they train."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mflux_vae import AutoencoderKL, AutoencoderKLConfig, PlainAutoencoder, PlainConfig, SettingsError
from mflux_vae.networks import plain
from tests.vae.small import small_kl, small_plain

kl_configs = st.builds(
    AutoencoderKLConfig,
    in_channels=st.integers(1, 4),
    out_channels=st.integers(1, 4),
    latent_channels=st.integers(1, 32),
    block_out_channels=st.lists(st.sampled_from([4, 8, 12]), min_size=1, max_size=4).map(tuple),
    layers_per_block=st.integers(1, 3),
    norm_num_groups=st.sampled_from([1, 2, 4]),
    scaling_factor=st.floats(0.01, 2),
    shift_factor=st.none() | st.floats(-1, 1),
    use_quant_conv=st.booleans(),
    use_post_quant_conv=st.booleans(),
    mid_block_add_attention=st.booleans(),
    force_upcast=st.booleans(),
    sample_size=st.sampled_from([32, 1024]),
)
plain_configs = st.builds(
    PlainConfig,
    latent_channels=st.integers(1, 8),
    channels=st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    bottleneck_blocks=st.integers(0, 2),
    shift_factor=st.none() | st.floats(-1, 1),
)


def count(network: nn.Module) -> int:
    return sum(parameter.size for _, parameter in tree_flatten(network.parameters()))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.one_of(kl_configs, plain_configs))
def test_configurations_there_and_back(config: AutoencoderKLConfig | PlainConfig) -> None:
    assert type(config).from_dict(config.to_dict()) == config


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.one_of(kl_configs, plain_configs), st.integers(1, 3), st.integers(1, 3))
def test_sizes_follow_the_configuration(config: AutoencoderKLConfig | PlainConfig, height: int, width: int) -> None:
    network = AutoencoderKL(config) if isinstance(config, AutoencoderKLConfig) else PlainAutoencoder(config)
    factor = config.downsampling
    posterior = network.encode(mx.zeros((2, factor * height, factor * width, config.in_channels)))
    assert posterior.mean.shape == posterior.logvar.shape == (2, height, width, config.latent_channels)
    pixels = network.decode(posterior.mean)
    assert pixels.shape == (2, factor * height, factor * width, config.out_channels)


@pytest.mark.parametrize(
    ("changes", "parameters", "tensors"),
    [
        ({}, 83_653_863, 248),
        ({"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}, 83_819_683, 244),
    ],
    ids=["Stable Diffusion", "FLUX.1"],
)
def test_published_sizes(changes: dict[str, Any], parameters: int, tensors: int) -> None:
    network = AutoencoderKL(AutoencoderKLConfig(**changes))
    assert count(network) == parameters
    assert len(tree_flatten(network.parameters())) == tensors


def test_what_a_configuration_leaves_out_is_what_diffusers_takes() -> None:
    config = AutoencoderKLConfig.from_dict({"_class_name": "AutoencoderKL", "_diffusers_version": "0.4.1"})
    assert (config.block_out_channels, config.layers_per_block, config.sample_size) == ((64,), 1, 32)
    assert (config.scaling_factor, config.force_upcast, config.use_quant_conv) == (0.18215, True, True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"down_block_types": ["DownEncoderBlock2D", "SkipDownBlock2D"]}, "SkipDownBlock2D"),
        ({"up_block_types": ["UpBlock2D"]}, "UpBlock2D"),
        ({"act_fn": "mish"}, "mish"),
        ({"latents_mean": [0.0] * 3}, "latents_mean has 3 values for 4 channels"),
        ({"norm_num_groups": 3}, "multiples of norm_num_groups"),
        ({"block_out_channels": []}, "block_out_channels"),
        ({"block_out_channels": 128}, "wrong type"),
        ({"block_out_channels": ["128"] * 4}, "wrong type"),
        ({"latent_channels": "4"}, "wrong type"),
        ({"latent_channels": 0}, "latent_channels must be positive"),
        ({"layers_per_block": 0}, "layers_per_block must be positive"),
    ],
)
def test_what_the_network_has_not_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        AutoencoderKLConfig.from_dict({**AutoencoderKLConfig().to_dict(), **changes})


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"depth": 3}, "depth"),
        ({"channels": 64}, "not its configuration"),
        ({"channels": [64, 0]}, "positive"),
        ({"channels": []}, "positive"),
        ({"in_channels": 0}, "in_channels must be positive"),
    ],
)
def test_a_plain_configuration_is_checked(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        PlainConfig.from_dict({**PlainConfig().to_dict(), **changes})


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("build", [small_kl, small_plain])
def test_weights_decide_the_dtype(build, dtype: mx.Dtype) -> None:
    network = build()
    pixels = mx.random.uniform(-1, 1, (1, 16, 24, 3), key=mx.random.key(5))
    mean, decoded = network.encode(pixels).mean, network.decode(network.encode(pixels).mean)
    network.set_dtype(dtype)
    half = network.encode(pixels).mean
    assert half.dtype == mx.float32 and network.decode(half).dtype == dtype
    assert float(mx.abs(half - mean).max()) < 0.1 * float(mx.abs(mean).max())
    assert float(mx.abs(network.decode(half).astype(mx.float32) - decoded).max()) < 0.1 * float(mx.abs(decoded).max())


def test_residual_blocks_of_the_plain_network_start_as_the_identity() -> None:
    x = mx.random.normal((1, 4, 4, 5), key=mx.random.key(0))
    assert mx.array_equal(plain.ResBlock(5)(x), x)


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
