"""Convolution, normalization, activations, attention and matrix products, fast on every device.

Each function chooses once: the native extension on a CPU where it is installed (`cpu.extension`), the code for Metal
and CUDA, or MLX's operations. On a CPU, MLX's convolution copies patches through memory, its transcendental functions
are scalar, and only its matrix products use several cores. Arrays are NHWC. Every function returns the dtype of its
(first) argument; half precision is computed in float32 where it would lose more than its own rounding.

The extension has no `mx.jvp`, and second derivatives of convolutions and linear layers alone: `MFLUX_VAE_NATIVE=0` has
them all.

`gpu_fusion`, `gpu_attention`, `gpu_conv`   Metal and CUDA, where MLX alone is not enough
`quantized`                                 products with quantized weights
`cpu.native`                                sources of the extension
"""

from mflux_vae.kernels.activations import gelu, gelu_tanh, glu, leaky_relu, quick_gelu, relu, sigmoid, silu, tanh
from mflux_vae.kernels.attention import attention, softmax
from mflux_vae.kernels.conv import (
    FUSED,
    conv2d,
    norm_silu_conv2d,
    partial_conv2d,
    repeat_conv2d,
    upsample_nearest_2x,
)
from mflux_vae.kernels.conv_transpose import conv_transpose2d
from mflux_vae.kernels.cpu.extension import native, native_expected
from mflux_vae.kernels.gpu_attention import MAX_SCORES
from mflux_vae.kernels.gpu_fusion import widened
from mflux_vae.kernels.linear import gated_add, linear, lora_linear
from mflux_vae.kernels.normalization import (
    batch_norm,
    batch_norm_apply,
    group_norm,
    group_norm_apply,
    group_norm_silu,
    group_norm_statistics,
    layer_norm,
    modulated_norm,
    rms_norm,
)
from mflux_vae.kernels.padding import Padding
from mflux_vae.kernels.quantized import product_choice, quantized_product
from mflux_vae.kernels.rotary import norm_rotary, rotate

__all__ = [
    "FUSED",
    "MAX_SCORES",
    "Padding",
    "attention",
    "batch_norm",
    "batch_norm_apply",
    "conv2d",
    "conv_transpose2d",
    "gated_add",
    "gelu",
    "gelu_tanh",
    "glu",
    "group_norm",
    "group_norm_apply",
    "group_norm_silu",
    "group_norm_statistics",
    "layer_norm",
    "leaky_relu",
    "linear",
    "lora_linear",
    "modulated_norm",
    "native",
    "native_expected",
    "norm_rotary",
    "norm_silu_conv2d",
    "partial_conv2d",
    "product_choice",
    "quantized_product",
    "quick_gelu",
    "relu",
    "repeat_conv2d",
    "rms_norm",
    "rotate",
    "sigmoid",
    "silu",
    "softmax",
    "tanh",
    "upsample_nearest_2x",
    "widened",
]
