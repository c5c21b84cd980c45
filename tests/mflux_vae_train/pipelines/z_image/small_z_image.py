"""A whole Z-Image pipeline of some ten thousand random weights, for tests: every part real, only small."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mflux_vae import VAE, AutoencoderKL, AutoencoderKLConfig
from mflux_vae_train.pipelines.flow.files import parts_of
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.pipelines.text.qwen3 import Qwen3Config
from mflux_vae_train.pipelines.text.tokenizer import LazyTokenizer
from mflux_vae_train.pipelines.z_image.configs import OF_BASE, OF_TURBO
from mflux_vae_train.pipelines.z_image.family import FAMILY, text_encoder
from mflux_vae_train.pipelines.z_image.pipeline import ZImagePipeline
from mflux_vae_train.pipelines.z_image.transformer import ZImageTransformer, ZImageTransformerConfig
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn
from tests.mflux_vae_train.pipelines.text.qwen_folder import write_qwen_tokenizer

TEXT_TOKENS = 96
VAE_CONFIG = AutoencoderKLConfig(
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


def small_config(**changes) -> ZImageTransformerConfig:
    return ZImageTransformerConfig(
        **{
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 20,
            "axes_dims": (8, 4, 4),
            "axes_lens": (1024, 32, 32),
        }
        | changes
    )


def small_pipeline(folder: Path, *, turbo: bool = False, recommended: Recommended | None = None) -> ZImagePipeline:
    """Build a pipeline from random weights; the tokenizer's files go into `folder`."""
    configs = OF_TURBO if turbo else OF_BASE
    encoder = Qwen3Config(
        vocab_size=write_qwen_tokenizer(folder / "tokenizer"),
        hidden_size=20,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    configs = replace(
        configs,
        transformer=small_config(),
        text_encoder=encoder,
        vae=VAE_CONFIG.to_dict(),
        recommended=recommended or replace(configs.recommended, resolution=32, steps=3, rank=4),
    )
    networks = {
        "transformer": drawn(ZImageTransformer(configs.transformer), 2),
        "text_encoder": drawn(text_encoder(encoder), 1),
    }
    tokenizers = {"tokenizer": LazyTokenizer(folder / "tokenizer")}
    parts = parts_of(FAMILY, networks, VAE(network=drawn(AutoencoderKL(VAE_CONFIG), 3)), tokenizers)
    pipeline = ZImagePipeline(parts, configs, name="small")
    pipeline.prompt_limit = TEXT_TOKENS
    return pipeline
