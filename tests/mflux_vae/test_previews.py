from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mflux_vae_train
from mflux_vae import VAE, ImageError, SettingsError
from mflux_vae.metrics import image as metrics
from mflux_vae.previews import Previewer, synthetic_images
from mflux_vae.weights.formats.files import write_safetensors
from tests.helpers.memory_order import views
from tests.mflux_vae.small_models import small_flux2, small_kl, small_tiny


class Linear:
    """An autoencoder that a projection describes exactly: latents are an affine map of 4 x 4 averages, and back."""

    spatial_scale = 8

    def __init__(self, channels: int = 3):
        self.latent_channels = 4 * channels
        self.config = SimpleNamespace(in_channels=channels, to_dict=dict, vectors=False)
        self.network = small_kl()
        self.decoded = 0
        rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(self.latent_channels,) * 2))[0]
        self._rotation = mx.array(rotation.astype(np.float32))

    def encode(self, image: mx.array) -> mx.array:
        batch, channels, height, width = image.shape
        x = image.astype(mx.float32).reshape(batch, channels, height // 8, 2, 4, width // 8, 2, 4).mean(axis=(4, 7))
        x = x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, 4 * channels, -1)
        return (self._rotation @ (x / 100) + 0.7).reshape(batch, -1, height // 8, width // 8)

    def decode(self, latents: mx.array) -> mx.array:
        self.decoded += 1
        batch, channels, height, width = latents.shape
        x = 100 * (self._rotation.T @ (latents.reshape(batch, channels, -1) - 0.7))
        x = x.reshape(batch, channels // 4, 2, 2, height, width).transpose(0, 1, 4, 2, 5, 3)
        return mx.repeat(mx.repeat(x.reshape(batch, channels // 4, 2 * height, 2 * width), 4, axis=2), 4, axis=3)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("detail", [1, 2, 8])
def test_what_is_linear_is_shown_exactly(channels: int, detail: int) -> None:
    vae: Any = Linear(channels)
    image = mx.random.randint(0, 256, (2, channels, 24, 40), key=mx.random.key(5)).astype(mx.uint8)
    latents = vae.encode(image)
    preview = Previewer(vae, detail=detail)(latents)
    assert preview.shape == (2, 3 * detail, 5 * detail, 3) and preview.dtype == np.uint8
    decoded = np.array(vae.decode(latents)).reshape(2, channels, 3 * detail, 8 // detail, 5 * detail, 8 // detail)
    expected = np.broadcast_to(decoded.mean(axis=(3, 5)).transpose(0, 2, 3, 1), preview.shape)
    np.testing.assert_allclose(preview, expected, atol=1)


def test_the_embedded_vae_is_shown_as_it_decodes() -> None:
    """On pictures that the projection was not computed from."""
    vae = VAE.from_pretrained(Path(mflux_vae_train.__file__).parent / "pipelines/tiny/weights/vae")
    made = synthetic_images(6, 64)
    latents = vae.encode(mx.array(made[4:]))
    decoded = vae.decode(latents)
    expected = mx.array(np.array(decoded).reshape(2, 3, 8, 8, 8, 8).mean(axis=(3, 5)))
    preview = Previewer(vae, pictures=made[:4])(latents)
    found = metrics.psnr(mx.array(preview).transpose(0, 3, 1, 2), expected)
    plain = metrics.psnr(mx.broadcast_to(expected.mean(axis=(2, 3), keepdims=True), expected.shape), expected)
    assert (found > 24).all() and (found > plain + 6).all(), (found, plain)


def test_a_tiny_vae_shows_them_where_given() -> None:
    vae, tiny = VAE(network=small_kl()), VAE(network=small_tiny())
    latents = mx.random.normal((2, 4, 3, 5), key=mx.random.key(1))
    decoded = np.array(tiny.decode(latents))
    full = Previewer(vae, tiny)(latents)
    assert full.shape == (2, 24, 40, 3)
    np.testing.assert_array_equal(full, np.rint(decoded).astype(np.uint8).transpose(0, 2, 3, 1))
    small = Previewer(vae, tiny, detail=1)(latents)
    expected = decoded.reshape(2, 3, 3, 8, 5, 8).mean(axis=(3, 5)).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(small, expected, atol=0.51)


def test_noisy_latents_of_any_dtype_have_previews() -> None:
    previewer = Previewer(VAE(network=small_kl()), pictures=synthetic_images(2, 32))
    latents = mx.random.normal((1, 4, 4, 4), key=mx.random.key(2))
    precise, rough = previewer(latents).astype(int), previewer(latents.astype(mx.bfloat16)).astype(int)
    assert np.abs(precise - rough).max() <= 3
    assert previewer(mx.full((1, 4, 2, 2), float("nan"))).tolist() == np.zeros((1, 2, 2, 3)).tolist()
    assert set(previewer(1e6 * latents).flatten().tolist()) <= {0, 255}


def test_projection_is_cached_until_vae_detail_or_images_change(tmp_path: Path, caplog: Any) -> None:
    vae: Any = Linear()
    cache, latents = tmp_path / "deep" / "preview.safetensors", mx.random.normal((1, 12, 2, 2), key=mx.random.key(0))
    made = synthetic_images(4, 64)

    def previews_and_decodes(**changes: Any) -> tuple[np.ndarray, int]:
        vae.decoded = 0
        return Previewer(vae, cache=cache, **{"pictures": made, **changes})(latents), vae.decoded

    first, decodes = previews_and_decodes()
    assert decodes == 1
    again, decodes = previews_and_decodes()
    assert decodes == 0
    np.testing.assert_array_equal(first, again)
    assert not views({"projection": Previewer(vae, pictures=made)._projection})  # as the one from the cache
    assert previews_and_decodes(detail=2)[1] == 1
    assert previews_and_decodes(pictures=made[:3])[1] == 1
    vae.network = small_kl(seed=9)
    assert previews_and_decodes(pictures=made[:3])[1] == 1
    assert previews_and_decodes(pictures=made[:3])[1] == 0
    cache.write_bytes(cache.read_bytes()[:-4])
    with caplog.at_level(logging.INFO, logger="mflux_vae"):
        assert previews_and_decodes(pictures=made[:3])[1] == 1
    assert "fitting" in caplog.text
    write_safetensors(cache, {"foreign": mx.zeros(3)})
    assert previews_and_decodes(pictures=made[:3])[1] == 1


def test_synthetic_images_are_the_same_every_time_and_vary() -> None:
    made = synthetic_images(3, 32)
    assert made.shape == (3, 3, 32, 32) and made.dtype == np.uint8
    np.testing.assert_array_equal(made, synthetic_images(3, 32))
    assert (made.std(axis=(1, 2, 3)) > 10).all() and np.abs(made[0].astype(int) - made[1]).mean() > 10
    assert synthetic_images(2, 32, channels=1).shape == (2, 1, 32, 32)


def test_mismatches_are_refused() -> None:
    vae: Any = Linear()
    for detail in (3, 0, -1, 16):
        with pytest.raises(SettingsError, match="divide"):
            Previewer(vae, detail=detail)
    with pytest.raises(SettingsError, match="channels"):
        Previewer(vae, VAE(network=small_tiny()))
    with pytest.raises(ImageError, match="expected"):
        Previewer(VAE(network=small_kl()), pictures=np.zeros((2, 1, 32, 32), np.uint8))
    previewer = Previewer(vae, pictures=synthetic_images(2, 32))
    for shape in ((1, 4, 2, 2), (12, 2, 2), (1, 12, 0, 2)):
        with pytest.raises(ImageError, match="expected"):
            previewer(mx.zeros(shape))


def test_flux2_latents_have_previews() -> None:
    """Patches of 2 x 2 raw latents, normalised: one such latent holds 16 x 16 pixels."""
    vae, made = VAE(network=small_flux2()), synthetic_images(6, 96)
    latents = vae.encode(mx.array(made))
    decoded = np.array(vae.decode(latents))
    assert latents.shape == (6, 12, 6, 6) and decoded.shape == (6, 3, 96, 96)
    for detail in (1, 2):
        preview = Previewer(vae, detail=detail, pictures=made)(latents)
        size, factor = 6 * detail, 16 // detail
        assert preview.shape == (6, size, size, 3)
        expected = decoded.reshape(6, 3, size, factor, size, factor).mean(axis=(3, 5)).transpose(0, 2, 3, 1)
        # least squares of every pixel's place by itself
        best = np.empty_like(expected)
        features = np.concatenate([np.array(latents).transpose(0, 2, 3, 1), np.ones((6, 6, 6, 1))], axis=3).reshape(
            -1, 13
        )
        for i, j in np.ndindex(detail, detail):
            target = expected[:, i::detail, j::detail]
            solution = np.linalg.lstsq(features, target.reshape(-1, 3), rcond=None)[0]
            best[:, i::detail, j::detail] = (features @ solution).reshape(target.shape)
        np.testing.assert_allclose(preview, best, atol=0.6)
        assert np.square(best - expected).mean() < 0.9 * expected.var(axis=(0, 1, 2)).mean()
