"""Softmax and scaled dot-product attention."""

from __future__ import annotations

import mlx.core as mx

from mflux_vae import runtime

_SCORES_AT_ONCE = 1 << 23
_FUSED_MAX_WIDTH = 128
"""MLX's attention on Metal and CUDA makes no scores up to this width of a head."""


def softmax(x: mx.array, axis: int = -1) -> mx.array:
    """Softmax, summed in float32 whatever the dtype."""
    return mx.softmax(x, axis=axis, precise=True)


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None = None) -> mx.array:
    """Scaled dot-product attention, some queries after the other where the scores of all would take much memory.

    Args:
        q: (B, heads, N, d); k, v: (B, heads, M, d).
        scale: factor on the scores, usually d ** -0.5.
        mask: additive, broadcastable to (B, heads, N, M); None for none.

    Returns:
        (B, heads, N, d).
    """
    queries = max(_SCORES_AT_ONCE // (q.shape[0] * q.shape[1] * k.shape[2]), 1)
    materialised = runtime.is_cpu() or q.shape[3] > _FUSED_MAX_WIDTH
    if queries >= q.shape[2] or not materialised:
        return _attention(q, k, v, scale, mask)
    parts = []
    for start in range(0, q.shape[2], queries):
        here = slice(start, start + queries)
        part_of_mask = mask if mask is None or mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., here, :]
        parts.append(_attention(q[:, :, here], k, v, scale, part_of_mask))
        try:
            mx.eval(parts[-1])
        except ValueError:  # inside a trace nothing can be computed yet, and parts would save nothing
            return _attention(q, k, v, scale, mask)
    return mx.concatenate(parts, axis=2)


def _attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    if not runtime.is_cpu():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
    scores = (q * scale) @ k.swapaxes(-1, -2)
    return softmax(scores if mask is None else scores + mask) @ v
