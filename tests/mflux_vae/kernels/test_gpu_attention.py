"""Attention for Metal and CUDA matches its formula in blocks of rows, and keeps no scores for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae import kernels
from mflux_vae.kernels import gpu_attention
from mflux_vae.runtime import device
from tests.helpers.peak_memory import peak_of

pytestmark = pytest.mark.usefixtures("gpu_branch")

LIMIT = {mx.float32: 1e-5, mx.bfloat16: 2e-2}
MASKS = [None, (60,), (50, 60), (1, 1, 50, 60), (2, 1, 1, 60), (2, 3, 50, 60)]


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def formula(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    scores = 0.3 * (q @ k.swapaxes(-1, -2))
    return mx.softmax(scores if mask is None else scores + mask, axis=-1) @ v


def ours(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    q, k, v = (array.swapaxes(1, 2) for array in (q, k, v))
    return kernels.attention(q, k, v, scale=0.3, mask=mask).swapaxes(1, 2)


def with_gradients(function: Callable[..., mx.array], arrays: list[mx.array]) -> list[mx.array]:
    away = normal(2, 3, 50, 8, seed=9)

    def loss(*arrays: mx.array) -> mx.array:
        return (function(*arrays).astype(mx.float32) * away).sum()

    return [function(*arrays), *mx.grad(loss, argnums=list(range(len(arrays))))(*arrays)]


@pytest.mark.parametrize(
    ("mask_shape", "scores", "compiled"),
    [*((shape, scores, False) for shape in MASKS for scores in (600, 6000, 1 << 23)), (MASKS[2], 6000, True)],
    ids=str,
)
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_values_and_gradients_match_the_formula(
    dtype: mx.Dtype, mask_shape: tuple[int, ...] | None, scores: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_attention, "MAX_SCORES", scores)
    arrays = [normal(2, 3, 50, 16), normal(2, 3, 60, 16, seed=1), normal(2, 3, 60, 8, seed=2)]
    if mask_shape:
        arrays.append(normal(*mask_shape, seed=3))
    arrays = [array.astype(dtype) for array in arrays]
    exact = with_gradients(formula, [array.astype(mx.float32) for array in arrays])
    both = partial(with_gradients, ours)
    computed = (mx.compile(both) if compiled else both)(arrays)
    for near, far in zip(computed, exact, strict=True):
        assert near.dtype == dtype and near.shape == far.shape
        limit = LIMIT[dtype] * mx.abs(far).max().item()
        np.testing.assert_allclose(np.array(near.astype(mx.float32)), np.array(far), rtol=0, atol=limit)


def test_masked_keys_have_no_gradient() -> None:
    q, k, v = (normal(1, 2, 40, 16, seed=seed) for seed in range(3))
    mask = mx.where(mx.arange(40) < 30, 0.0, -mx.inf)
    slope = mx.grad(lambda k: mx.square(ours(q, k, v, mask)).sum())(k)
    assert mx.all(slope[:, :, 30:] == 0) and mx.all(mx.isfinite(slope)) and mx.any(slope[:, :, :30] != 0)


@pytest.mark.parametrize("compiled", [False, True])
def test_memory_of_a_gradient_is_that_of_a_block_of_rows(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_attention, "MAX_SCORES", 1 << 17)
    q, k, v = (normal(1, 4, 1024, 16, seed=seed) for seed in range(3))
    mx.eval(q, k, v)

    def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        for _ in range(3):
            q = ours(q, k, v)
        return q.sum()

    gradient = mx.grad(loss, argnums=(0, 1, 2))
    gradient = mx.compile(gradient) if compiled else gradient
    block, array, everything = 4 * (1 << 17), q.nbytes, 4 * 4 * 1024**2
    # MLX allocates the results of ten operations ahead
    assert peak_of(lambda: gradient(q, k, v)) < 24 * block + 24 * array < 1.2 * everything


@pytest.mark.parametrize(
    ("kind", "shape", "dtype", "kernel"),
    [
        ("mac", (1, 2, 32, 128), mx.bfloat16, True),
        ("mac", (1, 2, 32, 64), mx.float32, True),
        ("mac", (1, 2, 32, 40), mx.bfloat16, False),
        ("mac", (1, 2, 32, 160), mx.bfloat16, False),
        ("mac", (1, 2, 8, 128), mx.bfloat16, False),
        ("cuda", (1, 2, 32, 40), mx.bfloat16, True),
        ("cuda", (1, 2, 128, 40), mx.bfloat16, True),
        ("cuda", (1, 2, 32, 128), mx.float32, False),
        ("cuda", (1, 2, 32, 512), mx.bfloat16, False),
    ],
)
def test_whole_attention_is_computed_where_a_kernel_exists(
    kind: str, shape: tuple[int, ...], dtype: mx.Dtype, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fast(q: mx.array, *_: mx.array, **options: object) -> mx.array:
        calls.append((q.shape[2], options.get("force_fused", False)))
        return q

    monkeypatch.setattr(gpu_attention, "MAX_SCORES", 64)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", fast)
    monkeypatch.setattr(device, "kind", lambda: kind)
    q = mx.zeros(shape, dtype)
    ours(q, q, q)
    assert (len(calls) == 1 and calls[0][0] == shape[2]) == kernel
    assert not kernel or calls[0][1] == (kind == "mac" and bool(gpu_attention._FORCED))


@pytest.mark.parametrize(("queries", "whole"), [(128, True), (50, False)])
def test_scores_of_all_rows_are_left_to_cudnn_alone(queries: int, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a backward pass MLX on CUDA has cuDNN compute multiples of 128 rows, and all scores of others at once."""
    blocks, native = [], gpu_attention._gradients

    def gradients(*arguments: object) -> list[mx.array]:
        blocks.append(arguments[-1])
        return native(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(device, "kind", lambda: "cuda")
    monkeypatch.setattr(gpu_attention, "MAX_SCORES", 2 * 10 * queries)
    monkeypatch.setattr(gpu_attention, "_gradients", gradients)
    q, k, v = (normal(1, 2, queries, 16, seed=seed).astype(mx.bfloat16) for seed in range(3))
    mx.eval(mx.grad(lambda q: ours(q, k, v).sum())(q))
    assert (not blocks) == whole and all(len(rows) > 1 for rows in blocks)


@pytest.mark.parametrize("reason", ["card", "variable"])
def test_cards_and_settings_without_cudnn_compute_rows(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    major = 7 if reason == "card" else 8
    monkeypatch.setattr(mx, "device_info", lambda: {"compute_capability_major": major})
    if reason == "variable":
        monkeypatch.setenv("MLX_CUDA_USE_CUDNN_SDPA", "0")
    q = mx.zeros((1, 2, 128, 64), mx.bfloat16)
    assert not gpu_attention._has_cudnn(q, q)
