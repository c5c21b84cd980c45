"""The KL-regularised convolutional autoencoder of Stable Diffusion, SDXL, SD3 and FLUX (Rombach et al. 2022)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.errors import SettingsError
from mflux_vae.layers import Conv2d, Downsample, GroupNorm, MidBlock, ResnetBlock, Stage, Upsample
from mflux_vae.posterior import DiagonalGaussian

# What diffusers takes where a config.json is silent, as far as it is not what published autoencoders have.
_ABSENT = {"block_out_channels": (64,), "layers_per_block": 1, "sample_size": 32}


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLConfig:
    """Field names are those of the config.json of diffusers' `AutoencoderKL`; defaults are Stable Diffusion's.

    Attributes:
        in_channels, out_channels: channels of an image.
        latent_channels: channels of a latent.
        block_out_channels: channels of each level; every level but the last halves the resolution.
        layers_per_block: residual blocks of an encoder level; the decoder has one more.
        norm_num_groups: groups of every group norm; divides every number of channels.
        scaling_factor, shift_factor: the denoiser sees (latents - shift) * scale.
        use_quant_conv, use_post_quant_conv: 1x1 convolutions around the latents.
        mid_block_add_attention: attention at the lowest resolution.
        force_upcast: whether the network overflows in float16.
        sample_size: side of the images it was trained on, pixels.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    force_upcast: bool = True
    sample_size: int = 512

    def __post_init__(self) -> None:
        object.__setattr__(self, "block_out_channels", tuple(self.block_out_channels))
        counts = ("in_channels", "out_channels", "latent_channels", "layers_per_block", "norm_num_groups")
        for name in counts:
            if getattr(self, name) < 1:
                raise SettingsError(f"AutoencoderKL: {name} must be positive, not {getattr(self, name)}")
        uneven = [c for c in self.block_out_channels if c < 1 or c % self.norm_num_groups]
        if uneven or not self.block_out_channels:
            raise SettingsError(
                f"AutoencoderKL: block_out_channels {self.block_out_channels} must be multiples of "
                f"norm_num_groups ({self.norm_num_groups})"
            )

    @property
    def downsampling(self) -> int:
        """Pixels per latent in each direction."""
        return 2 ** (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AutoencoderKLConfig:
        """Read diffusers' config.json; what only describes its block classes is checked, not kept.

        Raises:
            SettingsError: the configuration asks for what this network does not have, or is no configuration.
        """
        for key, wanted in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            if unknown := set(config.get(key, [wanted])) - {wanted}:
                raise SettingsError(f"AutoencoderKL: {key} {sorted(unknown)} not supported; only {wanted}")
        if config.get("act_fn", "silu") not in ("silu", "swish"):
            raise SettingsError(f"AutoencoderKL: act_fn {config['act_fn']!r} not supported; only 'silu'")
        for key in ("latents_mean", "latents_std"):
            if config.get(key) is not None:
                raise SettingsError(f"AutoencoderKL: {key} not supported; only scaling_factor and shift_factor")
        given = {key: value for key, value in config.items() if key in cls.__dataclass_fields__ and value is not None}
        try:
            return cls(**{**_ABSENT, **given})
        except TypeError as error:
            raise SettingsError(f"AutoencoderKL: a value of the wrong type in its configuration ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """What diffusers reads."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            **asdict(self),
            "block_out_channels": list(self.block_out_channels),
        }


class Encoder(nn.Module):
    """Pixels to latent moments: (B, H, W, in) -> (B, H/f, W/f, 2 * latent)."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        channels, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = Conv2d(config.in_channels, channels[0], 3, padding=1)
        self.down_blocks = []
        previous = channels[0]
        for level, width in enumerate(channels):
            widths = [previous] + [width] * config.layers_per_block
            resnets = [ResnetBlock(a, b, groups) for a, b in pairwise(widths)]
            last = level == len(channels) - 1
            self.down_blocks.append(Stage(resnets, down=None if last else Downsample(width)))
            previous = width
        self.mid_block = MidBlock(previous, groups, attention=config.mid_block_add_attention)
        self.conv_norm_out = GroupNorm(groups, previous)
        self.conv_out = Conv2d(previous, 2 * config.latent_channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(kernels.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents to pixels: (B, h, w, latent) -> (B, f*h, f*w, out)."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        channels, groups = tuple(reversed(config.block_out_channels)), config.norm_num_groups
        self.conv_in = Conv2d(config.latent_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], groups, attention=config.mid_block_add_attention)
        self.up_blocks = []
        previous = channels[0]
        for level, width in enumerate(channels):
            widths = [previous] + [width] * (config.layers_per_block + 1)
            resnets = [ResnetBlock(a, b, groups) for a, b in pairwise(widths)]
            last = level == len(channels) - 1
            self.up_blocks.append(Stage(resnets, up=None if last else Upsample(width)))
            previous = width
        self.conv_norm_out = GroupNorm(groups, previous)
        self.conv_out = Conv2d(previous, config.out_channels, 3, padding=1)

    def __call__(self, z: mx.array) -> mx.array:
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(kernels.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    """Encoder and decoder around a diagonal Gaussian; images in [-1, 1], latents unscaled."""

    def __init__(self, config: AutoencoderKLConfig | None = None):
        super().__init__()
        self.config = config = config or AutoencoderKLConfig()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.use_quant_conv:
            self.quant_conv = Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        if config.use_post_quant_conv:
            self.post_quant_conv = Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, pixels: mx.array) -> DiagonalGaussian:
        """(B, H, W, C) in [-1, 1] -> posterior over (B, H/f, W/f, latent)."""
        moments = self.encoder(pixels)
        return DiagonalGaussian.from_moments(self.quant_conv(moments) if "quant_conv" in self else moments)

    def decode(self, latents: mx.array) -> mx.array:
        """(B, h, w, latent) unscaled -> (B, f*h, f*w, C), about [-1, 1], not clipped."""
        return self.decoder(self.post_quant_conv(latents) if "post_quant_conv" in self else latents)
