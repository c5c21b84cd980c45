"""The autoencoder with vector latents: sizes, counts, its kernels against MLX's own, batch norm, files, the `VAE`."""

from __future__ import annotations

import json
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from mflux_vae import VAE, ImageError, SettingsError, WeightsError, kernels
from mflux_vae.networks.layers import BatchNorm, batch_statistics, fold_statistics
from mflux_vae.networks.vector_latent import FlatAutoencoder, FlatConfig
from mflux_vae.pretrained.families import FAMILIES
from mflux_vae.pretrained.loading import convert, describe, open_network, save_network
from mflux_vae.weights.formats.files import read_json
from tests.mflux_vae.small_models import drawn

configs = st.builds(
    FlatConfig,
    in_channels=st.sampled_from([1, 3]),
    out_channels=st.sampled_from([1, 3]),
    hidden_dims=st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple),
    latent_dim=st.integers(1, 5),
    image_size=st.integers(1, 40),
    batch_norm=st.booleans(),
    upsampling=st.sampled_from(["transposed", "repeat"]),
    last_conv=st.booleans(),
    output=st.sampled_from(["sigmoid", "tanh", "linear"]),
)


def small(seed: int = 0, **changes: Any) -> FlatAutoencoder:
    """7 x 7 pixels, three numbers, in evaluation."""
    network = FlatAutoencoder(FlatConfig(**{"hidden_dims": (4, 6), "latent_dim": 3, "image_size": 7, **changes}))
    drawn(network, seed)
    return network.eval()


def pixels(batch: int = 2, size: int = 7, channels: int = 1, seed: int = 0) -> mx.array:
    return mx.random.uniform(-1, 1, (batch, size, size, channels), key=mx.random.key(seed))


def trainable(network: nn.Module) -> int:
    return sum(value.size for _, value in tree_flatten(network.trainable_parameters()))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(configs)
def test_any_image_comes_back_in_its_size_and_configurations_too(config):
    """Shapes only: nothing is computed."""
    network = FlatAutoencoder(config)
    posterior = network.encode(mx.zeros((2, config.image_size, config.image_size, config.in_channels)))
    assert posterior.mean.shape == posterior.logvar.shape == (2, config.latent_dim)
    assert network.decode(posterior.mean).shape == (2, config.image_size, config.image_size, config.out_channels)
    written = json.loads(json.dumps(config.to_dict()))
    assert FlatConfig.from_dict(written) == config
    assert FAMILIES[written["_class_name"]].config is FlatConfig


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        # the MLX example's, of 64 x 64 pixels, with up to 64 filters
        (
            {
                "hidden_dims": (16, 32, 64),
                "latent_dim": 8,
                "image_size": 64,
                "upsampling": "repeat",
                "last_conv": False,
            },
            149_265,
        ),
        # PyTorch-VAE's VanillaVAE, of 256 x 256 pixels
        (
            {
                "in_channels": 3,
                "out_channels": 3,
                "hidden_dims": (64, 128, 256, 512, 1024),
                "latent_dim": 256,
                "image_size": 256,
                "output": "tanh",
            },
            62_980_803,
        ),
    ],
)
def test_published_sizes(changes, count):
    assert trainable(FlatAutoencoder(FlatConfig(**changes))) == count


@pytest.mark.parametrize("size", [(10, 8), (9, 8), (10, 7), (9, 7)])
def test_transposed_convolution_is_mlx_own_with_its_gradients(size):
    keys = mx.random.split(mx.random.key(0), 4)
    shapes = [(2, 5, 4, 3), (6, 3, 3, 3), (6,)]
    x, weight, bias = (mx.random.normal(shape, key=key) for shape, key in zip(shapes, keys, strict=False))
    extra = (size[0] - 9, size[1] - 7)
    cotangent = mx.random.normal((2, *size, 6), key=keys[3])

    def reference(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        return mx.conv_transpose2d(x, weight, stride=2, padding=1, output_padding=extra) + bias

    def ours(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
        return kernels.conv_transpose2d(x, weight, bias, size=size)

    for function in (reference, ours):
        values = mx.vjp(function, [x, weight, bias], [cotangent])
        got = [*values[0], *values[1]]
        if function is reference:
            expected = got
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_outputs_are_in_the_range_that_their_name_says():
    latents = 30 * mx.random.normal((50, 3), key=mx.random.key(1))
    for output in ("sigmoid", "tanh"):
        made = small(output=output).decode(latents)
        assert made.min() >= -1 and made.max() <= 1 and made.max() - made.min() > 1
    assert mx.abs(small(output="linear").decode(latents)).max() > 1
    # the same weights: 2 sigmoid(x) - 1 = tanh(x / 2)
    network, other = small(output="sigmoid"), small(output="linear")
    np.testing.assert_allclose(network.decode(latents), np.tanh(np.array(other.decode(latents)) / 2), atol=1e-5)
    # what goes in with a sigmoid is [0, 1]
    same = other.encode(pixels() * 0.5 + 0.5).mean
    np.testing.assert_allclose(network.encode(pixels()).mean, same, atol=1e-6)


def test_batch_norm_is_the_definition_and_the_step_decides_when_it_is_remembered():
    norm = BatchNorm(3, momentum=0.25)
    norm.weight, norm.bias = mx.array([1.0, 2.0, 0.5]), mx.array([0.0, 1.0, -1.0])
    x = 3 + 2 * np.random.default_rng(0).standard_normal((4, 5, 6, 3)).astype(np.float32)
    mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
    expected = (x - mean) / np.sqrt(variance + 1e-5) * [1.0, 2.0, 0.5] + [0.0, 1.0, -1.0]
    np.testing.assert_allclose(norm(mx.array(x)), expected, atol=1e-5)
    np.testing.assert_array_equal(norm.running_mean, [0, 0, 0])
    seen = batch_statistics(norm)
    assert seen.keys() == {"running_mean", "running_var"} and not batch_statistics(norm)
    fold_statistics(norm, seen)
    np.testing.assert_allclose(norm.running_mean, 0.25 * mean, rtol=1e-5)
    np.testing.assert_allclose(norm.running_var, 0.75 + 0.25 * variance * 120 / 119, rtol=1e-5)
    norm.eval()
    shifted = (x - np.array(norm.running_mean)) / np.sqrt(np.array(norm.running_var) + 1e-5)
    np.testing.assert_allclose(norm(mx.array(x)), shifted * [1.0, 2.0, 0.5] + [0.0, 1.0, -1.0], atol=1e-5)
    assert not batch_statistics(norm)


def test_statistics_come_out_of_a_differentiated_function_and_no_optimizer_sees_them():
    network = small(output="linear").train()
    names = {name for name, _ in tree_flatten(network.trainable_parameters())}
    network.unfreeze()
    assert names == {name for name, _ in tree_flatten(network.trainable_parameters())}
    assert not any("running" in name for name in names)

    def loss(parameters: Any, x: mx.array) -> tuple[mx.array, dict[str, mx.array]]:
        network.update(parameters)
        value = mx.square(network.decode(network.encode(x).mean) - x).mean()
        return value, batch_statistics(network)

    parameters = network.trainable_parameters()
    before = network.parameters()["encoder"]["down"][0]["norm"]["running_mean"] + 0
    (_, plain), _ = mx.value_and_grad(loss)(parameters, pixels(8))
    network.update(parameters)
    assert len(plain) == 2 * 4
    fold_statistics(network, plain)
    after = network.encoder.down[0].norm.running_mean
    np.testing.assert_allclose(after, 0.9 * before + 0.1 * plain["encoder.down.0.norm.running_mean"], atol=1e-6)


def test_it_learns():
    network = small(latent_dim=8).train()
    x = pixels(8)
    step = nn.value_and_grad(network, lambda: mx.square(network.decode(network.encode(x).mean) - x).mean())
    first, _ = step()
    for _ in range(30):
        value, slopes = step()
        network.update(tree_map(lambda p, g: p - 0.3 * g, network.trainable_parameters(), slopes))
    assert value < 0.7 * first


@pytest.mark.parametrize("changes", [{}, {"upsampling": "repeat", "last_conv": False, "batch_norm": False}])
def test_files_there_and_back(tmp_path, changes):
    network = small(**changes)
    save_network(network, tmp_path / "folder")
    again = open_network(tmp_path / "folder")
    assert again.config == network.config and not again.training
    np.testing.assert_array_equal(
        again.decode(again.encode(pixels()).mean), network.decode(network.encode(pixels()).mean)
    )
    assert describe(tmp_path / "folder").parameters == trainable(network)
    convert(tmp_path / "folder", tmp_path / "single.safetensors", "diffusers")
    assert open_network(tmp_path / "single.safetensors").config == network.config


def test_weights_in_the_naming_of_pytorch_vae(tmp_path):
    network = small(output="tanh")
    save_network(network, tmp_path)
    path = tmp_path / "vanilla.safetensors"
    convert(tmp_path, path, "pytorch-vae")
    stored = mx.load(str(path))
    mx.eval(stored)  # before their file is overwritten
    expected = {f"encoder.{i}.0.{kind}" for i in (0, 1) for kind in ("weight", "bias")}
    expected |= {f"{name}.{kind}" for name in ("fc_mu", "fc_var", "decoder_input") for kind in ("weight", "bias")}
    expected |= {
        f"{name}.{kind}" for name in ("decoder.0.0", "final_layer.0", "final_layer.3") for kind in ("weight", "bias")
    }
    norms = ["encoder.0.1", "encoder.1.1", "decoder.0.1", "final_layer.1"]
    expected |= {f"{name}.{kind}" for name in norms for kind in ("weight", "bias", "running_mean", "running_var")}
    assert stored.keys() == expected
    assert stored["decoder.0.0.weight"].shape == (6, 4, 3, 3)  # torch's (in, out, 3, 3)
    mx.save_safetensors(str(path), {**stored, "encoder.0.1.num_batches_tracked": mx.array(3)})
    with pytest.raises(WeightsError, match="configuration"):
        open_network(path)
    again = open_network(path, config=read_json(tmp_path / "config.json"))
    np.testing.assert_array_equal(
        again.decode(again.encode(pixels()).mean), network.decode(network.encode(pixels()).mean)
    )


def test_the_vae_takes_vectors_through():
    vae = VAE(network=small())
    image = mx.random.randint(0, 256, (2, 1, 7, 7), key=mx.random.key(0)).astype(mx.uint8)
    latents = vae.encode(image)
    assert latents.shape == (2, 3) == (2, vae.latent_channels)
    inside = image.astype(mx.float32).transpose(0, 2, 3, 1) / 127.5 - 1
    np.testing.assert_allclose(latents, vae.network.encode(inside).mean, atol=1e-6)
    np.testing.assert_allclose(vae.encode_nhwc(inside), latents, atol=1e-6)
    made = vae.decode(latents)
    assert made.shape == (2, 1, 7, 7)
    np.testing.assert_allclose(made, vae(image)[0])
    np.testing.assert_allclose(vae.decode_nhwc(latents).transpose(0, 3, 1, 2) * 127.5 + 127.5, made, atol=1e-4)
    pictures = vae.decode_images(vae.encode_images([np.zeros((7, 7), np.uint8)]))
    assert [picture.size for picture in pictures] == [(7, 7)]


def test_smaller_images_are_padded_and_cropped_and_larger_ones_refused():
    vae = VAE(network=small())
    image = mx.random.randint(0, 256, (1, 1, 5, 6), key=mx.random.key(0)).astype(mx.uint8)
    padded = mx.pad(image, [(0, 0), (0, 0), (0, 2), (0, 1)], mode="edge")
    np.testing.assert_allclose(vae.encode(image), vae.encode(padded), atol=1e-6)
    assert vae(image)[0].shape == (1, 1, 5, 6)
    with pytest.raises(ImageError, match="7 x 7"):
        vae.encode(mx.zeros((1, 1, 8, 8)))
    with pytest.raises(ImageError, match=r"expected \(B, 3\)"):
        vae.decode(mx.zeros((1, 3, 1, 1)))
    with pytest.raises(SettingsError, match="tiling=None"):
        vae.encode(image, tiling=True)
    with pytest.raises(SettingsError, match="vector"):
        vae.peak_bytes("encode", 7, 7, tiling=True)
    assert 0 < vae.peak_bytes("encode", 7, 7) < vae.peak_bytes("encode", 7, 7, batch=8)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_dims": []}, "hidden_dims"),
        ({"hidden_dims": [8, 0]}, "hidden_dims"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"image_size": -1}, "image_size"),
        ({"upsampling": "bilinear"}, "upsampling"),
        ({"output": "relu"}, "output"),
        ({"depth": 3}, "depth"),
    ],
)
def test_configurations_that_make_no_network_are_refused(config, message):
    with pytest.raises(SettingsError, match=message):
        FAMILIES["FlatAutoencoder"].build({"_class_name": "FlatAutoencoder", **config})
