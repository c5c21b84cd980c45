"""Convolutions on Metal and CUDA: MLX's, in float32, with weight gradients that do not gather all windows.

MLX computes a weight gradient as one product with the windows of the whole input, nine times its size for 3x3. Here
Metal gathers the windows of a few rows at a time, and CUDA takes cuDNN's weight gradient, which MLX only uses for
convolutions with dilation. From MLX's source; `python -m benchmarks.gpu` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import mlx.core as mx

from mflux_vae.kernels.gpu_fusion import after
from mflux_vae.kernels.padding import Sides, zero_pad
from mflux_vae.runtime import device

WINDOW_BYTES = 128 << 20
"""Windows that are gathered at a time."""

_custom_function: Any = mx.custom_function  # MLX's stubs type its result as `object`


def conv2d(x: mx.array, weight: mx.array, stride: int, sides: Sides) -> mx.array:
    """Convolve in float32; the result has the dtype of x.

    The backward pass keeps weight and, unless the weight is frozen, x, in their dtypes.

    Metal's 3x3 convolution is Winograd's F(6x6, 3x3), which stores transformed weights, inputs and products in the
    dtype of its arguments. In bfloat16 each convolution then has an error of 5.6 % (root mean square, relative to the
    deviation of the result), in float16 of 0.7 %, in float32 of 4e-6. A float32 copy of the input is smaller than what
    Winograd's transforms take, and Apple's GPUs multiply float32 as fast as half precision.
    """

    def forward(x: mx.array, weight: mx.array) -> mx.array:
        wide_x, wide_weight = _wide(x, weight)
        return mlx_conv2d(wide_x, wide_weight, stride, sides).astype(x.dtype)

    run = _custom_function(forward)

    @run.vjp
    def backward(primals: Sequence[mx.array], cotangent: mx.array, _: mx.array) -> list[mx.array]:
        # Wait for the cotangent, or `mx.compile` keeps the float32 copies of the forward pass; one by one, so that x is
        # not kept for its own gradient, which does not need it: that of the weight does, unless it is frozen.
        wide_x, wide_weight, dy = _wide(*(after([cotangent], array)[0] for array in primals), cotangent)
        (of_x,) = mx.vjp(lambda x: mlx_conv2d(x, wide_weight, stride, sides), [wide_x], [dy])[1]
        of_weight = weight_gradient(wide_x, dy, (weight.shape[1], weight.shape[2]), stride, sides)
        return [of_x.astype(x.dtype), of_weight.astype(weight.dtype)]

    y: mx.array = run(x, weight)
    return y


def mlx_conv2d(x: mx.array, weight: mx.array, stride: int, sides: Sides) -> mx.array:
    """MLX's convolution."""
    (top, bottom), (left, right) = sides
    if stride > 1 and device.kind() == "cuda" and not any(_unused(x, weight.shape[1:3], stride, sides)):
        # Add a row of zeros that no window reaches: MLX keeps cuDNN's plan of an input gradient by shapes and padding,
        # without the stride, and could take that of a convolution with stride 1, which never leaves a row out.
        bottom += 1
    # MLX 0.32.2 computes wrong gradients if the padding is not less than the kernel: pad beforehand
    if top == bottom < weight.shape[1] and left == right < weight.shape[2]:
        return mx.conv2d(x, weight, stride=stride, padding=(top, left))
    return mx.conv2d(zero_pad(x, ((top, bottom), (left, right))), weight, stride=stride)


def weight_gradient(x: mx.array, dy: mx.array, kernel: tuple[int, int], stride: int, sides: Sides) -> mx.array:
    """Gradient of a convolution for its weight, (O, kh, kw, C), in float32.

    Args:
        x: (B, H, W, C), float32.
        dy: gradient of the output, (B, h, w, O), float32.
    """
    by_parts = weight_gradient_by_cudnn if device.kind() == "cuda" else weight_gradient_by_rows
    return by_parts(x, dy, kernel, stride, sides)


def weight_gradient_by_rows(x: mx.array, dy: mx.array, kernel: tuple[int, int], stride: int, sides: Sides) -> mx.array:
    """`weight_gradient` as a sum over parts of at most `WINDOW_BYTES` of windows, computed one after the other."""
    batch, rows, columns, out = dy.shape
    x = zero_pad(x, sides)
    row = 4 * columns * kernel[0] * kernel[1] * x.shape[3]
    images, lines = max(WINDOW_BYTES // (row * rows), 1), max(WINDOW_BYTES // row, 1)
    weight = mx.zeros((out, *kernel, x.shape[3]))  # never computed
    total: mx.array | None = None
    for samples, part in product(_slices(batch, images), _slices(rows, lines)):
        first, end = part.start * stride, (part.stop - 1) * stride + kernel[0]
        done = [] if total is None else [total]
        block, slope = after(done, x[samples, first:end], dy[samples, part])
        (new,) = mx.vjp(lambda w, block=block: mx.conv2d(block, w, stride=stride), [weight], [slope])[1]
        total = new if total is None else total + new
    assert total is not None
    return total


def weight_gradient_by_cudnn(x: mx.array, dy: mx.array, kernel: tuple[int, int], stride: int, sides: Sides) -> mx.array:
    """`weight_gradient` as a convolution of images and channels exchanged, which MLX gives to cuDNN as what it is."""
    padding = sides[0][0], sides[1][0]
    if any(before != end for before, end in sides) or any(_unused(x, kernel, stride, sides)):
        height, width = (stride * (n - 1) + k for n, k in zip(dy.shape[1:3], kernel, strict=True))
        x, padding = zero_pad(x, sides)[:, :height, :width], (0, 0)
    gradient = mx.conv_general(x.swapaxes(0, 3), dy.swapaxes(0, 3), padding=padding, kernel_dilation=stride)
    return gradient.swapaxes(0, 3)


def _unused(x: mx.array, kernel: Sequence[int], stride: int, sides: Sides) -> list[int]:
    """Rows and columns at the end of the padded image that no window reaches."""
    return [(n + sum(pad) - k) % stride for n, k, pad in zip(x.shape[1:3], kernel, sides, strict=True)]


def _wide(*arrays: mx.array) -> list[mx.array]:
    return [array.astype(mx.float32) for array in arrays]


def _slices(length: int, size: int) -> list[slice]:
    """Slices of `size` items; the last one may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]
