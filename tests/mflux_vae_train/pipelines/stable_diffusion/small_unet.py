"""Configurations of UNets: those of diffusers' tests, which have some ten thousand weights, and the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from mflux_vae_train.pipelines.stable_diffusion.unet_config import UNetConfig

DOWN, CROSS_DOWN, UP, CROSS_UP = "DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"

TEXT_TOKENS = 7

GOLDEN = Path(__file__).with_name("golden.safetensors")
"""diffusers' predictions, written by `tests.parity.stable_diffusion.make_golden`."""

_SIZES: dict[str, Any] = {"addition_embed_type": "text_time", "use_linear_projection": True}
_TINY: dict[str, Any] = {
    "down_block_types": (DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, UP),
    "norm_num_groups": 2,
    "sample_size": 32,
}
_XL: dict[str, Any] = {
    **_SIZES,
    "down_block_types": (DOWN, CROSS_DOWN, CROSS_DOWN),
    "up_block_types": (CROSS_UP, CROSS_UP, UP),
    "block_out_channels": (320, 640, 1280),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}

SD1 = UNetConfig(**_TINY, block_out_channels=(4, 8), layers_per_block=1, cross_attention_dim=8, attention_head_dim=8)
SD2 = UNetConfig(
    **_TINY,
    block_out_channels=(32, 64),
    cross_attention_dim=32,
    attention_head_dim=(2, 4),
    use_linear_projection=True,
    upcast_attention=True,
)
SDXL = UNetConfig(
    **_TINY | {"norm_num_groups": 1},
    **_SIZES,
    block_out_channels=(2, 4),
    transformer_layers_per_block=(1, 2),
    attention_head_dim=(2, 4),
    cross_attention_dim=64,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=80,
)
DEEP = UNetConfig(
    block_out_channels=(8, 12, 16, 16),
    cross_attention_dim=20,
    attention_head_dim=4,
    norm_num_groups=4,
    sample_size=16,
)
"""Four levels, as Stable Diffusion 1 and 2 have them."""
SSD = UNetConfig(
    **_SIZES,
    down_block_types=(DOWN, CROSS_DOWN, CROSS_DOWN),
    up_block_types=(CROSS_UP, CROSS_UP, UP),
    block_out_channels=(8, 12, 16),
    transformer_layers_per_block=(1, (2, 1), (1, 2)),
    reverse_transformer_layers_per_block=((1, 2, 3), (2, 1, 1), 1),
    mid_block_type="UNetMidBlock2D",
    attention_head_dim=(2, 3, 4),
    norm_num_groups=4,
    cross_attention_dim=20,
    addition_time_embed_dim=6,
    projection_class_embeddings_input_dim=48,
)
NO_MIDDLE = UNetConfig(
    **_TINY, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=20, mid_block_type=None
)

SMALL = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL, "deep": DEEP, "ssd": SSD, "no middle": NO_MIDDLE}

SIZES = {"sd1": (8, 6), "sd2": (6, 8), "sdxl": (8, 8), "deep": (9, 13), "ssd": (7, 5), "no middle": (5, 4)}
"""Height and width of latents, even and odd."""

PUBLISHED = {
    "sd1.5": UNetConfig(cross_attention_dim=768, sample_size=64),
    "sd2.1": UNetConfig(
        cross_attention_dim=1024,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
        upcast_attention=True,
        sample_size=96,
    ),
    "sdxl": UNetConfig(**_XL, transformer_layers_per_block=(1, 2, 10)),
    "ssd-1b": UNetConfig(
        **_XL,
        transformer_layers_per_block=((1,), (2, 2), (4, 4)),
        reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
        mid_block_type="UNetMidBlock2D",
    ),
}

COUNTS = {
    "sd1.5": (859_520_964, 686),
    "sd2.1": (865_910_724, 686),
    "sdxl": (2_567_463_684, 1680),
    "ssd-1b": (1_331_334_404, 944),
}
"""Parameters and tensors."""


def inputs(config: UNetConfig, size: tuple[int, int], batch: int = 2, dtype: mx.Dtype = mx.float32) -> tuple[Any, ...]:
    """Arguments of a call, random."""
    keys = mx.random.split(mx.random.key(5), 3)
    latents = mx.random.normal((batch, *size, config.in_channels), key=keys[0]).astype(dtype)
    text = mx.random.normal((batch, TEXT_TOKENS, config.cross_attention_dim), key=keys[1]).astype(dtype)
    timesteps = mx.linspace(999, 21, batch)
    if config.pooled_width is None:
        return latents, timesteps, text
    pooled = mx.random.normal((batch, config.pooled_width), key=keys[2]).astype(dtype)
    time_ids = mx.array([[1023.0 - i, 768, 17, 0, 1024, 512 + i] for i in range(batch)])
    return latents, timesteps, text, (pooled, time_ids)
