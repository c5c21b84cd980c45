"""Softmax and scaled dot-product attention.

On a CPU, MLX computes the exponentials of softmax one at a time, and attention would hold the scores of all queries
and keys. When evaluated eagerly (see `cpu.parallel`), attention processes a few heads or queries at a time, and
divides the result by the row sums instead of normalizing every score. For Metal and CUDA see `gpu_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx

from mflux_vae.kernels import gpu_attention
from mflux_vae.kernels.cpu.fusion import fused
from mflux_vae.kernels.cpu.parallel import can_fuse, fill_parallel, is_deferred, is_eager, streams
from mflux_vae.runtime import device

CHUNK_SCORES = 1 << 20
"""Scores per chunk on a CPU."""
_MIN_SCORES = 1 << 15
"""With fewer scores, splitting into chunks does not pay off."""
_MAX_SPLITS = 16
"""Parts that a row is split into to find its maximum."""


def softmax(x: mx.array, axis: int = -1) -> mx.array:
    """Softmax along `axis`, computed in float32, returned in the dtype of x."""
    if x.size >= _MIN_SCORES and is_eager(x):
        wide = x.astype(mx.float32)
        exps = exp(wide - mx.max(wide, axis=axis, keepdims=True))
        return (exps / mx.sum(exps, axis=axis, keepdims=True)).astype(x.dtype)
    return mx.softmax(x, axis=axis, precise=True)


@fused
def exp(x: mx.array) -> mx.array:
    """exp(x) for x <= 0, absolute error 1e-7: 3/3 Pade approximant at x / 8, to the eighth power; at least 1e-21."""
    x = mx.where(x < -36.0, -36.0, x)
    square = x * x
    even, odd = 120 + (12 / 64) * square, x * (60 / 8 + square * (1 / 512))
    root = (even + odd) / (even - odd)
    root = root * root
    root = root * root
    return root * root


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None = None) -> mx.array:
    """Scaled dot-product attention, in parts if the scores of all queries would take much memory.

    Args:
        q: (B, heads, N, d); k, v: (B, heads, M, d).
        scale: factor on the scores, usually d ** -0.5.
        mask: additive, broadcastable to (B, heads, N, M), or None.

    Returns:
        (B, heads, N, d).
    """
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if scores >= _MIN_SCORES and is_eager(q, k, v, *([] if mask is None else [mask])):
        dtype = q.dtype
        q, k, v = (a.astype(mx.float32) for a in (q, k, v))
        return _chunked_attention(q, k, v, scale, mask).astype(dtype)
    if device.is_cpu() or is_deferred():
        return _attention(q, k, v, scale, mask)
    return gpu_attention.attention(q, k, v, scale=scale, mask=mask)


def _attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    scores = _scores(q, k, scale, mask)
    if not can_fuse(scores):
        return softmax(scores) @ v
    return _softmax_matmul(scores.astype(mx.float32), v.astype(mx.float32)).astype(v.dtype)


def _scores(q: mx.array, k: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    scores = (q if scale == 1 else q * scale) @ k.swapaxes(-1, -2)
    return scores if mask is None else scores + mask


def _softmax_matmul(scores: mx.array, v: mx.array) -> mx.array:
    """softmax(scores) @ v, float32."""
    exps = exp(scores - _row_max(scores))
    return (exps @ v) / (exps @ mx.ones((v.shape[-2], 1)))


def _row_max(x: mx.array) -> mx.array:
    """Row maximum, (..., M) -> (..., 1). Two steps, because MLX vectorizes all axes but the last."""
    if x.shape[-1] % _MAX_SPLITS == 0:
        x = mx.max(mx.unflatten(x, -1, (_MAX_SPLITS, -1)), axis=-2)
    return mx.max(x, axis=-1, keepdims=True)


def _chunked_attention(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    batch, heads, queries, _ = q.shape
    per_head = queries * k.shape[2]
    chunk_heads = max(1, min(-(-heads * batch // streams()), heads, CHUNK_SCORES // per_head))
    chunk_queries = queries if chunk_heads > 1 else max(1, min(queries, CHUNK_SCORES // k.shape[2]))
    if batch * heads == 1:  # attention in autoencoders
        chunk_queries = min(chunk_queries, -(-queries // streams()))
    if chunk_queries < queries:  # else every chunk would copy the keys and values of its head
        k, v = mx.contiguous(k), mx.contiguous(v)
    mx.eval(q, k, v)

    def chunk(index: tuple[slice, slice, slice]) -> mx.array:
        part = None if mask is None else _mask_part(mask, index)
        return _softmax_matmul(_scores(q[index], k[index[:2]], scale, part), v[index[:2]]).swapaxes(1, 2)

    def chunks() -> Iterator[tuple[Any, Callable[[], mx.array]]]:
        for image in range(batch):
            for head in range(0, heads, chunk_heads):
                for query in range(0, queries, chunk_queries):
                    rows = slice(query, min(query + chunk_queries, queries))
                    sample, head_slice = slice(image, image + 1), slice(head, min(head + chunk_heads, heads))
                    yield (sample, rows, head_slice), partial(chunk, (sample, head_slice, rows))

    return fill_parallel(mx.zeros((batch, queries, heads, v.shape[3])), chunks()).swapaxes(1, 2)


def _mask_part(mask: mx.array, index: tuple[slice, slice, slice]) -> mx.array:
    """Slice a mask by images, heads and queries; its axes of length 1 are broadcast."""
    mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    return mask[tuple(slice(None) if n == 1 else i for n, i in zip(mask.shape, index, strict=False))]
