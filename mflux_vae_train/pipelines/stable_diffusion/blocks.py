"""Blocks of Stable Diffusion's UNet (Rombach et al. 2022), NHWC: resnets with time, resampling, transformers with text.

Attribute names are those of diffusers, so parameter paths equal checkpoint keys. Shapes: B batch, h and w the sides at
the resolution of a block, C its channels, T width of the time embedding, L text tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.networks import layers
from mflux_vae.networks.layers import Conv2d, GroupNorm, Linear

Run: TypeAlias = Callable[..., mx.array]
"""Calls a block with arrays: directly, or with gradient checkpointing."""

FF_RATIO = 4
TRANSFORMER_NORM_EPS = 1e-6


def norm_silu_conv(norm: GroupNorm, conv: nn.Module, x: mx.array, residual: mx.array | None = None) -> mx.array:
    """conv(silu(norm(x))) + residual; in one step if `conv` has no adapter."""
    if isinstance(conv, Conv2d):
        return layers.norm_silu_conv(norm, conv, x, residual)
    y: mx.array = conv(kernels.group_norm_silu(x, norm._groups, norm.weight, norm.bias, norm._eps))
    return y if residual is None else residual + y


class ResnetBlock(nn.Module):
    """Residual block that adds the activated time embedding (B, T) between its convolutions."""

    def __init__(self, inputs: int, outputs: int, time_width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, inputs, eps)
        self.conv1 = Conv2d(inputs, outputs, 3, padding=1)
        self.time_emb_proj = Linear(time_width, outputs)
        self.norm2 = GroupNorm(groups, outputs, eps)
        self.conv2 = Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.conv_shortcut = Conv2d(inputs, outputs, 1)

    def __call__(self, x: mx.array, time: mx.array, *skip: mx.array) -> mx.array:
        """(B, h, w, C) -> (B, h, w, outputs); the channels of `skip` follow those of x."""
        if skip:
            # here, so that gradient checkpointing keeps no second copy of them
            x = mx.concatenate([x, *skip], axis=-1)
        h = norm_silu_conv(self.norm1, self.conv1, x)
        h = h + self.time_emb_proj(time)[:, None, None]
        x = self.conv_shortcut(x) if "conv_shortcut" in self else x
        return norm_silu_conv(self.norm2, self.conv2, h, x)


class Upsample(layers.Upsample):
    """Nearest neighbour, to twice the sides or one less, followed by a convolution."""

    def __call__(self, x: mx.array, size: tuple[int, int] | None = None) -> mx.array:
        height, width = size or (2 * x.shape[1], 2 * x.shape[2])
        if isinstance(self.conv, Conv2d) and (height, width) == (2 * x.shape[1], 2 * x.shape[2]):
            return super().__call__(x)
        y: mx.array = self.conv(kernels.upsample_nearest_2x(x)[:, :height, :width])
        return y


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` through this project's kernel."""

    def __call__(self, x: mx.array) -> mx.array:
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


class CrossAttention(nn.Module):
    """Multi-head attention from (B, N, C) to itself or to text (B, L, D)."""

    def __init__(self, width: int, context: int, heads: int, upcast: bool) -> None:
        super().__init__()
        self._heads, self._upcast = heads, upcast
        self.to_q = Linear(width, width, bias=False)
        self.to_k = Linear(context, width, bias=False)
        self.to_v = Linear(context, width, bias=False)
        self.to_out = [Linear(width, width)]

    def __call__(self, x: mx.array, context: mx.array) -> mx.array:
        q, k, v = (
            y.reshape(*y.shape[:2], self._heads, -1) for y in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        if self._upcast:
            q, k, v = (y.astype(mx.float32) for y in (q, k, v))
        y = kernels.attention(q, k, v, scale=q.shape[-1] ** -0.5).astype(x.dtype)
        return self.to_out[0](y.flatten(2))


class GEGLU(nn.Module):
    """Gated linear unit with exact GELU (Shazeer 2020)."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.proj = Linear(width, 2 * outputs)

    def __call__(self, x: mx.array) -> mx.array:
        return kernels.glu(self.proj(x), activation="gelu", gate_first=False)


class FeedForward(nn.Module):
    """C -> 4 C -> C; the second entry of `net` stands for diffusers' dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = [GEGLU(width, FF_RATIO * width), nn.Identity(), Linear(FF_RATIO * width, width)]

    def __call__(self, x: mx.array) -> mx.array:
        for layer in self.net:
            x = layer(x)
        return x


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text and feed-forward, each after a layer norm: (B, N, C) -> (B, N, C)."""

    def __init__(self, width: int, context: int, heads: int, upcast: bool) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn1 = CrossAttention(width, width, heads, upcast)
        self.norm2 = LayerNorm(width)
        self.attn2 = CrossAttention(width, context, heads, upcast)
        self.norm3 = LayerNorm(width)
        self.ff = FeedForward(width)

    def __call__(self, x: mx.array, text: mx.array) -> mx.array:
        h = self.norm1(x)
        x = x + self.attn1(h, h)
        x = x + self.attn2(self.norm2(x), text)
        return x + self.ff(self.norm3(x))


class Transformer2D(nn.Module):
    """Transformer over all pixels, with a skip connection around it: (B, h, w, C) -> (B, h, w, C).

    Args:
        linear: whether the projections are linear layers, as in Stable Diffusion 2 and XL, or 1x1 convolutions.
    """

    def __init__(
        self, channels: int, context: int, *, heads: int, depth: int, groups: int, linear: bool, upcast: bool
    ) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, TRANSFORMER_NORM_EPS)
        self.proj_in: Any = Linear(channels, channels) if linear else Conv2d(channels, channels, 1)
        self.transformer_blocks = [TransformerBlock(channels, context, heads, upcast) for _ in range(depth)]
        self.proj_out: Any = Linear(channels, channels) if linear else Conv2d(channels, channels, 1)

    def __call__(self, x: mx.array, text: mx.array, run: Run) -> mx.array:
        h = self.proj_in(self.norm(x)).flatten(1, 2)
        for block in self.transformer_blocks:
            h = run(block, h, text)
        return x + self.proj_out(h.reshape(x.shape))
