"""Softmax and scaled dot-product attention: the native extension on a CPU, `gpu_attention` on Metal and CUDA."""

from __future__ import annotations

import mlx.core as mx

from mflux_vae.kernels import gpu_attention
from mflux_vae.kernels.cpu.extension import native
from mflux_vae.runtime import device


def softmax(x: mx.array) -> mx.array:
    """Softmax along the last axis, computed in float32, returned in the dtype of x."""
    if (cpu := native()) is None:
        return mx.softmax(x, axis=-1, precise=True)
    y: mx.array = cpu.softmax(x).astype(x.dtype)
    return y


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None = None) -> mx.array:
    """Scaled dot-product attention. The extension and `gpu_attention` never hold the scores of all queries and keys.

    Args:
        q: (B, N, heads, d); k, v: (B, M, heads, d), or fewer heads, each of which is for several of q.
        scale: factor on the scores, usually d ** -0.5.
        mask: additive, broadcastable to (B, heads, N, M), or None.

    Returns:
        (B, N, heads, d).
    """
    if (cpu := native()) is not None:
        y: mx.array = cpu.attention(q, k, v, scale, mask).astype(q.dtype)
        return y
    if (shared := q.shape[2] // k.shape[2]) > 1:
        k, v = (mx.repeat(array, shared, axis=2) for array in (k, v))
    q, k, v = (array.swapaxes(1, 2) for array in (q, k, v))
    attend = _attention if device.is_cpu() else gpu_attention.attention
    return attend(q, k, v, scale=scale, mask=mask).swapaxes(1, 2)


def _attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None) -> mx.array:
    """Attention of (B, heads, N, d) in plain operations, in float32."""
    wide_q, wide_k, wide_v = (array.astype(mx.float32) for array in (q, k, v))
    scores = (wide_q * scale) @ wide_k.swapaxes(-1, -2)
    return (softmax(scores if mask is None else scores + mask) @ wide_v).astype(v.dtype)
