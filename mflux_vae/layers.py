"""The parts of autoencoders: convolution, group norm, residual block, attention, down- and upsampling. NHWC.

Attribute names are those of diffusers, so that parameter paths and checkpoint keys are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.overriding import overridable


class Conv2d(nn.Module):
    """Convolution with bias, in the dtype of its weight, whatever that of its input.

    The weight is (O, kh, kw, C), initialised as torch does (uniform, Kaiming with a = sqrt 5).
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, padding: kernels.Padding = 0
    ):
        super().__init__()
        bound = (in_channels * kernel * kernel) ** -0.5
        self.weight = mx.random.uniform(-bound, bound, (out_channels, kernel, kernel, in_channels))
        self.bias = mx.random.uniform(-bound, bound, (out_channels,))
        self._stride, self._padding = stride, padding

    def __call__(self, x: mx.array) -> mx.array:
        x = x.astype(self.weight.dtype)
        return kernels.conv2d(x, self.weight, self.bias, stride=self._stride, padding=self._padding)


class GroupNorm(nn.Module):
    """Group normalisation with scale and shift per channel."""

    def __init__(self, groups: int, channels: int, eps: float = 1e-6):
        super().__init__()
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))
        self._groups, self._eps = groups, eps

    def __call__(self, x: mx.array) -> mx.array:
        return kernels.group_norm(x, self._groups, self.weight, self.bias, self._eps)


class ResnetBlock(nn.Module):
    """norm, SiLU, conv, twice, beside a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels)
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.conv_shortcut = Conv2d(in_channels, out_channels, 1)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv1(kernels.silu(self.norm1(x)))
        h = self.conv2(kernels.silu(self.norm2(h)))
        return (self.conv_shortcut(x) if "conv_shortcut" in self else x) + h


class Attention(nn.Module):
    """Single-head self-attention over all pixels, beside a skip connection."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = [nn.Linear(channels, channels)]

    @overridable
    def __call__(self, x: mx.array) -> mx.array:
        batch, height, width, channels = x.shape
        h = self.group_norm(x).reshape(batch, 1, height * width, channels)
        h = kernels.attention(self.to_q(h), self.to_k(h), self.to_v(h), scale=channels**-0.5)
        return x + self.to_out[0](h).reshape(x.shape)


class Downsample(nn.Module):
    """Halves height and width; pads at the right and the bottom only, as the published autoencoders do."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(x)


class Upsample(nn.Module):
    """Doubles height and width by repeating pixels, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array) -> mx.array:
        return self.conv(repeat_pixels(x))


@overridable
def repeat_pixels(x: mx.array) -> mx.array:
    """Nearest-neighbour upsampling by two. (B, H, W, C) -> (B, 2H, 2W, C)."""
    batch, height, width, channels = x.shape
    x = mx.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


class Stage(nn.Module):
    """Residual blocks at one resolution, then down- or upsampling where there is one."""

    def __init__(self, resnets: Sequence[ResnetBlock], *, down: Downsample | None = None, up: Upsample | None = None):
        super().__init__()
        self.resnets = list(resnets)
        if down is not None:
            self.downsamplers = [down]
        if up is not None:
            self.upsamplers = [up]

    def __call__(self, x: mx.array) -> mx.array:
        for resnet in self.resnets:
            x = resnet(x)
        for resample in [*self.get("downsamplers", []), *self.get("upsamplers", [])]:
            x = resample(x)
        return x


class MidBlock(nn.Module):
    """Residual block, attention where asked for, residual block, at the lowest resolution."""

    def __init__(self, channels: int, groups: int, *, attention: bool):
        super().__init__()
        self.resnets = [ResnetBlock(channels, channels, groups) for _ in range(2)]
        if attention:
            self.attentions = [Attention(channels, groups)]

    def __call__(self, x: mx.array) -> mx.array:
        x = self.resnets[0](x)
        for attention in self.get("attentions", []):
            x = attention(x)
        return self.resnets[1](x)
