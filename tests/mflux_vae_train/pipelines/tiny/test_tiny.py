"""The embedded pipeline as it ships."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mflux_vae import VAE
from mflux_vae.pretrained import presets
from mflux_vae_train.pipelines import tiny
from mflux_vae_train.pipelines.registry import open_pipeline
from mflux_vae_train.tiny_world.evaluate import accuracy, sample_images
from mflux_vae_train.tiny_world.recipe import RECOMMENDED, SIZE
from mflux_vae_train.tiny_world.world import evaluation_prompts


def test_size_and_recommended_settings():
    files = [path for path in tiny.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    pipeline = open_pipeline("tiny")
    assert pipeline.name == "tiny"
    assert pipeline.recommended == RECOMMENDED


def test_autoencoder_is_a_preset():
    vae = VAE.from_pretrained("tiny")
    assert (vae.latent_channels, vae.spatial_scale) == (16, 8)
    own = tiny.load().vae
    assert vae.config == own.config and mx.array_equal(
        vae.network.decoder.conv_in.bias, own.network.decoder.conv_in.bias
    )
    assert presets.names()[-2:] == ["tiny", "tiny-sd"]


def test_images_match_prompts():
    """A sample of the prompts whose whole set the build measures."""
    pipeline = tiny.load()
    prompts, truths = zip(*evaluation_prompts(True)[::14], strict=True)
    images = sample_images(pipeline, prompts, seed=1)
    assert images.shape == (len(prompts), SIZE, SIZE, 3)
    assert accuracy(images, truths).all >= 0.85
    again = sample_images(pipeline, prompts[:3], seed=1)
    assert np.abs(again.astype(int) - images[:3]).max() <= 1, "a picture does not depend on its batch mates"
