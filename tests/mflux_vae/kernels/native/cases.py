"""Drawn calls of the native operations beside their formulas in float64, for tests and for sanitizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import numpy as np

from mflux_vae.kernels.cpu import _native as native

LIMIT = 2e-5
"""Largest error relative to the largest number of a result."""

T = TypeVar("T")
Arrays = Sequence[mx.array]


class Draw(Protocol):
    """Source of shapes and options."""

    def integer(self, low: int, high: int) -> int: ...

    def choice(self, options: Sequence[T]) -> T: ...


class RandomDraw:
    """Draws from a generator of random numbers."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def integer(self, low: int, high: int) -> int:
        return int(self.random.integers(low, high + 1))

    def choice(self, options: Sequence[T]) -> T:
        return options[self.integer(0, len(options) - 1)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation, its formula, and inputs.

    Attributes:
        native: float32 arrays -> results.
        formula: float64 arrays -> the same.
        inputs: of both; gradients of all of them are compared.
        smallest: errors are relative to the largest number of a result, but at least to this.
    """

    native: Callable[..., Arrays]
    formula: Callable[..., Arrays]
    inputs: list[np.ndarray]
    smallest: float = 1.0


def check(case: Case, *, transposed: bool = False) -> None:
    """Assert that results and gradients agree. `transposed`: inputs are views of arrays in another memory order."""
    inputs = [mx.array(a, dtype=mx.float32) for a in case.inputs]
    if transposed:
        inputs = [mx.array(a.T, dtype=mx.float32).T for a in case.inputs]
    exact = [mx.array(np.float32(a).astype(np.float64), dtype=mx.float64) for a in case.inputs]
    ours, theirs = case.native(*inputs), case.formula(*exact)
    random = np.random.default_rng(1)
    weights = [random.normal(size=y.shape) for y in theirs]

    def weighted(function: Callable[..., Arrays], dtype: mx.Dtype) -> Callable[..., mx.array]:
        return lambda *x: sum(
            ((y * mx.array(w, dtype=dtype)).sum() for y, w in zip(function(*x), weights, strict=True)),
            start=mx.array(0.0, dtype=dtype),
        )

    every = list(range(len(inputs)))
    ours = [*ours, *mx.grad(weighted(case.native, mx.float32), argnums=every)(*inputs)]
    theirs = [*theirs, *mx.grad(weighted(case.formula, mx.float64), argnums=every)(*exact)]
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert a.shape == b.shape, i
        actual, expected = np.array(a, np.float64), np.array(b, np.float64)
        scale = max(float(np.abs(expected).max(initial=0)), case.smallest)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=LIMIT * scale, err_msg=f"result or gradient {i}")


def normal(draw: Draw, *shape: int) -> np.ndarray:
    return np.random.default_rng(draw.integer(0, 1000)).normal(size=shape)


ACTIVATIONS: dict[Any, Callable[[mx.array], mx.array]] = {
    native.Activation.silu: lambda x: x * mx.sigmoid(x),
    native.Activation.tanh: mx.tanh,
    native.Activation.sigmoid: mx.sigmoid,
}


def _normalize(x: mx.array, axes: tuple[int, ...], eps: float) -> mx.array:
    x = x - x.mean(axes, keepdims=True)
    return x / mx.sqrt((x * x).mean(axes, keepdims=True) + eps)


def _by_group(x: mx.array, groups: int, eps: float) -> mx.array:
    split = x.reshape(x.shape[0], max(x.size // max(x.shape[0] * x.shape[-1], 1), 1), groups, -1)
    return _normalize(split, (1, 3), eps).reshape(x.shape)


def group_norm(draw: Draw) -> Case:
    groups, width = draw.integer(1, 5), draw.integer(1, 20)
    c, eps = groups * width, 1e-3
    shape = (draw.integer(1, 3), draw.integer(2, 40), draw.integer(1, 9), c)
    kind = draw.choice(list(ACTIVATIONS))
    return Case(
        native=lambda x, w, b: [native.group_norm(x, groups, w, b, eps, kind)],
        formula=lambda x, w, b: [ACTIVATIONS[kind](_by_group(x, groups, eps) * w + b)],
        inputs=[normal(draw, *shape) + 3, normal(draw, c), normal(draw, c)],
        smallest=10 if width * shape[1] * shape[2] < 8 else 1,
    )


def group_norm_affine(draw: Draw) -> Case:
    groups, width = draw.integer(1, 4), draw.integer(1, 12)
    c, eps = groups * width, 1e-3
    shape = (draw.integer(1, 3), draw.integer(4, 20), draw.integer(1, 9), c)

    def formula(x: mx.array, w: mx.array, b: mx.array) -> Arrays:
        split = x.reshape(shape[0], -1, groups, width)
        mean = split.mean((1, 3), keepdims=True)
        variance = ((split - mean) * (split - mean)).mean((1, 3), keepdims=True)
        spread = (shape[0], 1, groups, width)
        mean, variance = (mx.broadcast_to(a, spread).reshape(shape[0], c) for a in (mean, variance))
        factor = w / mx.sqrt(variance + eps)
        return [factor, b - mean * factor]

    return Case(
        native=lambda x, w, b: native.group_norm_affine(x, groups, w, b, eps),
        formula=formula,
        inputs=[normal(draw, *shape) + 1, normal(draw, c), normal(draw, c)],
    )


def batch_norm(draw: Draw) -> Case:
    c, eps, kind = draw.integer(1, 70), 1e-3, draw.choice(list(ACTIVATIONS))
    shape = (draw.integer(1, 5), draw.integer(2, 30), c)
    return Case(
        native=lambda x, w, b: [native.batch_norm(x, w, b, eps, kind)[0]],
        formula=lambda x, w, b: [ACTIVATIONS[kind](_normalize(x, (0, 1), eps) * w + b)],
        inputs=[normal(draw, *shape), normal(draw, c), normal(draw, c)],
        smallest=10 if shape[0] * shape[1] < 8 else 1,
    )


def norm_rotary(draw: Draw) -> Case:
    batch, heads, width, parts = draw.integer(1, 3), draw.integer(1, 4), draw.integer(1, 40), draw.integer(1, 2)
    counts = [draw.integer(1, 9) for _ in range(parts)]
    halves, eps = draw.choice([False, True]), 1e-2
    angles = normal(draw, draw.integer(0, 1) * (batch - 1) + 1, sum(counts), 1, width)
    sines = [-np.sin(angles), np.sin(angles)]
    if halves:
        cos, sin = np.concatenate([np.cos(angles)] * 2, -1), np.concatenate(sines, -1)
    else:
        cos, sin = np.repeat(np.cos(angles), 2, -1), np.stack(sines, -1).reshape(*angles.shape[:-1], -1)
    if len(angles) == 1 and draw.integer(0, 1):
        cos, sin = cos[0], sin[0]
    rounded = [mx.array(a, dtype=mx.float32) for a in (cos, sin)]
    cos64, sin64 = (mx.array(np.array(a, np.float64), dtype=mx.float64) for a in rounded)

    def formula(*arrays: mx.array) -> Arrays:
        pairs = zip(arrays[::2], arrays[1::2], strict=True)
        x = mx.concatenate([x / mx.sqrt((x * x).mean(-1, keepdims=True) + eps) * w for x, w in pairs], axis=1)
        if halves:
            other = mx.concatenate([x[..., width:], x[..., :width]], axis=-1)
        else:
            other = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
        return [x * cos64 + other * sin64]

    return Case(
        native=lambda *arrays: [native.norm_rotary(arrays[::2], arrays[1::2], *rounded, eps, halves)],
        formula=formula,
        inputs=[a for n in counts for a in (normal(draw, batch, n, heads, 2 * width), normal(draw, 2 * width))],
    )


def glu(draw: Draw) -> Case:
    rows, width = draw.integer(0, 40), draw.integer(1, 150)
    kind, joined, first = draw.choice(list(ACTIVATIONS)), draw.choice([False, True]), draw.choice([False, True])

    def formula(*arrays: mx.array) -> Arrays:
        gate, other = (arrays[0][:, :width], arrays[0][:, width:]) if joined else arrays
        gate, other = (other, gate) if joined and not first else (gate, other)
        return [ACTIVATIONS[kind](gate) * other]

    return Case(
        native=lambda gate, other=None: [native.glu(gate, other, kind, first)],
        formula=formula,
        inputs=[normal(draw, rows, 2 * width)] if joined else [normal(draw, rows, width) for _ in range(2)],
    )


def gated(draw: Draw) -> Case:
    batch, rows, width = draw.integer(1, 3), draw.integer(1, 20), draw.integer(1, 70)
    gate = draw.choice([(width,), (batch, 1, width)])
    return Case(
        native=lambda x, gate, y: [native.gated(x, gate, y)],
        formula=lambda x, gate, y: [x + gate * y],
        inputs=[normal(draw, batch, rows, width), normal(draw, *gate), normal(draw, batch, rows, width)],
    )


def lora_linear(draw: Draw) -> Case:
    m, k, n, rank = (
        draw.choice([draw.integer(0, 70), 300]),
        draw.integer(1, 300),
        draw.integer(1, 90),
        draw.integer(0, 9),
    )
    biased = draw.choice([False, True])

    def formula(x: mx.array, w: mx.array, a: mx.array, b: mx.array, *bias: mx.array) -> Arrays:
        y = x @ w.T + (0.5 * (x @ a) @ b if rank else 0)
        return [y + bias[0] if bias else y]

    return Case(
        native=lambda x, w, a, b, *bias: [native.lora_linear(x, w, bias[0] if bias else None, (a, b, 0.5))],
        formula=formula,
        inputs=[
            normal(draw, 2, m, k),
            normal(draw, n, k) / k**0.5,
            normal(draw, k, rank) / k**0.5,
            normal(draw, rank, n),
            *([normal(draw, n)] if biased else []),
        ],
    )


def quantized_linear(draw: Draw) -> Case:
    bits, group = draw.choice([4, 8]), draw.choice([32, 64])
    m, k, n, rank = draw.integer(0, 40), group * draw.integer(1, 6), draw.integer(1, 70), draw.integer(1, 5)
    arrays = mx.quantize(mx.array(normal(draw, n, k) / k**0.5, dtype=mx.float32), group_size=group, bits=bits)
    dense = mx.array(np.array(mx.dequantize(*arrays, group_size=group, bits=bits), np.float64), dtype=mx.float64)
    adapted = draw.choice([False, True])
    inputs = [normal(draw, m, k), normal(draw, n)]
    if adapted:
        inputs += [normal(draw, k, rank) / k**0.5, normal(draw, rank, n)]

    def formula(x: mx.array, bias: mx.array, *lora: mx.array) -> Arrays:
        y = x @ dense.T + bias
        return [y + 2 * (x @ lora[0]) @ lora[1] if lora else y]

    return Case(
        native=lambda x, bias, *lora: [
            native.quantized_linear(x, *arrays, group, bits, bias, (*lora, 2.0) if lora else None)
        ],
        formula=formula,
        inputs=inputs,
    )


def linear(draw: Draw) -> Case:
    m, k, n = draw.integer(0, 150), draw.integer(1, 300), draw.integer(1, 90)
    if draw.choice([False, False, True]):  # several blocks of rows, and parts of their sums
        m, k = draw.choice([m, 510 + m]), 500 + 3 * k
    return Case(
        native=lambda x, w, b: [native.linear(x, w, b)],
        formula=lambda x, w, b: [x @ w.T + b],
        inputs=[normal(draw, m, k), normal(draw, n, k) / k**0.5, normal(draw, n)],
    )


def norm(draw: Draw) -> Case:
    batch, tokens, width, rms = (
        draw.integer(1, 3),
        draw.integer(1, 20),
        draw.integer(2, 150),
        draw.choice([False, True]),
    )
    shape = draw.choice([(width,), (batch, 1, width)])
    eps, offset = 1e-3, draw.choice([0.0, 1.0])

    def formula(x: mx.array, w: mx.array, b: mx.array) -> Arrays:
        y = x / mx.sqrt((x * x).mean(-1, keepdims=True) + eps) if rms else _normalize(x, (-1,), eps)
        return [y * (w + offset) + b]

    return Case(
        native=lambda x, w, b: [native.norm(x, w, b, eps, rms, offset)],
        formula=formula,
        inputs=[normal(draw, batch, tokens, width), normal(draw, *shape), normal(draw, *shape)],
    )


def softmax(draw: Draw) -> Case:
    x = normal(draw, draw.integer(0, 30), draw.integer(1, 100)) * 5
    return Case(native=lambda x: [native.softmax(x)], formula=lambda x: [mx.softmax(x, -1)], inputs=[x])


def attention(draw: Draw) -> Case:
    batch, queries, keys, key_heads, shared = (draw.integer(1, n) for n in (2, 110, 110, 3, 2))
    queries *= draw.choice([1, 1, 5])  # many queries are computed in parts
    width, heads, masked = draw.choice([1, 8, 12, 40, 64]), key_heads * shared, draw.choice([False, True])
    mask = normal(draw, batch, 1, queries, keys)

    def formula(q: mx.array, k: mx.array, v: mx.array) -> Arrays:
        k, v = (mx.repeat(a, shared, axis=2) for a in (k, v))
        q, k, v = (a.transpose(0, 2, 1, 3) for a in (q, k, v))
        scores = q @ k.swapaxes(-1, -2) * width**-0.5 + (mx.array(mask, dtype=mx.float64) if masked else 0)
        return [(mx.softmax(scores, -1) @ v).transpose(0, 2, 1, 3)]

    given = mx.array(mask, dtype=mx.float32) if masked else None
    return Case(
        native=lambda q, k, v: [native.attention(q, k, v, width**-0.5, given)],
        formula=formula,
        inputs=[normal(draw, batch, n, h, width) for n, h in ((queries, heads), (keys, key_heads), (keys, key_heads))],
    )


def _conv(x: mx.array, w: mx.array, stride: int, padding: Sequence[int]) -> mx.array:
    x = mx.pad(x, [(0, 0), (padding[0], padding[1]), (padding[2], padding[3]), (0, 0)])
    _, kh, kw, _ = w.shape
    height, width = ((n - k) // stride + 1 for n, k in ((x.shape[1], kh), (x.shape[2], kw)))
    y = mx.zeros((x.shape[0], height, width, w.shape[0]), dtype=x.dtype)
    for r in range(kh):
        for s in range(kw):
            rows, columns = (slice(a, a + (n - 1) * stride + 1, stride) for a, n in ((r, height), (s, width)))
            y = y + x[:, rows, columns] @ w[:, r, s].T
    return y


def _conv2d(
    draw: Draw, shape: Sequence[int], o: int, k: int, stride: int, padding: Sequence[int], *, doubled: bool
) -> Case:
    batch, _, _, c = shape
    affine, silu = draw.choice([False, True]), draw.choice([False, True])
    inputs = [normal(draw, *shape), normal(draw, o, k, k, c) / (k * k * c) ** 0.5, normal(draw, o)]
    if affine:
        inputs += [normal(draw, batch, c), normal(draw, batch, c)]

    def formula(x: mx.array, w: mx.array, b: mx.array, *pair: mx.array) -> Arrays:
        if pair:
            x = x * pair[0][:, None, None] + pair[1][:, None, None]
        x = x * mx.sigmoid(x) if silu else x
        x = mx.repeat(mx.repeat(x, 2, axis=1), 2, axis=2) if doubled else x
        return [_conv(x, w, stride, padding) + b]

    return Case(
        native=lambda x, w, b, *pair: [
            native.conv2d(x, w, b, None, *(pair or (None, None)), silu, doubled, stride, padding)
        ],
        formula=formula,
        inputs=inputs,
    )


def conv2d(draw: Draw) -> Case:
    k, stride = draw.choice([1, 2, 3, 3, 4, 5]), draw.choice([1, 1, 2, 3])
    shape = [draw.integer(1, 2), draw.integer(k, 22), draw.integer(k, 22), draw.choice([1, 3, 4, 16, 17, 33])]
    padding = [draw.integer(0, k - 1) for _ in range(4)]
    o = draw.choice([1, 3, 12, 16, 24, 33])
    return _conv2d(draw, shape, o, k, stride, padding, doubled=draw.choice([False, True]))


def large_conv2d(draw: Draw) -> Case:
    """Sizes for which convolutions and their gradients take other ways."""
    side = draw.integer(9, 20)
    batch, height, width, c, o, stride = draw.choice(
        [
            (draw.integer(1, 2), side, 29 - side, draw.choice([128, 140]), draw.choice([128, 133]), 1),  # few tiles
            (1, 125, 118, 100, 30, 1),  # more tiles than are held at once
            (2, 5, side, 470, 13, 2),  # long windows
            (3, 70, 60, 5, 20, 1),  # weights' gradient as a sum of parts
            (2, 70, 9, 5, 20, 1),  # many rows of a narrow image
            (1, 9, 60 + side, 18, 20, 2),  # a wide image
            (33, side - 5, 7, 6, 20, draw.choice([1, 2])),  # several images at once
            (2, 30 + side, 37, draw.choice([1, 3, 6]), 17, draw.choice([1, 2])),  # few channels
            (3, 90 + side, 83, 17, 20, 2),  # large and strided
            (1, 5, 6, 270, 1000, 2),  # few pixels, many weights
        ]
    )
    padding = [draw.integer(0, 4) for _ in range(4)]
    doubled = c <= 20 and draw.choice([False, True])
    return _conv2d(draw, (batch, height, width, c), o, 3, stride, padding, doubled=doubled)


def conv_transpose2d(draw: Draw) -> Case:
    k, stride = draw.choice([1, 2, 3, 4]), draw.choice([1, 2, 3])
    batch, height, width, c, o = (draw.integer(1, n) for n in (3, 12, 12, 33, 33))
    padding = [draw.integer(0, (k - 1) // 2) for _ in range(2)]
    extra = [draw.integer(0, stride - 1) for _ in range(2)]
    size = [(n - 1) * stride + k - 2 * p + e for n, p, e in zip((height, width), padding, extra, strict=True)]

    def formula(x: mx.array, w: mx.array, b: mx.array) -> Arrays:
        full = mx.zeros(
            (batch, (height - 1) * stride + k + stride, (width - 1) * stride + k + stride, o), dtype=x.dtype
        )
        for r in range(k):
            for s in range(k):
                rows, columns = (slice(a, a + (n - 1) * stride + 1, stride) for a, n in ((r, height), (s, width)))
                full = full.at[:, rows, columns].add(x @ w[:, r, s].T)
        return [full[:, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]] + b]

    return Case(
        native=lambda x, w, b: [native.conv_transpose2d(x, w, b, stride, padding, size)],
        formula=formula,
        inputs=[normal(draw, batch, height, width, c), normal(draw, o, k, k, c) / c**0.5, normal(draw, o)],
    )


CASES: list[Callable[[Draw], Case]] = [
    *(group_norm, group_norm_affine, batch_norm, norm_rotary, glu, gated, lora_linear),
    *(quantized_linear, linear, norm, softmax),
    *(attention, conv2d, large_conv2d, conv_transpose2d),
]
