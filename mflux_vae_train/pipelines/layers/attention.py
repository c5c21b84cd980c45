"""Attention with rotary positions."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.kernels import attention, norm_rotary
from mflux_vae.networks.layers import Linear
from mflux_vae_train.pipelines.layers.modulation import NORM_EPS, HeadNorm
from mflux_vae_train.pipelines.layers.rotary import Rotation

Heads = tuple[mx.array, HeadNorm]
"""Queries or keys (B, S, heads, head_dim), and their norm."""


def attend(
    queries: Sequence[Heads], keys: Sequence[Heads], v: mx.array, rope: Rotation, mask: mx.array | None = None
) -> mx.array:
    """Normalize and rotate queries and keys, and attend: values (B, S, heads, head_dim) -> (B, S, heads * head_dim).

    Args:
        queries, keys: parts with different norms, which follow each other.
        mask: additive, broadcastable to (B, heads, S, S).
    """
    q, k = (
        norm_rotary([x for x, _ in parts], [norm.weight for _, norm in parts], rope, parts[0][1].eps)
        for parts in (queries, keys)
    )
    return attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask).flatten(2)


def split_heads(x: mx.array, heads: int) -> mx.array:
    """(B, S, D) -> (B, S, heads, D / heads)."""
    return x.reshape(*x.shape[:-1], heads, -1)


class SingleAttention(nn.Module):
    """Self-attention over all tokens, without output projection: (B, S, D) -> (B, S, D).

    Args:
        eps: of the norms of queries and keys.
    """

    def __init__(self, width: int, heads: int, *, bias: bool = True, eps: float = NORM_EPS) -> None:
        super().__init__()
        self._heads = heads
        self.to_q = Linear(width, width, bias=bias)
        self.to_k = Linear(width, width, bias=bias)
        self.to_v = Linear(width, width, bias=bias)
        self.norm_q = HeadNorm(width // heads, eps)
        self.norm_k = HeadNorm(width // heads, eps)

    def __call__(self, x: mx.array, rope: Rotation, mask: mx.array | None = None) -> mx.array:
        q, k, v = (split_heads(layer(x), self._heads) for layer in (self.to_q, self.to_k, self.to_v))
        return attend([(q, self.norm_q)], [(k, self.norm_k)], v, rope, mask)


class JointAttention(SingleAttention):
    """Attention over text and image tokens together, with separate projections."""

    def __init__(self, width: int, heads: int, *, bias: bool = True) -> None:
        super().__init__(width, heads, bias=bias)
        self.add_q_proj = Linear(width, width, bias=bias)
        self.add_k_proj = Linear(width, width, bias=bias)
        self.add_v_proj = Linear(width, width, bias=bias)
        self.norm_added_q = HeadNorm(width // heads)
        self.norm_added_k = HeadNorm(width // heads)
        self.to_out = [Linear(width, width, bias=bias)]
        self.to_add_out = Linear(width, width, bias=bias)

    def joint(self, image: mx.array, text: mx.array, rope: Rotation) -> tuple[mx.array, mx.array]:
        """Image (B, N, D) and text (B, L, D) -> updates of both."""
        of_image, of_text = (self.to_q, self.to_k, self.to_v), (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (split_heads(layer(image), self._heads) for layer in of_image)
        tq, tk, tv = (split_heads(layer(text), self._heads) for layer in of_text)
        queries, keys = [(tq, self.norm_added_q), (q, self.norm_q)], [(tk, self.norm_added_k), (k, self.norm_k)]
        both = attend(queries, keys, mx.concatenate([tv, v], axis=1), rope)
        to_text, to_image = mx.split(both, [text.shape[1]], axis=1)
        return self.to_out[0](to_image), self.to_add_out(to_text)
