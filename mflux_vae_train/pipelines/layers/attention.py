"""Attention with rotary positions, and the gate of SwiGLU."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.kernels import attention, silu, widened
from mflux_vae.runtime.device import is_cpu
from mflux_vae_train.pipelines.layers.modulation import NORM_EPS, HeadNorm
from mflux_vae_train.pipelines.layers.rotary import Rotation, rotate


def attend(q: mx.array, k: mx.array, v: mx.array, rope: Rotation, mask: mx.array | None = None) -> mx.array:
    """Rotate queries and keys, and attend: (B, S, heads, head_dim) each -> (B, S, heads * head_dim).

    Args:
        mask: additive, broadcastable to (B, heads, S, S).
    """
    q, k = rotate(q, rope), rotate(k, rope)
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
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(width, width, bias=bias)
        self.to_v = nn.Linear(width, width, bias=bias)
        self.norm_q = HeadNorm(width // heads, eps)
        self.norm_k = HeadNorm(width // heads, eps)

    def __call__(self, x: mx.array, rope: Rotation, mask: mx.array | None = None) -> mx.array:
        q, k, v = (split_heads(layer(x), self._heads) for layer in (self.to_q, self.to_k, self.to_v))
        return attend(self.norm_q(q), self.norm_k(k), v, rope, mask)


class JointAttention(SingleAttention):
    """Attention over text and image tokens together, with separate projections."""

    def __init__(self, width: int, heads: int, *, bias: bool = True) -> None:
        super().__init__(width, heads, bias=bias)
        self.add_q_proj = nn.Linear(width, width, bias=bias)
        self.add_k_proj = nn.Linear(width, width, bias=bias)
        self.add_v_proj = nn.Linear(width, width, bias=bias)
        self.norm_added_q = HeadNorm(width // heads)
        self.norm_added_k = HeadNorm(width // heads)
        self.to_out = [nn.Linear(width, width, bias=bias)]
        self.to_add_out = nn.Linear(width, width, bias=bias)

    def joint(self, image: mx.array, text: mx.array, rope: Rotation) -> tuple[mx.array, mx.array]:
        """Image (B, N, D) and text (B, L, D) -> updates of both."""
        of_image, of_text = (self.to_q, self.to_k, self.to_v), (self.add_q_proj, self.add_k_proj, self.add_v_proj)
        q, k, v = (split_heads(layer(image), self._heads) for layer in of_image)
        tq, tk, tv = (split_heads(layer(text), self._heads) for layer in of_text)
        q = mx.concatenate([self.norm_added_q(tq), self.norm_q(q)], axis=1)
        k = mx.concatenate([self.norm_added_k(tk), self.norm_k(k)], axis=1)
        both = attend(q, k, mx.concatenate([tv, v], axis=1), rope)
        text_length = text.shape[1]
        return self.to_out[0](both[:, text_length:]), self.to_add_out(both[:, :text_length])


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up (Shazeer 2020)."""
    return silu(gate) * up if is_cpu() else _swiglu_gpu(gate, up)


_swiglu_gpu = widened(lambda gate, up: gate * mx.sigmoid(gate) * up, shapeless=True)
