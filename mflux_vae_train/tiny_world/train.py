"""Train a denoiser and its text encoders, together, on latents of captioned scenes."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mflux_vae import VAE
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.optimizers.grouped import Grouped
from mflux_vae_train.optimizers.muon import Muon
from mflux_vae_train.pipelines.noise import NoiseSampling
from mflux_vae_train.pipelines.protocol import Conditioning
from mflux_vae_train.randomness import Stream, rng, sample_keys
from mflux_vae_train.tiny_world import corpus, recipe
from mflux_vae_train.tiny_world.run import run
from mflux_vae_train.tiny_world.world import training_example
from mflux_vae_train.training.ema import EMA
from mflux_vae_train.training.step import Arrays, MicroBatch, Step

logger = logging.getLogger(__name__)

_ENCODED_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Joint:
    """A pipeline whose networks are trained together.

    Attributes:
        networks: the denoiser, then the text encoders.
        token_ids: captions -> arrays with one row each.
        conditioning: rows of these arrays -> conditioning, differentiable in the text encoders.
    """

    pipeline: Any
    networks: Mapping[str, nn.Module]
    token_ids: Callable[[Sequence[str]], Arrays]
    conditioning: Callable[[Arrays], Conditioning]


def encode_examples(work: Path, vae: VAE, settings: recipe.Round) -> tuple[np.ndarray, list[str]]:
    """Unscaled latents (N, h, w, C) float16 and captions of photographs, then of scenes; stored in `work`."""
    work.mkdir(parents=True, exist_ok=True)
    parameters = dict(tree_flatten(vae.network.parameters()))
    source = b"".join(np.array(value).tobytes() for value in parameters.values())
    source += json.dumps([settings.seed, settings.scenes, settings.photos, dict(settings.caption_shares)]).encode()
    file = work / f"latents-{zlib.crc32(source):08x}.npz"
    if file.is_file():
        with np.load(file) as stored:
            return stored["latents"], stored["captions"].tolist()
    photos = corpus.crops(
        corpus.photographs(), settings.seed, settings.photos, recipe.SIZE, smallest=settings.photo_crop
    )
    latents = [_encode(vae, part) for part in np.array_split(photos, -(-settings.photos // _ENCODED_AT_ONCE))]
    captions = corpus.photo_captions(settings.seed, settings.photos)
    for start in range(0, settings.scenes, _ENCODED_AT_ONCE):
        stop = min(start + _ENCODED_AT_ONCE, settings.scenes)
        examples = [
            training_example(settings.seed, index, recipe.SIZE, settings.caption_shares) for index in range(start, stop)
        ]
        latents.append(_encode(vae, np.stack([picture for picture, _, _ in examples])))
        captions += [caption for _, caption, _ in examples]
        if start % (50 * _ENCODED_AT_ONCE) == 0:
            logger.info("encoded %d of %d scenes", stop, settings.scenes)
    np.savez(file, latents=np.concatenate(latents), captions=np.array(captions))
    return np.concatenate(latents), captions


def _encode(vae: VAE, pictures: np.ndarray) -> np.ndarray:
    pixels = mx.array(pictures).astype(mx.float32) / 127.5 - 1
    return np.array(vae.network.encode(pixels).mode(), np.float16)


def train(work: Path, name: str, joint: Joint, rounds: Sequence[recipe.Round], *, compile: bool = True) -> None:
    """Train in rounds, continuing from checkpoints in `work`, and set the weights to averaged ones.

    Args:
        name: start of the names of the rounds' folders.
        compile: compile the step, which takes a minute and saves more in hours of training.
    """
    for number, settings in enumerate(rounds, start=1):
        train_round(work, f"{name}-{number}", joint, settings, compile=compile)


def train_round(work: Path, name: str, joint: Joint, settings: recipe.Round, *, compile: bool) -> None:
    """Train the pipeline and set its weights to the averaged ones; checkpoints are in `work / name`."""
    pipeline, vae = joint.pipeline, joint.pipeline.vae
    raw, captions = encode_examples(work, vae, settings)
    latents, examples = mx.array(raw), len(captions)
    model = nn.Module()
    for part, network in joint.networks.items():
        setattr(model, part, network)
    ids = joint.token_ids([*captions, ""])  # last: no caption

    def batch(update: int) -> list[MicroBatch]:
        epoch, place = divmod(update * settings.batch, examples - settings.batch)
        order = rng(settings.seed, Stream.DATA_ORDER, epoch).permutation(examples)
        chosen = order[place : place + settings.batch]
        dropped = rng(settings.seed, Stream.CAPTION_DROPOUT, update).random(settings.batch) < settings.caption_dropout
        rows = mx.array(np.where(dropped, examples, chosen))
        arrays = {
            "latents": vae.scaled(latents[mx.array(chosen)].astype(mx.float32)),
            "tokens": {name: array[rows] for name, array in ids.items()},
            "key": sample_keys(settings.seed, Stream.NOISE, update, range(settings.batch)),
        }
        return [MicroBatch(arrays=arrays, weight=settings.batch)]

    sampling = NoiseSampling(scheme=settings.weighting_scheme, snr_gamma=settings.snr_gamma)

    def loss(model: nn.Module, arrays: Arrays) -> tuple[mx.array, dict[str, mx.array]]:
        conditioning = joint.conditioning(arrays["tokens"])
        predicted = pipeline.predict(
            arrays["latents"], conditioning, key=arrays["key"], guidance=1.0, sampling=sampling
        )
        return predicted.loss().mean(), {"words": word_contrast(conditioning)}

    denoiser = next(iter(joint.networks))

    def is_text(path: str, _: mx.array) -> bool:
        return not path.startswith(f"{denoiser}.")

    def is_block_matrix(path: str, weight: mx.array) -> bool:
        return path.startswith(f"{denoiser}.") and "_block" in path and weight.ndim > 1 and ".norm" not in path

    optimizer = Grouped(
        [
            (Muon(), settings.muon_rate, is_block_matrix),
            (AdamW(beta2=0.99, weight_decay=0.0), settings.text_rate, is_text),
            (AdamW(beta2=0.99, weight_decay=0.0), settings.adamw_rate, None),
        ]
    )
    ema = EMA(model.trainable_parameters(), settings.ema_decay)
    step = Step(model, optimizer, loss, ema=ema, compile=compile)

    def rate(update: int) -> float:
        warm = min(1.0, (update + 1) / settings.warmup)
        return warm * min(1.0, (settings.updates - update) / (settings.decay_share * settings.updates))

    run(work / name, step, batch, rate, settings.updates, settings.checkpoint_every, settings)
    model.update(ema.state["average"])


def word_contrast(conditioning: Conditioning) -> mx.array:
    """Deviation of encoded prompts in a batch relative to their norm. Near zero, the text encoders have collapsed."""
    encoded = conditioning.get("pooled", conditioning["prompt_embeds"]).flatten(1)
    return mx.sqrt(mx.var(encoded, axis=0).sum() / mx.square(encoded).sum(axis=1).mean())
