"""LoRA on convolutions, as in PEFT: A has the kernel, stride and padding of the layer, B is 1x1."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.networks.layers import Conv2d, layer_input
from mflux_vae.runtime.device import is_cpu
from mflux_vae_train.lora.targets import dimensions


class LoRAConv2d(nn.Module):
    """y = conv(x) + scale B A x, with the matrices of a linear layer whose inputs are the windows of the image.

    Attributes:
        lora_a: (kh * kw * in, rank).
        lora_b: (rank, out).
    """

    @staticmethod
    def from_base(linear: Conv2d, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> LoRAConv2d:
        outputs, inputs = dimensions(linear)
        layer = LoRAConv2d()
        layer.linear, layer.scale, layer.dropout = linear, scale, nn.Dropout(dropout)
        layer.lora_a, layer.lora_b = mx.zeros((inputs, r)), mx.zeros((r, outputs))
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        conv = self.linear
        y: mx.array = conv(x)
        x = layer_input(x, conv)
        kernel = self.lora_a.T.reshape(-1, *conv.weight.shape[1:])
        a, b = (matrix if is_cpu() else matrix.astype(x.dtype) for matrix in (kernel, self.lora_b))
        z = kernels.conv2d(self.dropout(x), a, stride=conv._stride, padding=conv._padding) @ b
        return y + (self.scale * z).astype(y.dtype)

    def fuse(self) -> Conv2d:
        """The convolution with the adapter in its weight, whose dtype it keeps."""
        conv = self.linear
        outputs, kernel, _, inputs = conv.weight.shape
        fused = Conv2d(inputs, outputs, kernel, stride=conv._stride, padding=conv._padding, bias="bias" in conv)
        delta = self.scale * (self.lora_a @ self.lora_b).T.reshape(conv.weight.shape)
        fused.weight = (conv.weight + delta).astype(conv.weight.dtype)
        if "bias" in conv:
            fused.bias = conv.bias
        return fused
