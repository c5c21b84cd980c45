"""Untrained pipelines around a trained autoencoder: a small FLUX.1, and a small Stable Diffusion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from mflux_vae import VAE
from mflux_vae_train.pipelines.flow.schedule import FlowMatchSchedule
from mflux_vae_train.pipelines.flux1 import transformer as flux
from mflux_vae_train.pipelines.flux1.configs import Configs as FluxConfigs
from mflux_vae_train.pipelines.flux1.family import flux_parts
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline
from mflux_vae_train.pipelines.protocol import Conditioning
from mflux_vae_train.pipelines.stable_diffusion.configs import PNDM
from mflux_vae_train.pipelines.stable_diffusion.configs import Configs as SDConfigs
from mflux_vae_train.pipelines.stable_diffusion.files.parts import stable_diffusion_parts
from mflux_vae_train.pipelines.stable_diffusion.pipeline import StableDiffusionPipeline
from mflux_vae_train.pipelines.stable_diffusion.unet import UNet
from mflux_vae_train.pipelines.stable_diffusion.unet import init_weights as init_unet
from mflux_vae_train.pipelines.text import clip, t5
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer
from mflux_vae_train.randomness import Stream, sample_keys
from mflux_vae_train.tiny_world import recipe
from mflux_vae_train.tiny_world.tokenizers import build_clip_tokenizer, build_t5_tokenizer
from mflux_vae_train.tiny_world.train import Joint
from mflux_vae_train.tiny_world.words import EXTRA_WORDS
from mflux_vae_train.tiny_world.world import WORDS
from mflux_vae_train.training.step import Arrays


def new_flux(work: Path, vae: VAE, settings: recipe.Round) -> Joint:
    """FLUX.1 with CLIP and T5."""
    tokenizer, text_config = _clip(work)
    build_t5_tokenizer(_words(), work / "tokenizer_2", recipe.TEXT_TOKENS)
    tokenizer_2 = LazyTokenizer(work / "tokenizer_2")
    configs = FluxConfigs(
        transformer=recipe.TRANSFORMER,
        text_encoder=text_config,
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

    def token_ids(captions: Sequence[str]) -> dict[str, mx.array]:
        named = {"clip": tokenizer, "t5": tokenizer_2}
        return {name: one.get().encode(captions, recipe.TEXT_TOKENS) for name, one in named.items()}

    def conditioning(ids: Arrays) -> Conditioning:
        return {"prompt_embeds": text_encoder_2(ids["t5"]), "pooled": text_encoder(ids["clip"])[1]}

    return Joint(
        pipeline=FluxPipeline(parts, configs, name="tiny"),
        networks={"transformer": transformer, "clip": text_encoder, "t5": text_encoder_2},
        token_ids=token_ids,
        conditioning=conditioning,
    )


def new_stable_diffusion(work: Path, vae: VAE, settings: recipe.Round) -> Joint:
    """Stable Diffusion 1 with CLIP."""
    tokenizer, text_config = _clip(work)
    configs = SDConfigs(
        unet=recipe.UNET,
        text_encoder=text_config,
        vae=vae.config.to_dict(),
        schedule=PNDM,
        recommended=recipe.SD_RECOMMENDED,
    )
    unet, text_encoder = UNet(configs.unet), clip.CLIPTextModel(configs.text_encoder)
    keys = sample_keys(settings.seed, Stream.INIT, 0, range(2))
    init_unet(unet, keys[0])
    clip.init_weights(text_encoder, keys[1], embedding_std=settings.clip_embedding_std)
    parts = stable_diffusion_parts(unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
    pipeline = StableDiffusionPipeline(parts, configs, name="tiny-sd")
    return Joint(
        pipeline=pipeline,
        networks={"unet": unet, "clip": text_encoder},
        token_ids=lambda captions: {"clip": tokenizer.get().encode(captions, recipe.TEXT_TOKENS)},
        conditioning=lambda ids: {"prompt_embeds": text_encoder.hidden_state(ids["clip"], final_norm=True)},
    )


def _clip(work: Path) -> tuple[LazyTokenizer, clip.CLIPTextConfig]:
    """CLIP's tokenizer, written to `work`, and the configuration of its text encoder."""
    build_clip_tokenizer(_words(), work / "tokenizer", recipe.TEXT_TOKENS)
    tokenizer = LazyTokenizer(work / "tokenizer")
    eos = tokenizer.get().pad_id  # rows of CLIP are padded with the end of text
    return tokenizer, recipe.clip_config(tokenizer.get().vocab_size, eos=eos, bos=eos - 1, pad=eos)


def _words() -> list[str]:
    return sorted({*WORDS, *EXTRA_WORDS})
