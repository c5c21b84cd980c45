"""A convolutional autoencoder with LeakyReLU residual blocks and strided convolutions, without normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.errors import SettingsError
from mflux_vae.kernels import leaky_relu
from mflux_vae.kernels.overrides import pointwise
from mflux_vae.networks.config import NetworkConfig
from mflux_vae.networks.latent_scaling import ScaledConfig, ScaledLatents
from mflux_vae.networks.layers import Conv2d
from mflux_vae.posterior import DiagonalGaussian

NEGATIVE_SLOPE = 0.2


@dataclass(frozen=True, kw_only=True)
class PlainConfig(NetworkConfig, ScaledConfig):
    """Configuration of `PlainAutoencoder`.

    Attributes:
        in_channels, out_channels: channels of an image.
        latent_channels: channels of a latent.
        channels: width of each level; every level but the first halves the resolution.
        bottleneck_blocks: residual blocks at the lowest resolution, in encoder and decoder each.
        scaling_factor, shift_factor: scaled latents are (latents - shift) * scale.
    """

    NAME: ClassVar[str] = "PlainAutoencoder"
    force_upcast: ClassVar[bool] = False

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    channels: tuple[int, ...] = (64, 128, 256, 512)
    bottleneck_blocks: int = 2
    scaling_factor: float = 1.0
    shift_factor: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        for name in ("in_channels", "out_channels", "latent_channels"):
            if getattr(self, name) < 1:
                raise SettingsError(f"PlainAutoencoder: {name} must be positive, not {getattr(self, name)}")
        if not self.channels or min(self.channels) < 1:
            raise SettingsError(f"PlainAutoencoder: channels {self.channels} must be positive numbers, one per level")

    @property
    def downsampling(self) -> int:
        """Pixels per latent in each direction."""
        return 2 ** (len(self.channels) - 1)


def _leaky(x: mx.array) -> mx.array:
    return leaky_relu(x, NEGATIVE_SLOPE)


@pointwise
def _concatenate(a: mx.array, b: mx.array) -> mx.array:
    return mx.concatenate([a, b], axis=-1)


class ResBlock(nn.Module):
    """Two convolutions with LeakyReLU and a skip connection; initially the identity."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = _conv3x3(channels, channels)
        self.conv2 = _conv3x3(channels, channels)
        # A residual branch that starts at zero preserves the scale through any depth without normalisation.
        self.conv2.weight = mx.zeros_like(self.conv2.weight)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.conv2(_leaky(self.conv1(_leaky(x))))


class Down(nn.Module):
    """Halve the resolution, then a residual block."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = _conv3x3(in_channels, out_channels, stride=2)
        self.res = ResBlock(out_channels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.res(self.conv(_leaky(x)))


class Up(nn.Module):
    """Double the resolution, then a residual block."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = _conv3x3(in_channels, out_channels)
        self.res = ResBlock(out_channels)

    def __call__(self, x: mx.array) -> mx.array:
        return self.res(self.conv(kernels.upsample_nearest_2x(_leaky(x))))


class Encoder(nn.Module):
    """Pixels to latent moments: (B, H, W, in) -> (B, H/f, W/f, 2 * latent)."""

    def __init__(self, config: PlainConfig):
        super().__init__()
        top = config.channels[-1]
        self.conv_in = _conv3x3(config.in_channels, config.channels[0])
        self.down = [Down(a, b) for a, b in pairwise(config.channels)]
        self.bottleneck = [ResBlock(top) for _ in range(config.bottleneck_blocks)]
        self.mu = Conv2d(top, config.latent_channels, 3, padding=1)
        self.logvar = Conv2d(top, config.latent_channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for block in [*self.down, *self.bottleneck]:
            x = block(x)
        x = _leaky(x)
        return _concatenate(self.mu(x), self.logvar(x))


class Decoder(nn.Module):
    """Latents to pixels: (B, h, w, latent) -> (B, f*h, f*w, out)."""

    def __init__(self, config: PlainConfig):
        super().__init__()
        top = config.channels[-1]
        self.conv_in = _conv3x3(config.latent_channels, top)
        self.bottleneck = [ResBlock(top) for _ in range(config.bottleneck_blocks)]
        self.up = [Up(a, b) for a, b in pairwise(reversed(config.channels))]
        self.conv_out = Conv2d(config.channels[0], config.out_channels, 3, padding=1)

    def __call__(self, z: mx.array) -> mx.array:
        x = self.conv_in(z)
        for block in [*self.bottleneck, *self.up]:
            x = block(x)
        return self.conv_out(_leaky(x))


class PlainAutoencoder(ScaledLatents):
    """Encoder and decoder with a diagonal Gaussian posterior; images in [-1, 1], latents unscaled."""

    def __init__(self, config: PlainConfig | None = None):
        super().__init__()
        self.config = config = config or PlainConfig()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixels: mx.array) -> DiagonalGaussian:
        """(B, H, W, C) in [-1, 1] -> posterior over (B, H/f, W/f, latent)."""
        return DiagonalGaussian.from_moments(self.encoder(pixels))

    def decode(self, latents: mx.array) -> mx.array:
        """(B, h, w, latent) unscaled -> (B, f*h, f*w, C), about [-1, 1], not clipped."""
        return self.decoder(latents)


def _conv3x3(in_channels: int, out_channels: int, *, stride: int = 1) -> Conv2d:
    """3x3 convolution with He initialisation for LeakyReLU (He et al. 2015)."""
    padding = 1 if stride == 1 else ((0, 1), (0, 1))
    conv = Conv2d(in_channels, out_channels, 3, stride=stride, padding=padding)
    std = (2 / ((1 + NEGATIVE_SLOPE**2) * 9 * in_channels)) ** 0.5
    conv.weight = std * mx.random.normal(conv.weight.shape)
    conv.bias = mx.zeros_like(conv.bias)
    return conv
