"""The embedded pipeline's build, at a size that says nothing of quality."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mflux_vae import VAE, AutoencoderKL
from mflux_vae.images import load_image
from mflux_vae_train.pipelines.registry import open_pipeline
from mflux_vae_train.settings.flags import from_yaml
from mflux_vae_train.tiny_world import build, corpus, recipe
from mflux_vae_train.tiny_world.train import train
from mflux_vae_train.vae.build import build as build_network
from mflux_vae_train.vae.config import VAETrainingSettings

SMALL = {"data_count": 4, "batch_size": 2, "num_epochs": 1, "lr_warmup_steps": 1, "init": "default"}
"""Orthogonal weights of this size take ten seconds."""
VAE_SETTINGS = replace(from_yaml(VAETrainingSettings, recipe.VAE_SETTINGS), **SMALL)
ROUND = recipe.Round(updates=2, batch=2, scenes=4, photos=3, warmup=1, checkpoint_every=1)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        noise = np.random.default_rng(index).integers(0, 256, (90, 120, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{index}.png")
    return [folder]


@pytest.fixture
def no_samples(monkeypatch, photos):
    """Photographs of the test alone, whatever is installed."""
    pictures = [Image.fromarray(load_image(path)) for path in sorted(photos[0].iterdir())]
    monkeypatch.setattr(corpus, "photographs", lambda folders=(): pictures)


@pytest.mark.parametrize("config", [recipe.VAE, recipe.SD_VAE], ids=["16 channels", "4 channels"])
def test_autoencoder_is_built_once_and_its_latents_are_scaled(monkeypatch, tmp_path, photos, no_samples, config):
    monkeypatch.setattr(build, "SCALING_SCENES", 64)
    vae = build.autoencoder(tmp_path / "work", VAE_SETTINGS, config, photos)
    pixels = mx.array(corpus.scenes(0, 16, recipe.SIZE)).astype(mx.float32) / 127.5 - 1
    latents = vae.encode_nhwc(pixels)
    assert abs(latents.mean().item()) < 0.2 and abs(mx.sqrt(mx.var(latents)).item() - 1) < 0.2
    again = build.autoencoder(tmp_path / "work", VAE_SETTINGS, config, photos)
    assert mx.array_equal(again.encode_nhwc(pixels), latents)


def test_the_settings_file_describes_the_network():
    described = build_network(VAE_SETTINGS)
    assert replace(described.config, shift_factor=None, scaling_factor=1.0) == replace(recipe.VAE, scaling_factor=1.0)


@pytest.mark.parametrize("name", ["tiny", "tiny-sd"])
def test_denoiser_and_text_encoders_train_and_save(tmp_path, no_samples, name):
    settings, new_pipeline = build.PIPELINES[name]
    vae = VAE(network=AutoencoderKL(replace(settings.vae, scaling_factor=0.5)))
    rounds = [replace(ROUND, seed=seed) for seed in (0, 1)]
    joint = new_pipeline(tmp_path / "work", vae, rounds[0])
    train(tmp_path / "work", name, joint, rounds, compile=False)
    joint.pipeline.save_pretrained(tmp_path / "out")
    opened = open_pipeline(str(tmp_path / "out"))
    assert type(opened) is type(joint.pipeline) and opened.recommended == joint.pipeline.recommended
    embeds = opened.encode_prompts(["a red star on snow", "completely different"])["prompt_embeds"]
    assert embeds.shape == (2, recipe.TEXT_TOKENS, recipe.WIDTH_TEXT)
    assert not mx.array_equal(embeds[0], embeds[1])
    assert len((tmp_path / "work" / f"{name}-1" / "metrics.jsonl").read_text().splitlines()) == ROUND.updates
    sizes = {
        name: sum(array.size for _, array in tree_flatten(one.parameters())) for name, one in joint.networks.items()
    }
    assert sum(sizes.values()) + sum(array.size for _, array in tree_flatten(vae.network.parameters())) < 8e6


def test_photo_captions_name_objects():
    captions = corpus.photo_captions(0, 50)
    assert captions == corpus.photo_captions(0, 50)
    assert all(caption.split()[-1] in corpus.OBJECTS for caption in captions)
