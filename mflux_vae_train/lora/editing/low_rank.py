"""The nearest matrix of a lower rank, as two balanced factors. Computed by numpy on the CPU, alike on all devices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from mflux_vae_train.lora.layers import LayerChange

_WHOLE = 256
"""Matrices with a side up to this are decomposed as a whole; larger ones by subspace iteration."""

_OVERSAMPLING, _ITERATIONS, _GAIN = 16, 12, 1e-6
"""Columns beyond the rank, most iterations, and the gain of captured energy that ends them."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A change of lower rank.

    Attributes:
        change: its factors have equal norms, and its scale is 1.
        kept, total: squared Frobenius norms of the new and the given change.
    """

    change: LayerChange
    kept: float
    total: float


def energy(change: LayerChange) -> float:
    """Squared Frobenius norm of scale B A, from products of the size of the rank."""
    a, b = as_numpy(change.a), as_numpy(change.b)
    return float(change.scale**2 * np.sum((b.T @ b) * (a @ a.T)))


def cut(change: LayerChange, *, rank: int | None = None, keep: float | None = None) -> Cut:
    """The nearest change of lower rank.

    Args:
        rank: at most; None for any.
        keep: share of the squared norm to keep with as few ranks as possible; None for all.
    """
    (left, upper), (right, lower) = (np.linalg.qr(factor) for factor in (as_numpy(change.b), as_numpy(change.a).T))
    u, sizes, v = np.linalg.svd(change.scale * upper @ lower.T, full_matrices=False)
    count = min(rank or len(sizes), len(sizes))
    total = float(np.sum(sizes**2))
    if keep is not None:
        enough = np.cumsum(sizes**2) >= keep * total * (1 - 1e-12)
        count = min(count, int(np.argmax(enough)) + 1)
    a, b = _balanced(left @ u, sizes, v @ right.T, count)
    kept = float(np.sum(sizes[:count] ** 2))
    return Cut(change=replace(change, a=a, b=b, scale=1.0), kept=kept, total=total)


def decompose(matrix: np.ndarray, rank: int, kernel: tuple[int, int] | None = None) -> Cut:
    """The nearest change of a rank to a matrix (out, in), float32.

    Large matrices are decomposed by subspace iteration (arXiv:0909.4061, algorithm 4.4) until more iterations gain
    nothing; matrices of at most that rank exactly, up to rounding.
    """
    total = float(np.sum(np.einsum("ij,ij->i", matrix, matrix, dtype=np.float64)))
    count = min(rank, *matrix.shape)
    width = count + max(_OVERSAMPLING, count // 2)
    if min(matrix.shape) <= max(_WHOLE, 2 * width):
        u, sizes, v = np.linalg.svd(matrix, full_matrices=False)
    else:
        u, sizes, v = _subspace(matrix, count, width, total)
    kept = min(float(np.sum(np.square(sizes[:count], dtype=np.float64))), total)
    a, b = _balanced(u, sizes, v, count)
    return Cut(change=LayerChange(a=a, b=b, scale=1.0, kernel=kernel), kept=kept, total=total)


def _subspace(matrix: np.ndarray, count: int, width: int, total: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Singular vectors and values of the largest `count` of `width`."""
    right = np.random.default_rng(0).standard_normal((matrix.shape[1], width), np.float32)
    before = 0.0
    for _ in range(_ITERATIONS):
        left, _ = np.linalg.qr(matrix @ right)
        right, lower = np.linalg.qr(matrix.T @ left)  # left.T @ matrix is lower.T @ right.T
        u, sizes, v = np.linalg.svd(lower.T)
        captured = float(np.sum(np.square(sizes[:count], dtype=np.float64)))
        if captured - before <= _GAIN * total:
            break
        before = captured
    return left @ u, sizes, v @ right.T


def _balanced(u: np.ndarray, sizes: np.ndarray, v: np.ndarray, count: int) -> tuple[mx.array, mx.array]:
    """A and B with the square roots of singular values on both sides."""
    roots = np.sqrt(sizes[:count])
    a, b = roots[:, None] * v[:count], u[:, :count] * roots
    return mx.array(a.astype(np.float32)), mx.array(b.astype(np.float32))


def as_numpy(array: mx.array) -> np.ndarray:
    """Values in float64."""
    return np.array(array.astype(mx.float32)).astype(np.float64)
