"""Transposed convolution with stride 2."""

from __future__ import annotations

import mlx.core as mx

from mflux_vae.kernels.conv import conv2d
from mflux_vae.kernels.cpu.extension import native
from mflux_vae.kernels.overrides import overridable


@overridable
def conv_transpose2d(
    x: mx.array, weight: mx.array, bias: mx.array | None = None, *, size: tuple[int, int] | None = None
) -> mx.array:
    """Transposed 3x3 convolution with stride 2 and padding 1 (torch's `ConvTranspose2d(C, O, 3, 2, 1)`).

    Without the extension, one 2x2 convolution at the input resolution computes the four output pixels of each input
    pixel as four times the channels. This skips the zeros that MLX's own implementation multiplies on a CPU, and needs
    no dilated convolution, which MLX on CUDA gathers into windows for the weight gradient.

    Args:
        x: (B, H, W, C).
        weight: (O, 3, 3, C).
        bias: (O,) or None.
        size: output height (2H - 1 or 2H) and width (2W - 1 or 2W) (torch's `output_padding` 0 or 1); default: (2H,
        2W).

    Returns:
        (B, *size, O).
    """
    batch, height, width, _ = x.shape
    out_h, out_w = size or (2 * height, 2 * width)
    if (cpu := native()) is not None:
        y: mx.array = cpu.conv_transpose2d(x, weight, bias, stride=2, padding=(1, 1), size=(out_h, out_w))
        return y.astype(x.dtype)
    y = conv2d(x, _phases(weight), padding=((0, 1), (0, 1)))
    y = y.reshape(batch, height, width, 2, 2, weight.shape[0]).transpose(0, 1, 3, 2, 4, 5)
    y = y.reshape(batch, 2 * height, 2 * width, -1)[:, :out_h, :out_w]
    return y if bias is None else y + bias


def _phases(weight: mx.array) -> mx.array:
    """(O, 3, 3, C) -> (4 O, 2, 2, C): kernels of pixels (2i, 2j), (2i, 2j+1), (2i+1, 2j), (2i+1, 2j+1).

    Along each axis, y[2i] = w[1] x[i] and y[2i + 1] = w[2] x[i] + w[0] x[i + 1].
    """
    rows = [mx.concatenate([weight[:, 1:2], mx.zeros_like(weight[:, :1])], axis=1), weight[:, 2::-2]]
    taps = [
        phase
        for row in rows
        for phase in (mx.concatenate([row[:, :, 1:2], mx.zeros_like(row[:, :, :1])], axis=2), row[:, :, 2::-2])
    ]
    return mx.concatenate(taps)
