"""Transformer over patches of frames, used by LAPA's quantizer. Tokens are (N, L, dim).

Follows the public implementations of phenaki (Villegas et al. 2022, arXiv 2210.02399), with which the weights were
trained. Comments mark unusual details.
"""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mflux_vae import kernels
from mflux_vae.networks.layers import Linear

SCORE_SCALE = 8.0
"""Scale of attention scores; queries and keys are normalised."""

_NUM_NULL_KV = 2
"""Learned additional keys and values of cross-attention."""

_KERNEL = 3
"""Kernel size of the position convolution, over frames (causal), rows and columns."""

_EPS = 1e-5
_SLOPE = 0.1


class GainNorm(nn.Module):
    """Layer normalisation without shift."""

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = mx.ones((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        return kernels.layer_norm(x, self.gamma, None, _EPS)


class PositionBias(nn.Module):
    """Relative position bias of attention scores (Liu et al. 2021, arXiv 2111.09883)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.layers = [Linear(2, dim), Linear(dim, dim)]
        self.out = Linear(dim, heads)

    def __call__(self, height: int, width: int) -> mx.array:
        """(heads, height * width queries, height * width keys)."""
        steps = np.meshgrid(np.arange(1 - height, height), np.arange(1 - width, width), indexing="ij")
        offsets = np.stack(steps, axis=-1).reshape(-1, 2)
        x = mx.array((np.sign(offsets) * np.log1p(np.abs(offsets))).astype(np.float32)).astype(self.out.weight.dtype)
        for layer in self.layers:
            x = nn.leaky_relu(layer(x), _SLOPE)
        rows, columns = np.divmod(np.arange(height * width), width)
        down, right = (at[:, None] - at for at in (rows, columns))
        which = (down + height - 1) * (2 * width - 1) + right + width - 1
        return self.out(x)[mx.array(which)].transpose(2, 0, 1)


class PositionConvolution(nn.Module):
    """Depthwise 3-D convolution of (B, T, H, W, dim), causal over frames, zero-padded."""

    def __init__(self, dim: int):
        super().__init__()
        bound = _KERNEL**-1.5
        self.weight = mx.random.uniform(-bound, bound, (_KERNEL, _KERNEL, _KERNEL, dim))
        self.bias = mx.random.uniform(-bound, bound, (dim,))

    def __call__(self, x: mx.array) -> mx.array:
        frames, height, width = x.shape[1:4]
        edge = _KERNEL // 2
        padded = mx.pad(x, [(0, 0), (_KERNEL - 1, 0), (edge, edge), (edge, edge), (0, 0)])
        total = mx.broadcast_to(self.bias, x.shape)
        # skip taps that only see padding
        for t, i, j in product(range(max(_KERNEL - frames, 0), _KERNEL), range(_KERNEL), range(_KERNEL)):
            total = total + padded[:, t : t + frames, i : i + height, j : j + width] * self.weight[t, i, j]
        return total


class Attention(nn.Module):
    """Multi-head self- or cross-attention with normalised queries and keys."""

    def __init__(self, dim: int, heads: int, dim_head: int, *, cross: bool = False):
        super().__init__()
        inner = heads * dim_head
        self.norm = GainNorm(dim)
        self.context_norm = GainNorm(dim)  # in all published weights; unused without `cross`
        self.to_q = Linear(dim, inner, bias=False)
        self.to_kv = Linear(dim, 2 * inner, bias=False)
        self.to_out = Linear(inner, dim, bias=False)
        self.q_scale = mx.ones((dim_head,))
        self.k_scale = mx.ones((dim_head,))
        if cross:
            self.null_kv = mx.random.normal((heads, 2 * _NUM_NULL_KV, dim_head))
        self._heads = heads

    def __call__(self, x: mx.array, context: mx.array | None = None, *, bias: mx.array | None = None) -> mx.array:
        """Tokens (N, L, dim) -> (N, L, dim); `context` (N, M, dim); `bias` (heads, L, L) added to the scores."""
        # in self-attention, keys and values are computed before the norm
        source = x if context is None else self.context_norm(context)
        k, v = (self._by_head(part) for part in mx.split(self.to_kv(source), 2, axis=-1))
        q = self._by_head(self.to_q(self.norm(x)))
        if "null_kv" in self:
            k, v = (mx.concatenate([self._nulls(first, k), part], axis=1) for first, part in ((0, k), (1, v)))
        q, k = _unit(q) * self.q_scale, _unit(k) * self.k_scale
        h = kernels.attention(q, k, v, scale=SCORE_SCALE, mask=bias)
        return self.to_out(h.flatten(2))

    def _by_head(self, x: mx.array) -> mx.array:
        """(N, L, heads * d) -> (N, L, heads, d)."""
        return x.reshape(*x.shape[:2], self._heads, -1)

    def _nulls(self, first: int, like: mx.array) -> mx.array:
        """Learned keys (0) or values (1), stored interleaved: (N, nulls, heads, d)."""
        learned = self.null_kv[:, first::2].swapaxes(0, 1)
        return mx.broadcast_to(learned, (like.shape[0], *learned.shape))


class FeedForward(nn.Module):
    """Norm and GEGLU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, dim: int):
        super().__init__()
        inner = int(4 * (2 / 3) * dim)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.up = Linear(dim, 2 * inner, bias=False)
        self.down = Linear(inner, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        h, gate = mx.split(self.up(self.norm(x)), 2, axis=-1)
        return self.down(kernels.gelu(gate) * h)


class Block(nn.Module):
    """Position convolution, self-attention, optional cross-attention and feed-forward, each with a skip connection."""

    def __init__(self, dim: int, heads: int, dim_head: int, *, cross: bool):
        super().__init__()
        self.position = PositionConvolution(dim)
        self.attention = Attention(dim, heads, dim_head)
        if cross:
            self.cross = Attention(dim, heads, dim_head, cross=True)
        self.feed_forward = FeedForward(dim)

    def __call__(
        self, x: mx.array, video: tuple[int, ...], bias: mx.array | None, context: mx.array | None
    ) -> mx.array:
        x = x + self.position(x.reshape(*video, -1)).reshape(x.shape)
        x = x + self.attention(x, bias=bias)
        if "cross" in self:
            x = x + self.cross(x, context)
        return x + self.feed_forward(x)


class Transformer(nn.Module):
    """Blocks and a final norm."""

    def __init__(self, depth: int, dim: int, heads: int, dim_head: int, *, cross: bool = False):
        super().__init__()
        self.blocks = [Block(dim, heads, dim_head, cross=cross) for _ in range(depth)]
        self.norm_out = GainNorm(dim)

    def __call__(
        self,
        x: mx.array,
        video: tuple[int, ...],
        *,
        bias: mx.array | None = None,
        context: mx.array | None = None,
    ) -> mx.array:
        """Tokens (N, L, dim) -> (N, L, dim).

        Args:
            video: shape (B, T, H, W) of the tokens for the position convolution.
            bias: added to the scores, (heads, L, L).
            context: (N, M, dim) for cross-attention.
        """
        for block in self.blocks:
            x = block(x, video, bias, context)
        return self.norm_out(x)


def _unit(x: mx.array) -> mx.array:
    """Normalise the last axis to length 1; zeros stay zeros."""
    return x / mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
