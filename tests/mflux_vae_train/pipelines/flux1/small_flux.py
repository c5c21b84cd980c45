"""A whole FLUX pipeline of some ten thousand random weights, for tests: every part real, only small."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mflux_vae import VAE, AutoencoderKL, AutoencoderKLConfig
from mflux_vae_train.pipelines.flow.schedule import FlowMatchSchedule
from mflux_vae_train.pipelines.flux1.configs import Configs, published
from mflux_vae_train.pipelines.flux1.family import flux_parts
from mflux_vae_train.pipelines.flux1.pipeline import FluxPipeline
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer, FluxTransformerConfig
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.pipelines.text import clip, t5
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer
from mflux_vae_train.tiny_world.tokenizers import build_clip_tokenizer, build_t5_tokenizer

WORDS = ["a", "an", "and", "blue", "circle", "dog", "of", "on", "photo", "red", "sks", "star"]
TEXT_TOKENS = 12

RECOMMENDED = Recommended(
    resolution=32,
    size_multiple=16,
    learning_rate=1e-3,
    learning_rate_full=1e-4,
    guidance=2.5,
    steps=3,
    rank=4,
    caption_dropout=0.1,
    prior_loss_weight=0.5,
    weighting_scheme="logit_normal",
)


def small_config(guidance_embeds: bool = False, **changes) -> FluxTransformerConfig:
    return FluxTransformerConfig(
        **{
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 20,
            "guidance_embeds": guidance_embeds,
            "axes_dims_rope": (4, 6, 6),
        }
        | changes
    )


def drawn(module: nn.Module, seed: int) -> nn.Module:
    """The module with every parameter random, so that no zero or one hides a mistake."""
    parameters = tree_flatten(module.parameters())
    keys = mx.random.split(mx.random.key(seed), len(parameters))
    module.update(
        tree_unflatten([(name, _draw(name, value, key)) for (name, value), key in zip(parameters, keys, strict=True)])
    )
    return module


def _draw(name: str, value: mx.array, key: mx.array) -> mx.array:
    if value.ndim == 0:
        return value  # a counter
    noise = mx.random.normal(value.shape, key=key)
    if value.ndim == 1:
        return 0.2 * noise + ("norm" in name and name.endswith("weight"))
    return noise * (value.size // value.shape[0]) ** -0.5


def small_pipeline(
    folder: Path,
    guidance_embeds: bool = False,
    *,
    recommended: Recommended | None = None,
    schedule: FlowMatchSchedule | None = None,
    base_model: str | None = None,
) -> FluxPipeline:
    """Build a pipeline from random weights; the tokenizers' files go into `folder`."""
    clip_size = build_clip_tokenizer(WORDS, folder / "tokenizer", 16)
    t5_size = build_t5_tokenizer(WORDS, folder / "tokenizer_2", TEXT_TOKENS)
    vae = AutoencoderKLConfig(
        latent_channels=4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=0.7,
        shift_factor=0.1,
    )
    configs = Configs(
        transformer=small_config(guidance_embeds),
        text_encoder=clip.CLIPTextConfig(
            vocab_size=clip_size,
            hidden_size=20,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=clip_size - 2,
            eos_token_id=clip_size - 1,
        ),
        text_encoder_2=t5.T5Config(
            vocab_size=t5_size,
            d_model=24,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=3,
            feed_forward_proj="gated-gelu",
        ),
        vae=vae.to_dict(),
        schedule=schedule or FlowMatchSchedule(shift=3.0, use_dynamic_shifting=guidance_embeds),
        recommended=recommended or published(guidance_embeds).recommended,
    )
    text_encoder, text_encoder_2 = clip.CLIPTextModel(configs.text_encoder), t5.T5Encoder(configs.text_encoder_2)
    clip.init_weights(text_encoder, mx.random.key(0), embedding_std=0.5)
    t5.init_weights(text_encoder_2, mx.random.key(1))
    parts = flux_parts(
        transformer=drawn(FluxTransformer(configs.transformer), 2),
        vae=VAE(network=drawn(AutoencoderKL(vae), 3)),
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=LazyTokenizer(folder / "tokenizer"),
        tokenizer_2=LazyTokenizer(folder / "tokenizer_2"),
    )
    return FluxPipeline(parts, configs, name="small", base_model=base_model)
