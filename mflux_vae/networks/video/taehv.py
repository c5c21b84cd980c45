"""TAEHV (Bohan 2025) for single images: small autoencoders for the latents of video models, such as TAEW2.1.

Blocks with memory see the activations of the frame before, zero for the first one. As in the published code, an image
is encoded as four equal frames, and is the last of the four frames that are decoded from one latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.errors import SettingsError
from mflux_vae.networks.config import NetworkConfig
from mflux_vae.networks.latent_scaling import ScaledConfig, ScaledLatents
from mflux_vae.networks.layers import Conv2d, layer_input
from mflux_vae.networks.tiny import Relu, UpsampleNearest
from mflux_vae.posterior import DiagonalGaussian

LEVELS, BLOCKS = 3, 3
"""Levels that halve the resolution, and blocks of each."""


@dataclass(frozen=True, kw_only=True)
class TAEHVConfig(NetworkConfig, ScaledConfig):
    """Configuration of `TAEHV`; defaults are those of TAEW2.1.

    Attributes:
        in_channels, out_channels: channels of an image.
        latent_channels: channels of a latent.
        encoder_width: channels of the encoder.
        decoder_widths: channels of the decoder's levels, from the lowest resolution, and after the last upsampling.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    encoder_width: int = 64
    decoder_widths: tuple[int, ...] = (256, 128, 64, 64)

    NAME: ClassVar[str] = "TAEHV"
    downsampling: ClassVar[int] = 2**LEVELS
    scaling_factor: ClassVar[float] = 1.0
    shift_factor: ClassVar[float] = 0.0
    force_upcast: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoder_widths", tuple(self.decoder_widths))
        if len(self.decoder_widths) != LEVELS + 1:
            raise SettingsError(f"TAEHV: expected {LEVELS + 1} decoder_widths, got {len(self.decoder_widths)}")
        for name in ("in_channels", "out_channels", "latent_channels", "encoder_width", "decoder_widths"):
            given = getattr(self, name)
            if min(given if isinstance(given, tuple) else (given,)) < 1:
                raise SettingsError(f"TAEHV: {name} must be positive, not {given}")


class MemoryBlock(nn.Module):
    """Three convolutions of a frame and the one before, with a skip connection."""

    def __init__(self, channels: int):
        super().__init__()
        first = Conv2d(2 * channels, channels, 3, padding=1)
        others = [Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
        self.conv = [first, Relu(), others[0], Relu(), others[1]]

    def __call__(self, x: mx.array, past: mx.array | None = None) -> mx.array:
        first = self.conv[0]
        h = kernels.partial_conv2d(layer_input(x, first), first.weight, first.bias, padding=1)
        if past is not None:
            h = h + kernels.partial_conv2d(layer_input(past, first), first.weight, start=past.shape[-1], padding=1)
        for layer in self.conv[1:]:
            h = layer(h)
        return kernels.relu(h + x)


class TimePool(nn.Module):
    """Mix some frames into one."""

    def __init__(self, channels: int, frames: int):
        super().__init__()
        self.conv = Conv2d(frames * channels, channels, 1, bias=False)

    def __call__(self, *frames: mx.array) -> mx.array:
        parts = [
            kernels.partial_conv2d(layer_input(x, self.conv), self.conv.weight, start=index * x.shape[-1])
            for index, x in enumerate(frames)
        ]
        return sum(parts[1:], parts[0])


class TimeGrow(nn.Module):
    """Map a frame to several."""

    def __init__(self, channels: int, frames: int):
        super().__init__()
        self.conv = Conv2d(channels, frames * channels, 1, bias=False)

    def __call__(self, x: mx.array, frame: int) -> mx.array:
        """One of the frames."""
        channels = x.shape[-1]
        return self.conv(x)[..., frame * channels : (frame + 1) * channels]


class Clamp(nn.Module):
    """A module, so that layer numbers match those in files."""

    def __call__(self, x: mx.array) -> mx.array:
        return kernels.tanh(x / 3) * 3


def _conv3x3(in_channels: int, out_channels: int, *, stride: int = 1, bias: bool = False) -> Conv2d:
    return Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=bias)


def _encoder(config: TAEHVConfig) -> list[nn.Module]:
    width = config.encoder_width
    layers: list[nn.Module] = [_conv3x3(config.in_channels, width, bias=True), Relu()]
    for frames in (2, 2, 1):
        layers += [TimePool(width, frames), _conv3x3(width, width, stride=2)]
        layers += [MemoryBlock(width) for _ in range(BLOCKS)]
    return [*layers, _conv3x3(width, config.latent_channels, bias=True)]


def _decoder(config: TAEHVConfig) -> list[nn.Module]:
    widths = config.decoder_widths
    layers: list[nn.Module] = [Clamp(), _conv3x3(config.latent_channels, widths[0], bias=True), Relu()]
    for level, frames in enumerate((1, 2, 2)):
        layers += [MemoryBlock(widths[level]) for _ in range(BLOCKS)]
        layers += [UpsampleNearest(), TimeGrow(widths[level], frames), _conv3x3(widths[level], widths[level + 1])]
    return [*layers, Relu(), _conv3x3(widths[-1], config.out_channels, bias=True)]


def _split(layers: Sequence[nn.Module], *counts: int) -> list[list[Any]]:
    """Groups of so many layers."""
    rest = iter(layers)
    return [list(islice(rest, count)) for count in counts]


def _with_memory(blocks: list[nn.Module], frames: list[mx.array]) -> list[mx.array]:
    """Apply blocks to each frame and the one before it."""
    for block in blocks:
        frames = [block(x, past) for x, past in zip(frames, [None, *frames[:-1]], strict=True)]
    return frames


def _upsampled(x: mx.array, grow: nn.Module, conv: nn.Module, *, frame: int) -> mx.array:
    """One of the frames after upsampling, mixing channels (in this order in files) and a convolution."""
    return kernels.repeat_conv2d(layer_input(grow(x, frame), conv), conv.weight, padding=1)


class TAEHV(ScaledLatents):
    """Convolutions and ReLU, no variances; images in [-1, 1], latents as a denoiser sees them."""

    config: TAEHVConfig

    def __init__(self, config: TAEHVConfig | None = None):
        super().__init__()
        self.config = config or TAEHVConfig()
        self.encoder = _encoder(self.config)
        self.decoder = _decoder(self.config)

    def encode(self, pixels: mx.array) -> DiagonalGaussian:
        """(B, H, W, C) in [-1, 1] -> (B, H/8, W/8, latent), a point posterior."""
        (conv, relu), *levels, (out,) = _split(self.encoder, 2, *[2, BLOCKS] * LEVELS, 1)
        (pool_1, down_1), blocks_1, (pool_2, down_2), blocks_2, (pool_3, down_3), blocks_3 = levels
        x = relu(conv(pixels * 0.5 + 0.5))  # in all four frames
        x = down_1(pool_1(x, x))  # in both
        x = down_2(pool_2(*_with_memory(blocks_1, [x, x])))
        (x,) = _with_memory(blocks_2, [x])
        (x,) = _with_memory(blocks_3, [down_3(pool_3(x))])
        return DiagonalGaussian.point(out(x))

    def decode(self, latents: mx.array) -> mx.array:
        """(B, h, w, latent) -> (B, 8*h, 8*w, C), about [-1, 1], not clipped."""
        (clamp, conv, relu), *levels, (last_relu, out) = _split(self.decoder, 3, *[BLOCKS, 3] * LEVELS, 2)
        blocks_1, (_, *grow_1), blocks_2, (_, *grow_2), (*blocks_3, last), (_, *grow_3) = levels
        (x,) = _with_memory(blocks_1, [relu(conv(clamp(latents)))])
        (x,) = _with_memory(blocks_2, [_upsampled(x, *grow_1, frame=0)])
        past, x = _with_memory(blocks_3, [_upsampled(x, *grow_2, frame=frame) for frame in (0, 1)])
        x = _upsampled(last(x, past), *grow_3, frame=1)  # the first frame is not needed
        return out(last_relu(x)) * 2 - 1
