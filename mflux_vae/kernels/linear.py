"""Products with the weights of linear layers."""

from __future__ import annotations

import mlx.core as mx

from mflux_vae.kernels.cpu.extension import native


def linear(x: mx.array, weight: mx.array, bias: mx.array | None = None) -> mx.array:
    """x @ weight.T + bias: (..., inputs), (outputs, inputs), (outputs,) -> (..., outputs)."""
    if (cpu := native()) is not None and x.dtype == weight.dtype == mx.float32:
        y: mx.array = cpu.linear(x, weight, bias)
        return y
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


def gated_add(x: mx.array, gate: mx.array, y: mx.array) -> mx.array:
    """x + gate * y for x and y (B, ..., D), gate (B, 1, D)."""
    if (cpu := native()) is None:
        return x + gate * y
    z: mx.array = cpu.gated(x, gate, y).astype(x.dtype)
    return z


def lora_linear(
    x: mx.array, weight: mx.array, bias: mx.array | None, a: mx.array, b: mx.array, scale: float
) -> mx.array:
    """linear(x, weight, bias) + scale * x @ a @ b, with the sum of low rank in the dtype of x.

    Args:
        a: (inputs, rank); b: (rank, outputs).
    """
    if (cpu := native()) is not None and x.dtype == weight.dtype == mx.float32:
        y: mx.array = cpu.lora_linear(x, weight, bias, (a, b, scale))
        return y
    return linear(x, weight, bias) + (scale * (x @ a) @ b).astype(x.dtype)
