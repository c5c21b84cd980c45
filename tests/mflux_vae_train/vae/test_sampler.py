"""Sampling a trained autoencoder: positions of latents, shapes of images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.errors import ImageError, SettingsError
from mflux_vae.images import load_image, save_image
from mflux_vae.pretrained import loading
from mflux_vae_train.vae.build import build
from mflux_vae_train.vae.config import settings_from_dict
from mflux_vae_train.vae.sampler import VAESampler, interpolate

FLAT: dict[str, Any] = {"image_size": 12, "hidden_dims": (4, 6), "latent_dim": 5}
SPATIAL: dict[str, Any] = {"network": "kl", "image_size": 16, "hidden_dims": (8, 8), "latent_dim": 3, "in_channels": 3}


@pytest.fixture
def flat(tmp_path: Path) -> VAESampler:
    loading.save_network(build(settings_from_dict(FLAT)), tmp_path / "best_model.safetensors")
    return VAESampler(tmp_path / "best_model.safetensors")


def test_random_samples_are_functions_of_seed_and_index(flat: VAESampler) -> None:
    images = flat.sample_random(7)
    assert images.shape == (7, 12, 12, 1) and images.min() >= 0 and images.max() <= 1
    np.testing.assert_array_equal(flat.draw(7)[3:], flat.draw(4, first=3))
    other = VAESampler(flat.model, seed=1)
    assert not np.array_equal(other.draw(2), flat.draw(2))
    many = flat.draw(2000)
    assert abs(float(many.mean())) < 0.05 and float(mx.var(many)) == pytest.approx(1, abs=0.05)


def test_strongest_dims_have_the_largest_effect(flat: VAESampler) -> None:
    weight = np.array(flat.model.decoder.linear.weight)
    weight[:, [0, 2, 4]] = 0
    weight[:, 3] *= 10
    flat.model.decoder.linear.weight = mx.array(weight)
    assert flat.strongest_dims(2) == [3, 1]
    plane = flat.generate_latent_grid(3, (-2, 2))
    np.testing.assert_array_equal(plane, flat.generate_latent_grid(3, (-2, 2), dims=(3, 1)))


def test_check_rejects_an_unexpected_network(flat: VAESampler) -> None:
    flat.check(latent_dims=5, max_filters=6, nimg_channels=1)
    with pytest.raises(SettingsError, match=r"--latent_dims.*--nimg_channels"):
        flat.check(latent_dims=8, nimg_channels=3)


def test_a_grid_varies_two_dimensions(flat: VAESampler) -> None:
    base = flat.draw(1)
    plane = flat.generate_latent_grid(3, (-2, 2), dims=(4, 1), base=base)
    expected = np.array(base).repeat(9, axis=0)
    expected[:, 4], expected[:, 1] = [-2, -2, -2, 0, 0, 0, 2, 2, 2], [-2, 0, 2] * 3
    np.testing.assert_allclose(plane, flat.decode(mx.array(expected)), atol=1e-6)
    line = flat.traverse_latent(1, 3, (-2, 2), base=mx.array(expected[:1]))
    np.testing.assert_allclose(line, plane[:3], atol=1e-5)
    with pytest.raises(SettingsError, match="dimension 5"):
        flat.traverse_latent(5)


def test_interpolation(flat: VAESampler) -> None:
    z1, z2 = mx.array([[3.0, 0, 0, 0, 0]]), mx.array([[0.0, 3, 0, 0, 0]])
    straight, spherical = interpolate(z1, z2, 5), interpolate(z1, z2, 5, spherical=True)
    np.testing.assert_allclose(straight[2], [1.5, 1.5, 0, 0, 0])
    np.testing.assert_allclose(np.linalg.norm(spherical, axis=1), 3, rtol=1e-5)
    np.testing.assert_allclose(spherical[2], [3 * 2**-0.5] * 2 + [0] * 3, rtol=1e-5, atol=1e-6)
    for path in (straight, spherical):
        np.testing.assert_allclose(path[0], z1[0], atol=1e-6)
        np.testing.assert_allclose(path[-1], z2[0], atol=1e-6)
    np.testing.assert_allclose(interpolate(z1, 2 * z1, 3, spherical=True)[1], 1.5 * z1[0])
    assert flat.interpolate_latent(z1, z2, 4, spherical=True).shape == (4, 12, 12, 1)
    with pytest.raises(SettingsError, match="2 steps"):
        interpolate(z1, z2, 1)


def test_saved_grids_have_the_images_in_order(flat: VAESampler, tmp_path: Path) -> None:
    samples = flat.sample_random(5)
    flat.save_samples(samples, tmp_path / "a.png")
    flat.save_interpolation(samples, tmp_path / "b.png")
    square, row = load_image(tmp_path / "a.png"), load_image(tmp_path / "b.png")
    assert square.shape == (2 * 12 + 2, 3 * 12 + 4, 3) and row.shape == (12, 5 * 12 + 8, 3)
    np.testing.assert_array_equal(square[14:, :12, 0], np.rint(samples[3, ..., 0] * 255))
    assert (square[14:, 28:] == 255).all()


def test_spatial_latents_can_be_drawn_and_interpolated() -> None:
    sampler = VAESampler(build(settings_from_dict(SPATIAL)), image_size=8)
    assert sampler.latent_shape == (4, 4, 3) and sampler.sample_random(2).shape == (2, 8, 8, 3)
    z = sampler.draw(2)
    assert sampler.interpolate_latent(z[:1], z[1:], 3).shape == (3, 8, 8, 3)
    with pytest.raises(SettingsError, match="spatial"):
        sampler.traverse_latent(0)
    with pytest.raises(SettingsError, match="multiple"):
        VAESampler(sampler.model, image_size=9)


def test_wrong_shapes_and_sizes_are_rejected(flat: VAESampler, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="shape"):
        flat.decode(mx.zeros((1, 4)))
    with pytest.raises(SettingsError, match="12"):
        VAESampler(flat.model, image_size=16)
    save_image(tmp_path / "grey.png", np.full((20, 14, 3), 128, np.uint8))
    means = flat.encode([tmp_path / "grey.png"])
    np.testing.assert_allclose(means, flat.model.encode(mx.full((1, 12, 12, 1), 128 / 127.5 - 1)).mean, atol=1e-5)
