"""The autoencoder of Wan 2.1 and Qwen-Image for single images: causal 3-D convolutions of one frame are 2-D.

Before the first frame lie zeros, so of a 3x3x3 kernel only the last 3x3 taps matter, and convolutions in time are
skipped. That leaves 44.6 of 126.9 million parameters. Weights for videos: see `weights.keymaps.wan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import chain, pairwise
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.errors import SettingsError
from mflux_vae.kernels.overrides import overridable
from mflux_vae.networks.latent_scaling import ScaledConfig, ScaledLatents
from mflux_vae.networks.layers import Conv2d, Downsample, Linear, Stage, Upsample
from mflux_vae.posterior import DiagonalGaussian
from mflux_vae.runtime.device import is_cpu

C = TypeVar("C", bound="AutoencoderKLWanConfig")

EPS = 1e-24
"""Added to the mean square of a pixel's channels: diffusers' norms have a length of at least 1e-12."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLWanConfig(ScaledConfig):
    """Fields of the config.json of diffusers' `AutoencoderKLWan`; defaults are those of Wan 2.1.

    Attributes:
        in_channels, out_channels: channels of an image.
        z_dim: channels of a latent.
        base_dim, decoder_base_dim: channels of the first level of the encoder and of the decoder (None: equal).
        dim_mult: factor on them per level; every level but the last halves the resolution.
        num_res_blocks: residual blocks of an encoder level; the decoder has one more.
        temperal_downsample: levels that also halve the number of frames; only for files.
        latents_mean, latents_std: scaled latents are (latents - mean) / std, per channel.
        force_upcast: whether the network overflows in float16; not in diffusers.
    """

    in_channels: int = 3
    out_channels: int = 3
    z_dim: int = 16
    base_dim: int = 96
    decoder_base_dim: int | None = None
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    force_upcast: bool = False

    NAME: ClassVar[str] = "AutoencoderKLWan"
    FIXED: ClassVar[Mapping[str, Any]] = {"attn_scales": [], "dropout": 0.0, "is_residual": False, "patch_size": None}
    """Fields of diffusers' configuration with the same value in every published network of this kind."""

    def __post_init__(self) -> None:
        for name in ("dim_mult", "temperal_downsample", "latents_mean", "latents_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.decoder_base_dim == self.base_dim:
            object.__setattr__(self, "decoder_base_dim", None)
        numbers = ("in_channels", "out_channels", "z_dim", "base_dim", "num_res_blocks", "dim_mult", "decoder_widths")
        for name in numbers:
            given = getattr(self, name)
            if not given or min(given if isinstance(given, tuple) else (given,)) < 1:
                raise SettingsError(f"{self.NAME}: {name} must be positive, not {given}")
        if odd := [width for width in self.decoder_widths[1:] if width % 2]:
            raise SettingsError(f"{self.NAME}: upsampling halves the channels of the decoder, but {odd[0]} is odd")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise SettingsError(
                f"{self.NAME}: {len(self.temperal_downsample)} temperal_downsample for {len(self.dim_mult)} dim_mult;"
                " give one less"
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(self, name)) != self.z_dim:
                raise SettingsError(f"{self.NAME}: {name} has {len(getattr(self, name))} values for z_dim {self.z_dim}")
        if not all(self.latents_std):
            raise SettingsError(f"{self.NAME}: latents_std must not contain 0")

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.z_dim

    @property
    def downsampling(self) -> int:
        """Pixels per latent in each direction."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def scaling_factor(self) -> float:
        """1: `latents_mean` and `latents_std` scale the latents."""
        return 1.0

    @property
    def shift_factor(self) -> None:
        """None, see `scaling_factor`."""

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels of each level of the encoder, from the highest resolution."""
        return tuple(self.base_dim * factor for factor in self.dim_mult)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels of each level of the decoder, from the highest resolution."""
        return tuple((self.decoder_base_dim or self.base_dim) * factor for factor in self.dim_mult)

    @classmethod
    def from_dict(cls: type[C], config: Mapping[str, Any]) -> C:
        """Read diffusers' config.json.

        Raises:
            SettingsError: an unsupported or invalid configuration.
        """
        for key, fixed in cls.FIXED.items():
            if (config.get(key) or fixed) != fixed:
                raise SettingsError(f"{cls.NAME}: {key} {config[key]!r} not supported; only {fixed!r}")
        given = {key: value for key, value in config.items() if key in cls.__dataclass_fields__ and value is not None}
        try:
            return cls(**given)
        except TypeError as error:
            raise SettingsError(f"{cls.NAME}: invalid configuration ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """Return a config.json for diffusers."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        if not values["force_upcast"]:
            del values["force_upcast"]
        factors = {
            "scale_factor_temporal": 2 ** sum(self.temperal_downsample),
            "scale_factor_spatial": self.downsampling,
        }
        return {"_class_name": self.NAME, **self.FIXED, **values, **factors}


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLQwenImageConfig(AutoencoderKLWanConfig):
    """Fields of the config.json of diffusers' `AutoencoderKLQwenImage`; there, `input_channels` are both channels."""

    NAME: ClassVar[str] = "AutoencoderKLQwenImage"
    FIXED: ClassVar[Mapping[str, Any]] = {"attn_scales": [], "dropout": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_channels != self.out_channels or self.decoder_base_dim:
            raise SettingsError(f"{self.NAME}: encoder and decoder must have equal channels")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AutoencoderKLQwenImageConfig:
        """As `AutoencoderKLWanConfig.from_dict`."""
        if channels := config.get("input_channels"):
            config = {**config, "in_channels": channels, "out_channels": channels}
        return super().from_dict(config)

    def to_dict(self) -> dict[str, Any]:
        """As `AutoencoderKLWanConfig.to_dict`."""
        values = super().to_dict()
        theirs = {"input_channels": values.pop("in_channels")}
        for key in ("out_channels", "decoder_base_dim", "scale_factor_temporal", "scale_factor_spatial"):
            del values[key]
        return {**values, **theirs}


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the channels of each pixel."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = mx.ones((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        return kernels.rms_norm(x, self.gamma, EPS)


def _norm_silu_conv(norm: RMSNorm, conv: Conv2d, x: mx.array, residual: mx.array | None = None) -> mx.array:
    """conv(silu(norm(x))) + residual."""
    y = kernels.silu(norm(x))
    y = conv(y) if is_cpu() else kernels.conv2d(y, conv.weight, conv.get("bias"), padding=conv._padding)
    return y if residual is None else residual + y


class ResnetBlock(nn.Module):
    """Twice norm, SiLU, conv, with a skip connection."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = RMSNorm(in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = RMSNorm(out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = Conv2d(in_channels, out_channels, 1)

    def __call__(self, x: mx.array) -> mx.array:
        h = _norm_silu_conv(self.norm1, self.conv1, x)
        x = self.conv_shortcut(x) if "conv_shortcut" in self else x
        return _norm_silu_conv(self.norm2, self.conv2, h, residual=x)


class Attention(nn.Module):
    """Single-head self-attention over all pixels, with a skip connection."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = RMSNorm(channels)
        self.to_qkv = Linear(channels, 3 * channels)
        self.proj = Linear(channels, channels)

    @overridable
    def __call__(self, x: mx.array) -> mx.array:
        batch, height, width, channels = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(batch, height * width, 1, 3 * channels)
        return x + self.proj(kernels.attention(*mx.split(qkv, 3, axis=-1), scale=channels**-0.5)).reshape(x.shape)


class MidBlock(nn.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.resnets = [ResnetBlock(channels, channels) for _ in range(2)]
        self.attentions = [Attention(channels)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """Pixels to latent moments: (B, H, W, in) -> (B, H/f, W/f, 2 * z)."""

    def __init__(self, config: AutoencoderKLWanConfig):
        super().__init__()
        widths = config.encoder_widths
        previous = config.base_dim
        self.conv_in = Conv2d(config.in_channels, previous, 3, padding=1)
        self.down_blocks: list[nn.Module] = []
        for level, width in enumerate(widths):
            inside = [previous] + [width] * config.num_res_blocks
            self.down_blocks += [ResnetBlock(a, b) for a, b in pairwise(inside)]
            if level < len(widths) - 1:
                self.down_blocks.append(Downsample(width))
            previous = width
        self.mid_block = MidBlock(previous)
        self.norm_out = RMSNorm(previous)
        self.conv_out = Conv2d(previous, 2 * config.z_dim, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for layer in self.down_blocks:
            x = layer(x)
        return _norm_silu_conv(self.norm_out, self.conv_out, self.mid_block(x))


class Decoder(nn.Module):
    """Latents to pixels: (B, h, w, z) -> (B, f*h, f*w, out). Upsampling halves the channels."""

    def __init__(self, config: AutoencoderKLWanConfig):
        super().__init__()
        widths = config.decoder_widths[::-1]
        previous = widths[0]
        self.conv_in = Conv2d(config.z_dim, previous, 3, padding=1)
        self.mid_block = MidBlock(previous)
        self.up_blocks = []
        for level, width in enumerate(widths):
            inside = [previous] + [width] * (config.num_res_blocks + 1)
            up = Upsample(width, width // 2) if level < len(widths) - 1 else None
            self.up_blocks.append(Stage([ResnetBlock(a, b) for a, b in pairwise(inside)], up=up))
            previous = width // 2
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def __call__(self, z: mx.array) -> mx.array:
        x = self.mid_block(self.conv_in(z))
        for step in chain.from_iterable(block.steps() for block in self.up_blocks):
            x = step(x)
        return _norm_silu_conv(self.norm_out, self.conv_out, x)


class AutoencoderKLWan(ScaledLatents):
    """Encoder and decoder with a diagonal Gaussian posterior; images in [-1, 1], latents unscaled."""

    CONFIG: ClassVar[type[AutoencoderKLWanConfig]] = AutoencoderKLWanConfig

    def __init__(self, config: AutoencoderKLWanConfig | None = None):
        super().__init__()
        self.config: AutoencoderKLWanConfig = config or self.CONFIG()
        z = self.config.z_dim
        self.encoder = Encoder(self.config)
        self.quant_conv = Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = Conv2d(z, z, 1)
        self.decoder = Decoder(self.config)
        self.eval()

    def encode(self, pixels: mx.array) -> DiagonalGaussian:
        """(B, H, W, C) in [-1, 1] -> posterior over (B, H/f, W/f, z)."""
        return DiagonalGaussian.from_moments(self.quant_conv(self.encoder(pixels)))

    def decode(self, latents: mx.array) -> mx.array:
        """(B, h, w, z) unscaled -> (B, f*h, f*w, C), about [-1, 1]; diffusers clips to it."""
        return self.decoder(self.post_quant_conv(latents))


class AutoencoderKLQwenImage(AutoencoderKLWan):
    """The same network with the configuration and weights of Qwen-Image."""

    CONFIG = AutoencoderKLQwenImageConfig
