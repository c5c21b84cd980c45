"""TAESD (Bohan 2023): small autoencoders for the latents of Stable Diffusion, SDXL, SD3, FLUX.1 and FLUX.2."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.errors import SettingsError
from mflux_vae.networks.latent_scaling import ScaledConfig, ScaledLatents, patchify, unpatchify
from mflux_vae.networks.layers import Conv2d, GroupNorm
from mflux_vae.posterior import DiagonalGaussian

_FIXED = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2}
"""Fields of diffusers' configuration with the same value in every published network."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderTinyConfig(ScaledConfig):
    """Fields of the config.json of diffusers' `AutoencoderTiny`; defaults are those of TAESD.

    diffusers lacks `pool` and `patch_size`: `to_dict` omits them if they have their defaults.

    Attributes:
        in_channels, out_channels: channels of an image.
        latent_channels: channels of a latent.
        encoder_block_out_channels, decoder_block_out_channels: channels per level, equal within each.
        num_encoder_blocks, num_decoder_blocks: residual blocks per level, in order of computation.
        latent_magnitude, latent_shift: latents / (2 * magnitude) + shift is about [0, 1], to store latents in bytes.
        scaling_factor, shift_factor: scaled latents are (latents - shift) * scale.
        force_upcast: whether the network overflows in float16.
        pool: blocks at the lowest resolution also normalise over the image, as in TAEF2.
        patch_size: scaled latents are patches with this many latents per side, as FLUX.2's denoiser sees them.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_magnitude: float = 3
    latent_shift: float = 0.5
    scaling_factor: float = 1.0
    shift_factor: float = 0.0
    force_upcast: bool = False
    pool: bool = False
    patch_size: int = 1

    UNKNOWN_TO_DIFFUSERS: ClassVar[Mapping[str, Any]] = {"pool": False, "patch_size": 1}
    """Fields that diffusers lacks, with their defaults."""

    def __post_init__(self) -> None:
        for half in ("encoder", "decoder"):
            widths, blocks = (
                tuple(getattr(self, f"{half}_block_out_channels")),
                tuple(getattr(self, f"num_{half}_blocks")),
            )
            object.__setattr__(self, f"{half}_block_out_channels", widths)
            object.__setattr__(self, f"num_{half}_blocks", blocks)
            if len(widths) != len(blocks) or not widths or min(blocks) < 0:
                raise SettingsError(
                    f"AutoencoderTiny: {half} widths {widths} and blocks {blocks} are not one per level"
                )
            if len(set(widths)) > 1 or widths[0] < 1:
                raise SettingsError(f"AutoencoderTiny: {half}_block_out_channels {widths} must be one number, repeated")
        if len(self.num_encoder_blocks) != len(self.num_decoder_blocks):
            raise SettingsError("AutoencoderTiny: num_encoder_blocks and num_decoder_blocks differ in length")
        for name in ("in_channels", "out_channels", "latent_channels", "patch_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"AutoencoderTiny: {name} must be positive, not {getattr(self, name)}")
        if not self.scaling_factor:
            raise SettingsError("AutoencoderTiny: scaling_factor must not be 0")

    @property
    def downsampling(self) -> int:
        """Pixels per latent in each direction."""
        return 2 ** (len(self.num_encoder_blocks) - 1)

    @property
    def scaled_channels(self) -> int:
        """Channels of a scaled latent."""
        return self.latent_channels * self.patch_size**2

    @property
    def scaled_downsampling(self) -> int:
        """Pixels per scaled latent in each direction."""
        return self.downsampling * self.patch_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AutoencoderTinyConfig:
        """Read diffusers' config.json.

        Raises:
            SettingsError: an unsupported or invalid configuration.
        """
        for key, fixed in _FIXED.items():
            if config.get(key, fixed) != fixed:
                raise SettingsError(f"AutoencoderTiny: {key} {config[key]!r} not supported; only {fixed!r}")
        given = {key: value for key, value in config.items() if key in cls.__dataclass_fields__ and value is not None}
        try:
            return cls(**given)
        except TypeError as error:
            raise SettingsError(f"AutoencoderTiny: invalid configuration ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """Return a config.json for diffusers; see `AutoencoderKLConfig.to_dict` for a network that it lacks."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        beyond = [key for key, default in self.UNKNOWN_TO_DIFFUSERS.items() if values[key] != default]
        values = {key: value for key, value in values.items() if key in beyond or key not in self.UNKNOWN_TO_DIFFUSERS}
        head: dict[str, Any] = {"_class_name": "AutoencoderTiny"}
        if beyond:
            head = {"_class_name": "AutoencoderTinyExtended", "_not_in_diffusers": beyond}
        return {**head, **_FIXED, **values}


class Relu(nn.Module):
    """A module, so that layer numbers match those in files."""

    def __call__(self, x: mx.array) -> mx.array:
        return kernels.relu(x)


class UpsampleNearest(nn.Module):
    """A module, so that layer numbers match those in files."""

    def __call__(self, x: mx.array) -> mx.array:
        return kernels.upsample_nearest_2x(x)


class Block(nn.Module):
    """Three convolutions with a skip connection.

    Args:
        pool: first add a branch that is normalised over the image.
    """

    def __init__(self, channels: int, *, pool: bool = False):
        super().__init__()
        convolutions = [Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = [convolutions[0], Relu(), convolutions[1], Relu(), convolutions[2]]
        if pool:
            wide = 4 * channels
            narrow, widen = Conv2d(wide, channels, 1, bias=False), Conv2d(channels, wide, 1, bias=False)
            self.pool = [widen, GroupNorm(4, wide, eps=1e-5), Relu(), narrow]

    def __call__(self, x: mx.array) -> mx.array:
        x = x + _in_sequence(self.pool, x) if "pool" in self else x
        return kernels.relu(_in_sequence(self.conv, x) + x)


def _in_sequence(layers: list[nn.Module], x: mx.array) -> mx.array:
    for layer in layers:
        x = layer(x)
    return x


class Sequential(nn.Module):
    """Layers in sequence, numbered as in files."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = layers

    def __call__(self, x: mx.array) -> mx.array:
        return _in_sequence(self.layers, x)


def _conv3x3(channels: int, *, stride: int = 1) -> Conv2d:
    return Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)


def _encoder(config: AutoencoderTinyConfig) -> Sequential:
    """Pixels in [0, 1] to latents: (B, H, W, in) -> (B, H/f, W/f, latent)."""
    width = config.encoder_block_out_channels[0]
    layers: list[nn.Module] = []
    for level, blocks in enumerate(config.num_encoder_blocks):
        layers.append(_conv3x3(width, stride=2) if level else Conv2d(config.in_channels, width, 3, padding=1))
        lowest = level == len(config.num_encoder_blocks) - 1
        layers += [Block(width, pool=config.pool and lowest) for _ in range(blocks)]
    return Sequential([*layers, Conv2d(width, config.latent_channels, 3, padding=1)])


def _decoder(config: AutoencoderTinyConfig) -> Sequential:
    """Latents to pixels in about [0, 1]: (B, h, w, latent) -> (B, f*h, f*w, out)."""
    width = config.decoder_block_out_channels[0]
    layers: list[nn.Module] = [Conv2d(config.latent_channels, width, 3, padding=1), Relu()]
    for level, blocks in enumerate(config.num_decoder_blocks):
        if level:
            layers += [UpsampleNearest(), _conv3x3(width)]
        layers += [Block(width, pool=config.pool and not level) for _ in range(blocks)]
    return Sequential([*layers, Conv2d(width, config.out_channels, 3, padding=1)])


class AutoencoderTiny(ScaledLatents):
    """Convolutions and ReLU, no variances; images in [-1, 1], latents as a denoiser sees them."""

    def __init__(self, config: AutoencoderTinyConfig | None = None):
        super().__init__()
        self.config = config or AutoencoderTinyConfig()
        self.encoder = _encoder(self.config)
        self.decoder = _decoder(self.config)

    def encode(self, pixels: mx.array) -> DiagonalGaussian:
        """(B, H, W, C) in [-1, 1] -> (B, H/f, W/f, latent), a point posterior."""
        return DiagonalGaussian.point(self.encoder(pixels * 0.5 + 0.5))

    def decode(self, latents: mx.array) -> mx.array:
        """(B, h, w, latent) -> (B, f*h, f*w, C), about [-1, 1], not clipped."""
        return self.decoder(kernels.tanh(latents / 3) * 3) * 2 - 1

    def to_scaled(self, latents: mx.array) -> mx.array:
        """Scale raw latents (B, h, w, latent) for a denoiser, in patches if the configuration has them.

        Raises:
            ImageError: sides are not multiples of the patch size.
        """
        scaled, side = super().to_scaled(latents), self.config.patch_size
        return scaled if side == 1 else patchify(scaled, side)

    def from_scaled(self, latents: mx.array) -> mx.array:
        """Inverse of `to_scaled`."""
        side = self.config.patch_size
        return super().from_scaled(latents if side == 1 else unpatchify(latents, side))
