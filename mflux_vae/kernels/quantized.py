"""Products with quantized weights (`mx.quantize`), by MLX's kernel or with dequantized weights.

MLX's kernel suits a few rows. With the thousands of a training step it is slower than dequantizing the matrix and
multiplying densely, most of all in the backward pass. From MLX's source, not measured here:

- CPU: the native extension dequantizes the weights tile by tile; without it they are always dequantized.
- Metal: the kernel has tiles of 32 x 32 at any number of rows. From the M5 on, the forward pass has one that uses the
  GPU's matrix units, the backward pass has none.
- CUDA: the backward pass has a fallback kernel alone, which with groups of 128 and float32 asks for more shared memory
  than it gets. From 8 rows on, the forward kernel of half precision writes its result where it may still read weights.

`MFLUX_VAE_QUANTIZED_PRODUCT` chooses for all layers: `auto` (default), `dense` or `native` (MLX's kernel).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from mflux_vae.kernels.cpu.extension import native
from mflux_vae.runtime import device

PRODUCT_VARIABLE = "MFLUX_VAE_QUANTIZED_PRODUCT"
"""Environment variable: `auto` (default), `dense` or `native`. Compiled functions keep the choice of their trace."""

TILE_BYTES = 128 << 20
"""Dequantized weights that exist at a time on Metal and CUDA: a part of the outputs, or of the inputs for gradients."""

_CHOICES = ("auto", "dense", "native")
_NATIVE_BITS = (4, 8)
_FEWEST_ROWS = {"cpu": 0, "mac": 1024, "cuda": 8}
"""Rows from which a product is dense, by `device.kind`."""
_MATRIX_UNITS = 17
"""First generation of Apple's GPUs with matrix units: the M5's."""
_ALIGNMENT = 128
"""Outputs in a tile are a multiple of this."""


class Dense(NamedTuple):
    """Whether the weights are dequantized in the forward and in the backward pass."""

    forward: bool
    backward: bool


def product_choice() -> str:
    """Value of the environment variable.

    Raises:
        ValueError: unknown value.
    """
    choice = os.environ.get(PRODUCT_VARIABLE) or _CHOICES[0]
    if choice not in _CHOICES:
        raise ValueError(f"{PRODUCT_VARIABLE}: {choice!r} is unknown; set it to {', '.join(_CHOICES)}")
    return choice


def is_dense(rows: int, dtype: mx.Dtype, group_size: int) -> Dense:
    """How to multiply so many rows of this dtype: decided by shapes and the device alone, so also within traces."""
    choice, kind = product_choice(), device.kind()
    if choice != "auto":
        return Dense(choice == "dense", choice == "dense")
    many = rows >= _FEWEST_ROWS[kind]
    if kind == "cuda":
        many = many or (dtype == mx.float32 and group_size == 128)
    return Dense(many and not (kind == "mac" and _has_matrix_units()), many)


def _has_matrix_units() -> bool:
    """Whether this is an M5 or later, by MLX's name of its GPU, such as applegpu_g17s."""
    generation = str(mx.device_info().get("architecture", ""))[-3:-1]
    return generation.isdigit() and int(generation) >= _MATRIX_UNITS


def quantized_product(
    x: mx.array,
    weight: mx.array,
    scales: mx.array,
    biases: mx.array,
    bias: mx.array | None = None,
    lora: tuple[mx.array, mx.array, float] | None = None,
    *,
    group_size: int,
    bits: int,
) -> mx.array:
    """x @ dequantized weights^T + bias + scale * x @ a @ b, differentiable in x, a and b.

    Args:
        x: (..., inputs).
        weight, scales, biases: of `mx.quantize`, for a matrix (outputs, inputs).
        bias: (outputs,) or None.
        lora: a (inputs, rank), b (rank, outputs) and scale, or None.

    Returns:
        (..., outputs).
    """
    if (cpu := native()) is not None and bits in _NATIVE_BITS and product_choice() == "auto":
        y: mx.array = cpu.quantized_linear(x, weight, scales, biases, group_size, bits, bias, lora).astype(x.dtype)
        return y
    inputs, outputs = x.shape[-1], weight.shape[0]
    dense = is_dense(x.size // inputs, x.dtype, group_size)
    arrays, scheme = (weight, scales, biases), {"group_size": group_size, "bits": bits}
    row = mx.result_type(x, scales).size * inputs

    def multiply(x: mx.array, tiles: Iterable[Sequence[mx.array]], *, transpose: bool) -> mx.array:
        parts: list[mx.array] = []
        for packed, *others in tiles:
            # wait for the input or the previous part, or the weights of all layers are dequantized at the same time;
            # in the backward pass the input is the cotangent, or `mx.compile` keeps those of the forward pass
            (packed,) = mx.depends([packed], [parts[-1] if parts else x])
            matrix = mx.dequantize(packed, *others, **scheme)  # type: ignore[arg-type]
            parts.append(x @ (matrix.T if transpose else matrix))
        return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    def forward(x: mx.array) -> mx.array:
        if not dense.forward:
            return mx.quantized_matmul(x, *arrays, transpose=True, **scheme)  # type: ignore[arg-type]
        return multiply(x, _tiles(arrays, 0, outputs, TILE_BYTES // row, _ALIGNMENT), transpose=True)

    run: Any = mx.custom_function(forward)

    @run.vjp
    def gradient(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        if dense.backward:
            tiles = _tiles(arrays, 1, inputs, TILE_BYTES * inputs // (row * outputs), group_size)
            of_x = multiply(cotangent, tiles, transpose=False)
        else:
            of_x = mx.quantized_matmul(cotangent, *arrays, transpose=False, **scheme)  # type: ignore[arg-type]
        return of_x.astype(x.dtype)  # not that of the scales

    y = run(x)
    y = y if bias is None else y + bias
    if lora is None:
        return y
    a, b, scale = lora
    return y + (scale * (x @ a) @ b).astype(x.dtype)


def _tiles(arrays: Sequence[mx.array], axis: int, length: int, fit: int, unit: int) -> Iterable[Sequence[mx.array]]:
    """Parts of quantized weights for at most `fit` of the `length` outputs or inputs; all of them at once on a CPU.

    Args:
        unit: parts are multiples of this, also if those are larger than `fit`.
    """
    fit = max(fit // unit, 1) * unit
    if device.is_cpu() or fit >= length:
        return [arrays]
    steps = [fit * array.shape[axis] // length for array in arrays]  # in packed words, and in groups
    pairs = zip(arrays, steps, strict=True)
    return zip(
        *(mx.split(array, [*range(step, array.shape[axis], step)], axis=axis) for array, step in pairs), strict=True
    )
