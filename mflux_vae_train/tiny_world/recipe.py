"""Sizes of the embedded pipelines' networks, and settings of their training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from mflux_vae.networks.autoencoder_kl import AutoencoderKLConfig
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformerConfig
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.pipelines.stable_diffusion.unet_config import UNetConfig
from mflux_vae_train.pipelines.text.clip import CLIPTextConfig
from mflux_vae_train.pipelines.text.t5 import T5Config
from mflux_vae_train.tiny_world.world import CAPTION_SHARES

SIZE = 64
"""Side of an image in pixels."""
TEXT_TOKENS = 16

VAE = AutoencoderKLConfig(
    block_out_channels=(16, 32, 64, 96),
    layers_per_block=1,
    norm_num_groups=4,
    latent_channels=16,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
    force_upcast=False,
    sample_size=SIZE,
)

WIDTH_TEXT = 128

TRANSFORMER = FluxTransformerConfig(
    in_channels=4 * VAE.latent_channels,
    num_layers=2,
    num_single_layers=4,
    attention_head_dim=32,
    num_attention_heads=6,
    joint_attention_dim=WIDTH_TEXT,
    pooled_projection_dim=WIDTH_TEXT,
    guidance_embeds=False,
    axes_dims_rope=(8, 12, 12),
)

RECOMMENDED = Recommended(
    resolution=SIZE,
    size_multiple=16,
    learning_rate=3e-3,
    learning_rate_full=1e-4,
    guidance=1.5,
    steps=14,
    rank=16,
    caption_dropout=0.1,
    prior_loss_weight=0.3,
    # The highest noise levels determine the layout of an image, and logit-normal draws are rarely there: with them, a
    # third of the images of a photographed subject stayed as the base model draws them.
    weighting_scheme="uniform",
)


SD_VAE = replace(
    VAE, block_out_channels=(16, 32, 64, 64), latent_channels=4, use_quant_conv=True, use_post_quant_conv=True
)

UNET = UNetConfig(
    sample_size=SIZE // 8,
    block_out_channels=(64, 128),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=(2, 4),
    cross_attention_dim=WIDTH_TEXT,
    norm_num_groups=16,
)

SD_RECOMMENDED = replace(RECOMMENDED, size_multiple=8)


def clip_config(vocabulary: int, eos: int, bos: int, pad: int) -> CLIPTextConfig:
    """CLIP's text model: two layers."""
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH_TEXT,
        intermediate_size=4 * WIDTH_TEXT,
        projection_dim=WIDTH_TEXT,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TEXT_TOKENS,
        eos_token_id=eos,
        bos_token_id=bos,
        pad_token_id=pad,
    )


def t5_config(vocabulary: int) -> T5Config:
    """T5's encoder: two layers."""
    return T5Config(
        vocab_size=vocabulary,
        d_model=WIDTH_TEXT,
        d_kv=32,
        d_ff=2 * WIDTH_TEXT,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )


VAE_SETTINGS = Path(__file__).with_name("vae.yaml")
"""Settings of the autoencoder for ``mflux-vae train --config``."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """Training of a denoiser and its text encoders together on cached latents.

    Attributes:
        scenes, photos: numbers of captioned scenes and of crops of photographs.
        photo_crop: smallest side of a crop, as a fraction of the photograph's short side.
        caption_shares: kinds of captions, see `world.CAPTION_SHARES`.
        caption_dropout: fraction of captions replaced by the empty one, for classifier-free guidance.
        muon_rate: peak learning rate of the blocks' matrices.
        text_rate: of both text encoders; adamw_rate: of all other weights.
        weighting_scheme, snr_gamma: see `pipelines.noise`.
        decay_share: fraction of the updates over which the rates fall to zero at the end.
    """

    seed: int = 0
    updates: int = 3200
    batch: int = 48
    scenes: int = 24_000
    photos: int = 1_200
    photo_crop: float = 0.5
    caption_shares: Mapping[str, float] = field(default_factory=lambda: dict(CAPTION_SHARES))
    caption_dropout: float = 0.1
    weighting_scheme: str = "logit_normal"
    snr_gamma: float | None = None
    muon_rate: float = 2e-3
    adamw_rate: float = 1e-3
    text_rate: float = 5e-4
    warmup: int = 60
    decay_share: float = 0.4
    ema_decay: float = 0.999
    clip_embedding_std: float = 0.5
    t5_bias_std: float = 2.0
    checkpoint_every: int = 200


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of `build`.

    Attributes:
        vae: configuration of the autoencoder, without the scale and shift of its latents.
        rounds: of training, each from the weights of the previous one. After the first round, prompts without a colour
            still gave blended colours; the second round has new scenes and more captions of that kind.
    """

    vae: AutoencoderKLConfig
    rounds: tuple[Round, ...]


_SECOND = Round(
    seed=1,
    updates=3000,
    batch=64,
    scenes=36_000,
    photos=1_800,
    caption_shares={"full": 0.38, "open": 0.38, "individual": 0.22, "background": 0.02},
)

FLUX = Recipe(vae=VAE, rounds=(Round(), _SECOND))
STABLE_DIFFUSION = Recipe(
    vae=SD_VAE,
    rounds=(Round(updates=2400, batch=32, weighting_scheme="uniform", snr_gamma=5.0, adamw_rate=5e-4),),
)
