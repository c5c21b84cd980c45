"""Train the embedded pipeline's autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from PIL import Image

from mflux_vae.networks.autoencoder_kl import AutoencoderKL
from mflux_vae_train.ema import EMA
from mflux_vae_train.optimizers import AdamW, Grouped, Muon
from mflux_vae_train.pipelines.tiny import corpus, recipe
from mflux_vae_train.pipelines.tiny.run import run
from mflux_vae_train.randomness import Stream, rng, sample_keys
from mflux_vae_train.step import Arrays, MicroBatch, Step

LOGVAR_BIAS = -5.0


def initialise(network: AutoencoderKL, seed: int) -> None:
    """Orthogonal kernels, residual branches at zero, a narrow posterior: with these it learns in minutes."""
    draw = rng(seed, Stream.INIT)
    latent = network.config.latent_channels
    new: list[tuple[str, mx.array]] = []
    for name, value in dict(tree_flatten(network.parameters())).items():
        if value.ndim == 4:
            rows = value.shape[0]
            matrix = draw.standard_normal((rows, value.size // rows))
            u, _, v = np.linalg.svd(matrix, full_matrices=False)
            zero = ".conv2." in name
            new.append((name, mx.array(np.zeros(value.shape) if zero else (u @ v).reshape(value.shape), mx.float32)))
        elif name.endswith(".bias") and ".norm" not in name:
            bias = np.zeros(value.shape, np.float32)
            if name == "encoder.conv_out.bias":
                bias[latent:] = LOGVAR_BIAS
            new.append((name, mx.array(bias)))
    network.update(tree_unflatten(new))


def train(work: Path, settings: recipe.VAERecipe, pictures: Sequence[Image.Image]) -> AutoencoderKL:
    """Train, or go on where `work` left off. Returns the network with averaged weights."""
    network = AutoencoderKL(recipe.VAE)
    initialise(network, settings.seed)
    pool = {
        "scenes": corpus.scenes(settings.seed, settings.scenes, recipe.SIZE),
        "photos": corpus.crops(pictures, settings.seed, settings.crops, recipe.SIZE),
    }

    def batch(update: int) -> list[MicroBatch]:
        draw = rng(settings.seed, Stream.DATA_ORDER, update)
        photos = round(settings.batch * settings.photo_share)
        chosen = [
            pool["photos"][draw.integers(settings.crops, size=photos)],
            pool["scenes"][draw.integers(settings.scenes, size=settings.batch - photos)],
        ]
        pixels = mx.array(np.concatenate(chosen)).astype(mx.float32) / 127.5 - 1
        key = sample_keys(settings.seed, Stream.NOISE, update, [0])[0]
        return [MicroBatch(arrays={"pixels": pixels, "key": key}, weight=settings.batch)]

    def loss(model: nn.Module, arrays: Arrays) -> tuple[mx.array, dict[str, mx.array]]:
        pixels = arrays["pixels"]
        posterior = model.encode(pixels)
        difference = model.decode(posterior.sample(arrays["key"])) - pixels
        l1, mse = mx.abs(difference).mean(), mx.square(difference).mean()
        kl = posterior.kl().mean() * posterior.mean.shape[0] / posterior.mean.size
        psnr = 10 * mx.log10(4 / mse)
        return l1 + settings.mse_weight * mse + settings.kl_weight * kl, {"psnr": psnr, "kl": kl}

    optimizer = Grouped(
        [
            (Muon(), settings.muon_rate, lambda _, weight: weight.ndim == 4),
            (AdamW(beta2=0.99, weight_decay=0.0), settings.adamw_rate, None),
        ]
    )
    ema = EMA(network.trainable_parameters(), settings.ema_decay)
    step = Step(network, optimizer, loss, ema=ema)

    def rate(update: int) -> float:
        warm = min(1.0, (update + 1) / settings.warmup)
        return warm * 0.5 * (1 + np.cos(np.pi * update / settings.updates))

    run(work / "vae", step, batch, rate, settings.updates, settings.checkpoint_every, settings)
    network.update(ema.state["average"])
    return network
