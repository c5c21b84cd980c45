"""Softmax and scaled dot-product attention.

MLX's CPU computes softmax's exponentials one at a time, and attention would hold the scores of all queries with all
keys. Where results are computed at once (see `bands`), attention takes a few heads or queries after the other, and
divides its result by the sums instead of all the scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import mlx.core as mx

from mflux_vae import runtime
from mflux_vae.kernels.bands import aside, computes_aside, computes_now, filled
from mflux_vae.kernels.fusion import fused

_custom_function: Any = mx.custom_function  # MLX's stubs say that calling one gives an `object`

_BAND_SCORES = 1 << 20
_SMALLEST = 1 << 15
"""Fewer scores are not worth a band."""
SCORES_AT_ONCE = 1 << 23
_FUSED_MAX_WIDTH = 128
"""MLX's attention on Metal and CUDA makes no scores up to this width of a head."""


def softmax(x: mx.array, axis: int = -1) -> mx.array:
    """Softmax, summed in float32 whatever the dtype."""
    if x.size >= _SMALLEST and computes_now(x):
        wide = x.astype(mx.float32)
        powers = exp(wide - mx.max(wide, axis=axis, keepdims=True))
        return (powers / mx.sum(powers, axis=axis, keepdims=True)).astype(x.dtype)
    return mx.softmax(x, axis=axis, precise=True)


@fused
def exp(x: mx.array) -> mx.array:
    """exp(x) for x <= 0, to 1e-7 of 1: Pade's 3/3 approximation at x / 8, to the eighth power; no less than 1e-21."""
    x = mx.where(x < -36.0, -36.0, x)
    square = x * x
    even, odd = 120 + (12 / 64) * square, x * (60 / 8 + square * (1 / 512))
    root = (even + odd) / (even - odd)
    root = root * root
    root = root * root
    return root * root


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None = None) -> mx.array:
    """Scaled dot-product attention, some queries after the other where the scores of all would take much memory.

    Args:
        q: (B, heads, N, d); k, v: (B, heads, M, d).
        scale: factor on the scores, usually d ** -0.5.
        mask: additive, broadcastable to (B, heads, N, M); None for none.

    Returns:
        (B, heads, N, d).
    """
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if scores >= _SMALLEST and computes_now(q, k, v, *([] if mask is None else [mask])):
        dtype = q.dtype
        q, k, v = (mx.contiguous(a.astype(mx.float32)) for a in (q, k, v))
        return _in_bands(q, k, v, scale, mask).astype(dtype)
    if scores >= _SMALLEST and computes_aside() and mask is None and q.shape == k.shape == v.shape:
        return _self_attention(scale)(q, k, v)
    queries = max(SCORES_AT_ONCE // (scores // q.shape[2]), 1)
    if runtime.is_cpu() or queries >= q.shape[2] or q.shape[3] <= _FUSED_MAX_WIDTH:
        return _attention(q, k, v, scale, mask)
    parts = []
    for start in range(0, q.shape[2], queries):
        here = slice(start, start + queries)
        part = None if mask is None else _part(mask, (slice(None), slice(None), here))
        parts.append(_attention(q[:, :, here], k, v, scale, part))
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


def _in_bands(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array | None) -> mx.array:
    batch, heads, queries, _ = q.shape
    per_head = queries * k.shape[2]
    # no fewer bands than cores
    heads_at_once = max(1, min(-(-heads // runtime.cores()), _BAND_SCORES // per_head))
    at_once = queries if heads_at_once > 1 else max(1, min(queries, _BAND_SCORES // k.shape[2]))

    def band(index: tuple[slice, slice, slice]) -> mx.array:
        keys, values = k[index[:2]], v[index[:2]]
        scores = (q[index] * scale) @ keys.swapaxes(-1, -2)
        if mask is not None:
            scores = scores + _part(mask, index)
        powers = exp(scores - mx.max(scores, axis=-1, keepdims=True))
        sums = powers @ mx.ones((k.shape[2], 1))
        return (powers @ values) / sums

    def bands() -> Iterator[tuple[Any, Callable[[], mx.array]]]:
        for image in range(batch):
            for head in range(0, heads, heads_at_once):
                for query in range(0, queries, at_once):
                    rows = slice(query, min(query + at_once, queries))
                    index = slice(image, image + 1), slice(head, min(head + heads_at_once, heads)), rows
                    yield index, partial(band, index)

    y = mx.zeros((batch, heads, queries, v.shape[3]))
    mx.eval(y)
    return filled(y, bands())


@cache
def _self_attention(scale: float) -> Callable[..., mx.array]:
    """Attention of q, k and v of one shape whose gradient computes the scores again, and so keeps none of them."""

    def value(*qkv: mx.array) -> mx.array:
        q, k, v = (mx.contiguous(a.astype(mx.float32)) for a in qkv)
        return _in_bands(q, k, v, scale, None).astype(qkv[0].dtype)

    def slopes(*arrays: mx.array) -> tuple[mx.array, ...]:
        y = _slopes_in_bands(*(mx.contiguous(a.astype(mx.float32)) for a in arrays), scale)
        return tuple(y[i].astype(arrays[0].dtype) for i in range(3))

    @_custom_function
    def function(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return aside(value, q, k, v)

    @function.vjp
    def function_vjp(qkv: tuple[mx.array, ...], cotangent: mx.array, y: mx.array) -> tuple[mx.array, ...]:
        return aside(slopes, *qkv, cotangent, y)

    return function


def _slopes_in_bands(
    q: mx.array, k: mx.array, v: mx.array, cotangent: mx.array, y: mx.array, scale: float
) -> mx.array:
    """Gradients of attention with respect to q, k and v, a few heads after the other. (B, heads, N, d) each.

    With scores s = scale q k', weights p = exp(s) / sums and the cotangent c (Dao et al. 2022, appendix B.2):
    dv = p' c, ds = p (c v' - (c . y)), dq = scale ds k, dk = scale ds' q. The sums divide c, not all of p.
    """
    batch, heads, queries, width = q.shape
    at_once = max(1, min(-(-heads // runtime.cores()), _BAND_SCORES // queries**2))

    def band(index: tuple[int, slice]) -> mx.array:
        q_, k_, v_, c, y_ = (a[index] for a in (q, k, v, cotangent, y))
        q_ = q_ * scale
        scores = q_ @ k_.swapaxes(-1, -2)
        powers = exp(scores - mx.max(scores, axis=-1, keepdims=True))
        c = c / (powers @ mx.ones((queries, 1)))
        slopes = _weighted(powers, c @ v_.swapaxes(-1, -2), (c * y_) @ mx.ones((width, 1)))
        return mx.stack([slopes @ k_ * scale, slopes.swapaxes(-1, -2) @ q_, powers.swapaxes(-1, -2) @ c])

    def bands() -> Iterator[tuple[Any, Callable[[], mx.array]]]:
        for image in range(batch):
            for head in range(0, heads, at_once):
                index = image, slice(head, min(head + at_once, heads))
                yield (slice(None), *index), partial(band, index)

    out = mx.zeros((3, *q.shape))
    mx.eval(out)
    return filled(out, bands())


@fused
def _weighted(weight: mx.array, value: mx.array, mean: mx.array) -> mx.array:
    return weight * (value - mean)


def _part(mask: mx.array, index: tuple[slice, slice, slice]) -> mx.array:
    """What a mask says of some images, heads and queries; its axes of length 1 are for all."""
    mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    return mask[tuple(slice(None) if n == 1 else i for n, i in zip(mask.shape, index, strict=False))]
