"""The parts of Stable Diffusion pipelines of some ten thousand random weights, for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from mflux_vae import VAE, AutoencoderKL, AutoencoderKLConfig
from mflux_vae_train.pipelines.parts import Parts
from mflux_vae_train.pipelines.stable_diffusion.configs import SD_1, SD_2, SDXL, Configs
from mflux_vae_train.pipelines.stable_diffusion.files.parts import stable_diffusion_parts
from mflux_vae_train.pipelines.stable_diffusion.unet import UNet
from mflux_vae_train.pipelines.stable_diffusion.unet_config import UNetConfig
from mflux_vae_train.pipelines.text import clip
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer
from mflux_vae_train.tiny_world.tokenizers import build_clip_tokenizer
from tests.mflux_vae_train.pipelines.flux1.small_flux import WORDS, drawn

KINDS = ("sd1", "sd2", "sdxl", "ssd")

_VAE = AutoencoderKLConfig(block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)


def small_unet(kind: str) -> UNetConfig:
    """The blocks of Stable Diffusion 1, 2, SDXL or SSD-1B with few channels."""
    base = {"norm_num_groups": 2, "layers_per_block": 2, "sample_size": 8}
    if kind == "sd1":
        config = UNetConfig(block_out_channels=(4, 8, 8, 8), cross_attention_dim=16, attention_head_dim=2, **base)
    elif kind == "sd2":
        config = UNetConfig(
            block_out_channels=(4, 8, 8, 8),
            cross_attention_dim=16,
            attention_head_dim=(1, 2, 2, 2),
            use_linear_projection=True,
            **base,
        )
    else:
        config = replace(
            SDXL.unet,
            block_out_channels=(4, 8, 8),
            cross_attention_dim=28,
            attention_head_dim=(1, 2, 2),
            transformer_layers_per_block=(1, 1, 2),
            addition_time_embed_dim=2,
            projection_class_embeddings_input_dim=12 + 12,
            **base,
        )
    if kind == "ssd":
        return replace(
            config,
            transformer_layers_per_block=((1,), (2, 2), (1, 1)),
            reverse_transformer_layers_per_block=((1, 1, 2), (2, 1, 1), 1),
            mid_block_type="UNetMidBlock2D",
        )
    return config


def small_configs(kind: str, vocabulary: int = 99, positions: int = 16) -> Configs:
    """Configurations of a small pipeline."""
    like = {"sd1": SD_1, "sd2": SD_2}.get(kind, SDXL)
    sizes = {
        "vocab_size": vocabulary,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "max_position_embeddings": positions,
    }
    second = like.text_encoder_2
    return replace(
        like,
        unet=small_unet(kind),
        text_encoder=replace(like.text_encoder, hidden_size=16, **sizes),
        text_encoder_2=second and replace(second, hidden_size=12, projection_dim=12, **sizes),
        vae=_VAE.to_dict(),
        recommended=replace(like.recommended, resolution=64),
    )


def small_parts(configs: Configs, folder: Path) -> Parts:
    """Parts of random weights; the tokenizers' files go into `folder`."""
    first = drawn(clip.CLIPTextModel(configs.text_encoder), 0)
    second = configs.text_encoder_2 and drawn(clip.CLIPTextModelWithProjection(configs.text_encoder_2), 1)
    names = ["tokenizer", *(["tokenizer_2"] if second else [])]
    for name in names:
        build_clip_tokenizer(WORDS, folder / name, configs.text_encoder.max_position_embeddings)
    mx.eval(mx.random.state)
    return stable_diffusion_parts(
        unet=drawn(UNet(configs.unet), 2),
        vae=VAE(network=drawn(AutoencoderKL(_VAE), 3)),
        text_encoder=first,
        tokenizer=LazyTokenizer(folder / "tokenizer"),
        text_encoder_2=second,
        tokenizer_2=LazyTokenizer(folder / "tokenizer_2") if second else None,
    )
