"""Weights of MLX's example of a convolutional autoencoder: its arithmetic, written out in MLX's own operations."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mflux_vae import VAE, SettingsError, WeightsError
from mflux_vae.networks.vector_latent import FlatAutoencoder, FlatConfig
from mflux_vae.pretrained.loading import convert, describe, open_network, save_network
from tests.conftest import Run
from tests.mflux_vae.naming_samples import parameters, same
from tests.mflux_vae.small_models import drawn

FILTERS, LATENT = 16, 3


def weights(channels: int = 1) -> dict[str, mx.array]:
    """As `nn.Module.save_weights` names them there; statistics of norms as early versions of MLX shape them."""
    widths = [FILTERS // 4, FILTERS // 2, FILTERS]
    shapes: dict[str, tuple[int, ...]] = {"encoder.kl_div": ()}
    for n, (a, b) in enumerate(zip([channels, *widths], widths, strict=False), 1):
        shapes |= {f"encoder.conv{n}.weight": (b, 3, 3, a), f"encoder.conv{n}.bias": (b,)} | norm(f"encoder.bn{n}", b)
    for n, (a, b) in enumerate(zip(widths[::-1], [*widths[-2::-1], channels], strict=True), 1):
        shapes |= {f"decoder.upconv{n}.conv.weight": (b, 3, 3, a), f"decoder.upconv{n}.conv.bias": (b,)}
        shapes |= norm(f"decoder.bn{n}", b) if n < 3 else {}
    shapes |= {f"encoder.{head}.weight": (LATENT, 64 * FILTERS) for head in ("proj_mu", "proj_log_var")}
    shapes |= {f"encoder.{head}.bias": (LATENT,) for head in ("proj_mu", "proj_log_var")}
    shapes |= {"decoder.lin1.weight": (64 * FILTERS, LATENT), "decoder.lin1.bias": (64 * FILTERS,)}
    keys = mx.random.split(mx.random.key(0), len(shapes))
    return {
        name: mx.random.uniform(0.5, 1.5, shape, key=key)
        if name.endswith("running_var")
        else mx.random.normal(shape, key=key) * 0.3
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    statistics = {f"{name}.running_{kind}": (1, 1, 1, width) for kind in ("mean", "var")}
    return {f"{name}.weight": (width,), f"{name}.bias": (width,), **statistics}


def encoded(w: dict[str, mx.array], x: mx.array) -> tuple[mx.array, mx.array]:
    """(B, 64, 64, C) in [0, 1] -> mean and log variance, by the example's formula."""
    for n in (1, 2, 3):
        x = mx.conv2d(x, w[f"encoder.conv{n}.weight"], stride=2, padding=1) + w[f"encoder.conv{n}.bias"]
        x = nn.leaky_relu(normed(w, f"encoder.bn{n}", x))
    x = x.flatten(1)
    mean, logvar = (
        x @ w[f"encoder.{head}.weight"].T + w[f"encoder.{head}.bias"] for head in ("proj_mu", "proj_log_var")
    )
    return mean, logvar


def decoded(w: dict[str, mx.array], z: mx.array) -> mx.array:
    """(B, L) -> (B, 64, 64, C) in [0, 1]."""
    x = (z @ w["decoder.lin1.weight"].T + w["decoder.lin1.bias"]).reshape(-1, 8, 8, FILTERS)
    for n in (1, 2, 3):
        x = mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2)
        x = mx.conv2d(x, w[f"decoder.upconv{n}.conv.weight"], padding=1) + w[f"decoder.upconv{n}.conv.bias"]
        x = nn.leaky_relu(normed(w, f"decoder.bn{n}", x)) if n < 3 else mx.sigmoid(x)
    return x


def normed(w: dict[str, mx.array], name: str, x: mx.array) -> mx.array:
    x = (x - w[f"{name}.running_mean"]) * mx.rsqrt(w[f"{name}.running_var"] + 1e-5)
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    mx.savez(str(tmp_path / "vae_mnist_filters_0016_dims_0003.npz"), **weights())
    return tmp_path / "vae_mnist_filters_0016_dims_0003.npz"


@pytest.mark.parametrize("channels", [1, 3])
def test_the_examples_arithmetic(channels: int, tmp_path: Path) -> None:
    theirs = weights(channels)
    mx.savez(str(tmp_path / "a.npz"), **theirs)
    vae = VAE.from_pretrained(tmp_path / "a.npz")
    image = mx.random.randint(0, 256, (2, channels, 64, 64), key=mx.random.key(1)).astype(mx.uint8)
    posterior = vae.posterior(image)
    mean, logvar = encoded(theirs, image.transpose(0, 2, 3, 1) / 255)
    np.testing.assert_allclose(posterior.mean, mean, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(posterior.logvar, logvar, rtol=1e-4, atol=1e-4)
    again = decoded(theirs, mean).transpose(0, 3, 1, 2) * 255
    np.testing.assert_allclose(vae.decode(mean), again, atol=0.05)
    assert np.array(again).std() > 10  # and says something


def test_what_it_is_and_the_way_back(file: Path, tmp_path: Path, run: Run) -> None:
    told = describe(file)
    assert (told.family, told.naming, told.config["hidden_dims"]) == ("FlatAutoencoder", "mlx-examples", [4, 8, 16])
    assert told.parameters == sum(x.size for name, x in weights().items() if "running" not in name and "kl" not in name)
    for target, naming in ((tmp_path / "ours", "diffusers"), (tmp_path / "back.safetensors", "mlx-examples")):
        source = file if naming == "diffusers" else tmp_path / "ours"
        status, _, error = run("convert", source, target, "--naming", naming)
        assert status == 0, error
        assert same(parameters(open_network(target)), parameters(open_network(file)))
    back = mx.load(str(tmp_path / "back.safetensors"))
    assert all(
        mx.array_equal(back[name], value.reshape(back[name].shape)) for name, value in weights().items() if name in back
    )
    assert weights().keys() - back.keys() == {"encoder.kl_div"}


def test_the_commands_of_training_take_it(file: Path, tmp_path: Path, run: Run) -> None:
    status, _, error = run("sample", "--model", file, "--latent_dims", 3, "--outfile", tmp_path / "s.png")
    assert status == 0 and (tmp_path / "s.png").exists(), error
    status, _, error = run("sample", "--model", file, "--latent_dims", 8, "--outfile", tmp_path / "s.png")
    assert status == 2 and "--latent_dims is 8" in error


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"image_size": 28}, "64 x 64"), ({"output": "tanh"}, "tanh")],
)
def test_the_naming_is_of_that_network_only(changes: dict, told: str, tmp_path: Path) -> None:
    settings = {
        "hidden_dims": (4, 8, 16),
        "latent_dim": 3,
        "image_size": 64,
        "upsampling": "repeat",
        "last_conv": False,
    }
    save_network(drawn(FlatAutoencoder(FlatConfig(**{**settings, **changes}))), tmp_path / "ours")
    with pytest.raises((SettingsError, WeightsError), match=told):
        convert(tmp_path / "ours", tmp_path / "theirs.safetensors", "mlx-examples")
