"""Stable Diffusion's autoencoder in plain `mlx.nn`, with diffusers' names.

This module imports nothing of the project while it runs, so neither its BLAS nor its buffer cache is active.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

CHANNELS = (128, 256, 512, 512)
LATENT = 4


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2 if stride == 1 else 0)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6, pytorch_compatible=True)


class Resnet(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inputs), conv(inputs, outputs)
        self.norm2, self.conv2 = norm(outputs), conv(outputs, outputs)
        if inputs != outputs:
            self.conv_shortcut = conv(inputs, outputs, 1)

    def __call__(self, x: mx.array) -> mx.array:
        h = self.conv2(nn.silu(self.norm2(self.conv1(nn.silu(self.norm1(x))))))
        return (self.conv_shortcut(x) if "conv_shortcut" in self else x) + h


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.group_norm = norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = [nn.Linear(channels, channels)]

    def __call__(self, x: mx.array) -> mx.array:
        h = self.group_norm(x).reshape(x.shape[0], 1, -1, x.shape[-1])
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        h = mx.fast.scaled_dot_product_attention(q, k, v, scale=x.shape[-1] ** -0.5)
        return x + self.to_out[0](h).reshape(x.shape)


class Resample(nn.Module):
    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.conv = conv(channels, channels, stride=stride)
        self._up = stride == 1

    def __call__(self, x: mx.array) -> mx.array:
        if self._up:
            return self.conv(mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2))
        return self.conv(mx.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)]))


class Stage(nn.Module):
    def __init__(self, widths: list[int], resample: tuple[str, int] | None) -> None:
        super().__init__()
        self.resnets = [Resnet(a, b) for a, b in pairwise(widths)]
        if resample is not None:
            name, stride = resample
            self[name] = [Resample(widths[-1], stride)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in [*self.resnets, *self.get("downsamplers", []), *self.get("upsamplers", [])]:
            x = layer(x)
        return x


class Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.resnets = [Resnet(channels, channels) for _ in range(2)]
        self.attentions = [Attention(channels)]

    def __call__(self, x: mx.array) -> mx.array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_in = conv(3, CHANNELS[0])
        before = (CHANNELS[0], *CHANNELS)
        self.down_blocks = [
            Stage([before[i], width, width], ("downsamplers", 2) if i < len(CHANNELS) - 1 else None)
            for i, width in enumerate(CHANNELS)
        ]
        self.mid_block = Middle(CHANNELS[-1])
        self.conv_norm_out, self.conv_out = norm(CHANNELS[-1]), conv(CHANNELS[-1], 2 * LATENT)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for block in [*self.down_blocks, self.mid_block]:
            x = block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        channels = CHANNELS[::-1]
        before = (channels[0], *channels)
        self.conv_in, self.mid_block = conv(LATENT, channels[0]), Middle(channels[0])
        self.up_blocks = [
            Stage([before[i], width, width, width], ("upsamplers", 1) if i < len(channels) - 1 else None)
            for i, width in enumerate(channels)
        ]
        self.conv_norm_out, self.conv_out = norm(channels[-1]), conv(channels[-1], 3)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv_in(x)
        for block in [self.mid_block, *self.up_blocks]:
            x = block(x)
        return self.conv_out(nn.silu(self.conv_norm_out(x)))


class Autoencoder(nn.Module):
    """(B, H, W, 3) <-> moments and latents, unscaled."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder()
        self.quant_conv, self.post_quant_conv = conv(2 * LATENT, 2 * LATENT, 1), conv(LATENT, LATENT, 1)

    def mean(self, pixels: mx.array) -> mx.array:
        return self.quant_conv(self.encoder(pixels))[..., :LATENT]

    def decode(self, latents: mx.array) -> mx.array:
        return self.decoder(self.post_quant_conv(latents))


def build(what: str, size: int) -> Any:
    """Encode or decode at `size` pixels."""
    from benchmarks.harness.backends import mlx_work
    from benchmarks.harness.weights import fill_mlx
    from benchmarks.vae_speed import inputs

    network = Autoencoder()
    fill_mlx(network)
    given = mx.array(inputs(what, size))
    apply = network.mean if what == "encode" else network.decode
    return mlx_work(lambda: {"output": apply(given)})
