"""Convolution, normalization, activations and attention for MLX layers, fast on every device.

Metal and CUDA use MLX's own operations. On a CPU, MLX's convolution copies patches through memory, its gradients do
so several times, and its transcendental functions are scalar; `mflux_vae.kernels.cpu` avoids that. Arrays are NHWC.
Every function returns the dtype of its (first) argument; half precision is computed in float32 where it would lose
more than its own rounding.

`gpu_fusion`, `gpu_attention`, `gpu_conv`   the same on Metal and CUDA, where MLX alone is not enough
`quantized`             products with quantized weights on every device

`cpu.parallel`          fills an output in place, chunk by chunk, on every core
`cpu.im2col`            gathers and sums the windows of an image
`cpu.conv_algorithms`   convolution algorithms and the choice between them
`cpu.conv_gradients`    closed-form gradients for callers that differentiate layer by layer
`cpu.fusion`            compiles a formula into one pass over memory
"""

from mflux_vae.kernels.activations import gelu, gelu_tanh, leaky_relu, quick_gelu, relu, sigmoid, silu, tanh
from mflux_vae.kernels.attention import attention, softmax
from mflux_vae.kernels.conv import (
    FUSED,
    Padding,
    conv2d,
    norm_silu_conv2d,
    partial_conv2d,
    repeat_conv2d,
    rms_norm_silu_conv2d,
    upsample_nearest_2x,
    workspace_bytes,
)
from mflux_vae.kernels.conv_transpose import conv_transpose2d
from mflux_vae.kernels.cpu.fusion import compiles
from mflux_vae.kernels.cpu.parallel import deferred, map_batch, overlapping, run_parallel, streams
from mflux_vae.kernels.gpu_attention import MAX_SCORES
from mflux_vae.kernels.gpu_fusion import widened
from mflux_vae.kernels.normalization import (
    batch_norm,
    batch_norm_apply,
    group_norm,
    group_norm_apply,
    group_norm_silu,
    group_norm_statistics,
    layer_norm,
    rms_norm,
)
from mflux_vae.kernels.quantized import product_choice, quantized_product

__all__ = [
    "FUSED",
    "MAX_SCORES",
    "Padding",
    "attention",
    "batch_norm",
    "batch_norm_apply",
    "compiles",
    "conv2d",
    "conv_transpose2d",
    "deferred",
    "gelu",
    "gelu_tanh",
    "group_norm",
    "group_norm_apply",
    "group_norm_silu",
    "group_norm_statistics",
    "layer_norm",
    "leaky_relu",
    "map_batch",
    "norm_silu_conv2d",
    "overlapping",
    "partial_conv2d",
    "product_choice",
    "quantized_product",
    "quick_gelu",
    "relu",
    "repeat_conv2d",
    "rms_norm",
    "rms_norm_silu_conv2d",
    "run_parallel",
    "sigmoid",
    "silu",
    "softmax",
    "streams",
    "tanh",
    "upsample_nearest_2x",
    "widened",
    "workspace_bytes",
]
