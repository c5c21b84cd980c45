"""Train the embedded pipeline's transformer and text encoders, together, on latents of captioned scenes."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mflux_vae import VAE
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.optimizers.grouped import Grouped
from mflux_vae_train.optimizers.muon import Muon
from mflux_vae_train.pipelines.flow.schedule import FlowMatchSchedule
from mflux_vae_train.pipelines.flux1 import transformer as flux
from mflux_vae_train.pipelines.flux1.configs import Configs
from mflux_vae_train.pipelines.flux1.parts import flux_parts
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline
from mflux_vae_train.pipelines.noise import NoiseSampling
from mflux_vae_train.pipelines.text import clip, t5
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer
from mflux_vae_train.randomness import Stream, rng, sample_keys
from mflux_vae_train.tiny_world import corpus, recipe
from mflux_vae_train.tiny_world.run import run
from mflux_vae_train.tiny_world.tokenizers import build_clip_tokenizer, build_t5_tokenizer
from mflux_vae_train.tiny_world.words import EXTRA_WORDS
from mflux_vae_train.tiny_world.world import WORDS, training_example
from mflux_vae_train.training.ema import EMA
from mflux_vae_train.training.step import Arrays, MicroBatch, Step

logger = logging.getLogger(__name__)

_ENCODED_AT_ONCE = 64


class JointModel(nn.Module):
    """The networks that are trained together."""

    def __init__(self, pipeline: FluxPipeline):
        super().__init__()
        self.transformer = pipeline.denoiser
        self.clip = pipeline.prompts.clip.get()
        self.t5 = pipeline.prompts.t5.get()


def new_pipeline(work: Path, vae: VAE, settings: recipe.FluxRecipe) -> FluxPipeline:
    """An untrained pipeline around a trained autoencoder."""
    words = sorted({*WORDS, *EXTRA_WORDS})
    build_clip_tokenizer(words, work / "tokenizer", recipe.TEXT_TOKENS)
    build_t5_tokenizer(words, work / "tokenizer_2", recipe.TEXT_TOKENS)
    tokenizer, tokenizer_2 = (LazyTokenizer(work / name) for name in ("tokenizer", "tokenizer_2"))
    eos = tokenizer.get().pad_id  # rows of CLIP are padded with the end of text
    configs = Configs(
        transformer=recipe.TRANSFORMER,
        text_encoder=recipe.clip_config(tokenizer.get().vocab_size, eos=eos, bos=eos - 1, pad=eos),
        text_encoder_2=recipe.t5_config(tokenizer_2.get().vocab_size),
        vae=vae.config.to_dict(),
        schedule=FlowMatchSchedule(),
        recommended=recipe.RECOMMENDED,
    )
    transformer = flux.FluxTransformer(configs.transformer)
    text_encoder, text_encoder_2 = clip.CLIPTextModel(configs.text_encoder), t5.T5Encoder(configs.text_encoder_2)
    keys = sample_keys(settings.seed, Stream.INIT, 0, range(3))
    flux.init_weights(transformer, keys[0])
    clip.init_weights(text_encoder, keys[1], embedding_std=settings.clip_embedding_std)
    t5.init_weights(text_encoder_2, keys[2], relative_bias_std=settings.t5_bias_std)
    parts = flux_parts(
        transformer=transformer,
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
    )
    return FluxPipeline(parts, configs, name="tiny")


def encode_examples(work: Path, vae: VAE, settings: recipe.FluxRecipe) -> tuple[np.ndarray, list[str]]:
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


def train(work: Path, vae: VAE, rounds: Sequence[recipe.FluxRecipe], *, compile: bool = True) -> FluxPipeline:
    """Train in rounds, continuing from checkpoints in `work`, and return the pipeline with averaged weights.

    Args:
        compile: compile the step, which takes a minute and saves more in hours of training.
    """
    pipeline = new_pipeline(work, vae, rounds[0])
    for number, settings in enumerate(rounds, start=1):
        train_round(work, f"flux-{number}", pipeline, settings, compile=compile)
    return pipeline


def train_round(work: Path, name: str, pipeline: FluxPipeline, settings: recipe.FluxRecipe, *, compile: bool) -> None:
    """Train the pipeline and set its weights to the averaged ones; checkpoints are in `work / name`."""
    vae = pipeline.vae
    raw, captions = encode_examples(work, vae, settings)
    latents, examples = mx.array(raw), len(captions)
    model = JointModel(pipeline)
    ids = {
        name: pipeline.parts.tokenizers[folder].get().encode([*captions, ""], recipe.TEXT_TOKENS)  # last: no caption
        for name, folder in (("clip", "tokenizer"), ("t5", "tokenizer_2"))
    }

    def batch(update: int) -> list[MicroBatch]:
        epoch, place = divmod(update * settings.batch, examples - settings.batch)
        order = rng(settings.seed, Stream.DATA_ORDER, epoch).permutation(examples)
        chosen = order[place : place + settings.batch]
        dropped = rng(settings.seed, Stream.CAPTION_DROPOUT, update).random(settings.batch) < settings.caption_dropout
        rows = mx.array(np.where(dropped, examples, chosen))
        arrays = {
            "latents": vae.scaled(latents[mx.array(chosen)].astype(mx.float32)),
            "clip": ids["clip"][rows],
            "t5": ids["t5"][rows],
            "key": sample_keys(settings.seed, Stream.NOISE, update, range(settings.batch)),
        }
        return [MicroBatch(arrays=arrays, weight=settings.batch)]

    sampling = NoiseSampling(scheme=settings.weighting_scheme)

    def loss(model: nn.Module, arrays: Arrays) -> tuple[mx.array, dict[str, mx.array]]:
        _, pooled = model.clip(arrays["clip"])
        conditioning = {"prompt_embeds": model.t5(arrays["t5"]), "pooled": pooled}
        predicted = pipeline.predict(
            arrays["latents"], conditioning, key=arrays["key"], guidance=1.0, sampling=sampling
        )
        return predicted.loss().mean(), {"words": word_contrast(conditioning)}

    def is_text(path: str, _: mx.array) -> bool:
        return not path.startswith("transformer.")

    def is_block_matrix(path: str, weight: mx.array) -> bool:
        return "transformer_blocks" in path and weight.ndim == 2 and ".norm" not in path

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


def word_contrast(conditioning: dict[str, mx.array]) -> mx.array:
    """Deviation of pooled prompts in a batch relative to their norm. Near zero, the text encoders have collapsed."""
    pooled = conditioning["pooled"]
    return mx.sqrt(mx.var(pooled, axis=0).sum() / mx.square(pooled).sum(axis=1).mean())
