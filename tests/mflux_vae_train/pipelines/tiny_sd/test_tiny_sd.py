"""The second embedded pipeline as it ships."""

from __future__ import annotations

from mflux_vae import VAE
from mflux_vae_train.pipelines import tiny_sd
from mflux_vae_train.pipelines.registry import open_pipeline
from mflux_vae_train.tiny_world.evaluate import accuracy, sample_images
from mflux_vae_train.tiny_world.recipe import SD_RECOMMENDED, SIZE
from mflux_vae_train.tiny_world.world import evaluation_prompts


def test_size_and_recommended_settings():
    files = [path for path in tiny_sd.WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    pipeline = open_pipeline("tiny-sd")
    assert (pipeline.name, pipeline.recommended) == ("tiny-sd", SD_RECOMMENDED)


def test_autoencoder_is_a_preset():
    vae = VAE.from_pretrained("tiny-sd")
    assert (vae.latent_channels, vae.spatial_scale) == (4, 8)
    assert vae.config == tiny_sd.load().vae.config


def test_images_match_prompts():
    """A sample of the prompts whose whole set the build measures."""
    prompts, truths = zip(*evaluation_prompts(True)[::28], strict=True)
    images = sample_images(tiny_sd.load(), prompts, seed=1)
    assert images.shape == (len(prompts), SIZE, SIZE, 3)
    assert accuracy(images, truths).all >= 0.8
