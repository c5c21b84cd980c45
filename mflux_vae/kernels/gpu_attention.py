"""Attention on Metal and CUDA that never holds the scores of all queries and keys, also while a gradient is traced.

MLX on Metal computes attention in separate steps while a gradient is traced, and keeps a number per score until the
backward pass. Here the backward pass computes the scores again from queries, keys and values, a block of rows at a
time, in float32. The forward pass is MLX's kernel for the head widths that have one, else a block of rows at a time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mflux_vae.kernels.gpu_fusion import after
from mflux_vae.runtime import device

MAX_SCORES = 1 << 23
"""Scores computed at a time."""
METAL_WIDTHS = (64, 72, 80, 96, 128)
"""Head widths for which Metal has an attention kernel for more than `_METAL_FEW_QUERIES` queries."""
_METAL_FEW_QUERIES = 8
_CUDNN_MAX_WIDTH, _CUDNN_MULTIPLE, _AMPERE = 128, 8, 8
_CUDNN_TILE = 128
"""MLX takes cuDNN's backward pass for multiples of this many queries, else it computes all scores at once."""
_HALF = (mx.float16, mx.bfloat16)

_custom_function: Any = mx.custom_function  # MLX's stubs type its result as `object`


def attention(q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | None = None) -> mx.array:
    """`kernels.attention`."""
    kind = device.kind()
    has_kernel = _has_cudnn(q, v) if kind == "cuda" else kind == "mac" and _has_metal(q)
    if has_kernel and kind == "cuda" and q.shape[2] % _CUDNN_TILE == 0:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)  # cuDNN's, which keeps no scores
    forced = _FORCED if kind == "mac" else {}
    rows = _rows(q, k)

    def forward(q: mx.array, k: mx.array, v: mx.array, *masks: mx.array) -> mx.array:
        mask = masks[0] if masks else None
        if has_kernel:
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, **forced)
        outputs: list[mx.array] = []
        for part in rows:
            block = after(outputs[-1:], q[:, :, part])[0]
            rest = None if mask is None else _mask_rows(mask, part)
            outputs.append(mx.fast.scaled_dot_product_attention(block, k, v, scale=scale, mask=rest))
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)

    run = _custom_function(forward)

    @run.vjp
    def backward(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        # wait for the cotangent, or `mx.compile` merges this with the forward pass
        return _gradients(mx.depends(list(primals), [cotangent]), cotangent, scale, rows)

    y: mx.array = run(q, k, v, *([] if mask is None else [mask]))
    return y


def _has_metal(q: mx.array) -> bool:
    """Whether Metal has a kernel."""
    return q.shape[3] in METAL_WIDTHS and q.shape[2] > _METAL_FEW_QUERIES


def _has_cudnn(q: mx.array, v: mx.array) -> bool:
    """Whether MLX gives the forward pass to cuDNN."""
    if q.dtype not in _HALF or q.shape[2] == 1 or os.environ.get("MLX_CUDA_USE_CUDNN_SDPA") == "0":
        return False
    if any(width % _CUDNN_MULTIPLE or width > _CUDNN_MAX_WIDTH for width in (q.shape[3], v.shape[3])):
        return False
    return int(mx.device_info().get("compute_capability_major", _AMPERE)) >= _AMPERE


_FORCED: Any = {"force_fused": True} if "force_fused" in (mx.fast.scaled_dot_product_attention.__doc__ or "") else {}
"""Makes MLX take its kernel while a gradient is traced, too."""


def _rows(q: mx.array, k: mx.array) -> list[slice]:
    """Blocks of queries with at most `MAX_SCORES` scores."""
    batch, heads, queries, _ = q.shape
    count = max(MAX_SCORES // (batch * heads * k.shape[2]), 1)
    return [slice(start, min(start + count, queries)) for start in range(0, queries, count)]


def _mask_rows(mask: mx.array, part: slice) -> mx.array:
    """Rows of a mask, which is broadcast over axes of length 1 and those that it lacks."""
    return mask if mask.ndim < 2 or mask.shape[-2] == 1 else mask[..., part, :]


def _gradients(primals: Sequence[mx.array], cotangent: mx.array, scale: float, rows: Sequence[slice]) -> list[mx.array]:
    """Gradients of queries, keys, values and mask, in their dtypes; sums are float32.

    With P = softmax(S) and dP = dO V^T, the gradient of the scores is dS = P (dP - sum(P dP)), per row.
    """
    q, k, v, *masks = primals
    wide_k, wide_v = k.astype(mx.float32), v.astype(mx.float32)
    of_q: list[mx.array] = []
    of_k: mx.array | None = None
    of_v: mx.array | None = None
    of_mask: list[mx.array] = []
    for part in rows:
        before = [] if of_k is None or of_v is None else [of_q[-1], of_k, of_v]
        block, slope = (a.astype(mx.float32) for a in after(before, q[:, :, part], cotangent[:, :, part]))
        block = block * scale
        scores = block @ wide_k.swapaxes(-1, -2)
        if masks:
            scores = scores + _mask_rows(masks[0], part)
        weights = mx.softmax(scores, axis=-1)
        of_weights = slope @ wide_v.swapaxes(-1, -2)
        of_scores = weights * (of_weights - (weights * of_weights).sum(axis=-1, keepdims=True))
        of_q.append(((of_scores @ wide_k) * scale).astype(q.dtype))
        new_k, new_v = of_scores.swapaxes(-1, -2) @ block, weights.swapaxes(-1, -2) @ slope
        of_k, of_v = (new_k, new_v) if of_k is None or of_v is None else (of_k + new_k, of_v + new_v)
        if masks:
            of_mask.append(_summed_like(of_scores, _mask_rows(masks[0], part)))
    assert of_k is not None and of_v is not None
    gradients = [mx.concatenate(of_q, axis=2), of_k.astype(k.dtype), of_v.astype(v.dtype)]
    if masks:
        has_rows = masks[0].ndim > 1 and masks[0].shape[-2] > 1
        joined = mx.concatenate(of_mask, axis=-2) if has_rows else mx.stack(of_mask).sum(axis=0)
        gradients.append(joined.astype(masks[0].dtype))
    return gradients


def _summed_like(scores: mx.array, mask: mx.array) -> mx.array:
    """Sum over the axes along which a mask is broadcast."""
    shape = (1,) * (scores.ndim - mask.ndim) + tuple(mask.shape)
    axes = [axis for axis, length in enumerate(shape) if length == 1]
    return scores.sum(axis=axes, keepdims=True).reshape(mask.shape) if axes else scores
