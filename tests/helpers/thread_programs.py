"""Programs that use this project from several threads: `python -m tests.helpers.thread_programs NAME FOLDER`.

Each ends with exit status 0 if other threads compute what the main thread does, to the bit.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae import VAE
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.pipelines import tiny
from mflux_vae_train.vae.train import VAETrainer
from tests.mflux_vae.small_models import small_kl

IMAGE = np.random.default_rng(0).integers(0, 256, (2, 3, 64, 64)).astype(np.uint8)
PICTURES = list(IMAGE.transpose(0, 2, 3, 1))


def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a thread that ends."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def same(one: Any, other: Any) -> None:
    """Evaluates in the calling thread."""
    for x, y in zip(one, other, strict=True):
        assert np.array_equal(np.array(x), np.array(y))


def reconstructed(vae: VAE) -> list[mx.array]:
    posterior = vae.posterior(IMAGE)
    latents = vae.encode(IMAGE)
    return [posterior.mean, posterior.logvar, latents, vae.decode(latents), *vae.encode_images(PICTURES)]


def drawn(pipeline: Any) -> list[mx.array]:
    prompts = pipeline.encode_prompts(["a photo of a red star", ""])
    key = mx.random.split(mx.random.key(3), 2)
    image = pipeline.sample(prompts, size=(64, 64), steps=2, guidance=2.0, key=key)
    return [*prompts.values(), image, pipeline.encode_images(image)]


def vae_of_main_thread(folder: Path) -> None:
    vae = VAE.from_pretrained("tiny")
    same(in_thread(reconstructed, vae), reconstructed(VAE.from_pretrained("tiny")))
    same(in_thread(reconstructed, vae), reconstructed(vae))
    untrained, small = VAE(), IMAGE[:, :, :16, :16]
    same([in_thread(untrained.encode, small)], [untrained.encode(small)])


def vae_of_other_thread(folder: Path) -> None:
    vae = in_thread(VAE.from_pretrained, "tiny")
    same(reconstructed(vae), reconstructed(VAE.from_pretrained("tiny")))
    same(in_thread(reconstructed, vae), reconstructed(vae))


def four_threads(folder: Path) -> None:
    VAE(network=small_kl()).save_pretrained(folder / "kl")
    for vae in (VAE.from_pretrained("tiny"), VAE.from_pretrained(folder / "kl")):
        expected = reconstructed(vae)
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(reconstructed, [vae] * 8):
                same(found, expected)


def thread_at_exit(folder: Path) -> None:
    """The main thread ends while this one works."""
    threading.Thread(target=lambda: mx.eval(VAE.from_pretrained("tiny").encode(IMAGE))).start()


def pipeline_of_main_thread(folder: Path) -> None:
    pipeline = tiny.load()
    expected = drawn(tiny.load())
    same(in_thread(drawn, pipeline), expected)
    pipeline.encode_prompts([""])
    same(in_thread(drawn, pipeline), expected)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(drawn, [tiny.load()] * 4):
            same(found, expected)


def pipeline_of_other_thread(folder: Path) -> None:
    pipeline = in_thread(tiny.load)
    _ = in_thread(lambda: pipeline.denoiser)
    pipeline.set_gradient_checkpointing(True)
    same(drawn(pipeline), drawn(tiny.load()))


def compiled(folder: Path) -> None:
    vae = VAE.from_pretrained("tiny")
    encode = mx.compile(vae.encode_nhwc)
    pixels = mx.array(IMAGE.transpose(0, 2, 3, 1) / np.float32(255))
    slope = mx.compile(mx.grad(lambda x: vae.encode_nhwc(x).square().sum()))

    def both() -> list[mx.array]:
        found = [encode(pixels), slope(pixels)]
        mx.eval(found)
        return found

    expected = both()
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: both(), range(8)):
            same(found, expected)


def vae_training(folder: Path) -> None:
    def train(name: str) -> VAETrainer:
        settings = {
            **{"data": "digits", "data_count": 48, "experiment_name": name, "output_dir": str(folder)},
            **{"num_epochs": 2, "batch_size": 8, "hidden_dims": (8, 16), "latent_dim": 4, "samples_every": 1},
        }
        trainer = VAETrainer(settings)
        trainer.train()
        return trainer

    one, other = train("main"), in_thread(train, "other")
    assert one.last.read_bytes() == other.last.read_bytes()
    digits = IMAGE[:, :1, :28, :28]
    same([VAE(network=one.network).encode(digits)], [VAE(network=other.network).encode(digits)])


def dreambooth(folder: Path) -> None:
    def train(name: str, pipeline: Any) -> bytes:
        settings = DreamBoothSettings(
            model="tiny",
            instance_data_dir=str(Path(tiny.__file__).parent / "example"),
            instance_prompt="a photo of xyz star",
            output_dir=str(folder / name),
            num_class_images=2,
            max_train_steps=2,
            gradient_accumulation_steps=2,
            num_validation_images=0,
        )
        outcome = DreamBooth(pipeline).train(settings)
        assert outcome.result is not None
        return outcome.result.read_bytes()

    one, other = tiny.load(), tiny.load()
    assert train("main", one) == in_thread(train, "other", other)
    same(drawn(one), drawn(other))


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
