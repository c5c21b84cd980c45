"""LoRA on linear layers and, as in PEFT, on convolutions: there A has the kernel, stride and padding, and B is 1x1."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.networks.layers import Conv2d, Linear, layer_input
from mflux_vae.runtime.device import is_cpu
from mflux_vae_train.lora.targets import dimensions


class LoRALayer(nn.Module):
    """y = layer(x) + scale B A x.

    Attributes, named as in mlx-lm:
        linear: the layer that is adapted.
        lora_a: (in, rank). The inputs of a convolution are its windows, (kh * kw * in).
        lora_b: (rank, out).
    """

    @classmethod
    def from_base(cls, linear: nn.Module, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> LoRALayer:
        outputs, inputs = dimensions(linear)
        layer = cls()
        layer.linear, layer.scale, layer.dropout = linear, scale, nn.Dropout(dropout)
        layer.lora_a, layer.lora_b = mx.zeros((inputs, r)), mx.zeros((r, outputs))
        return layer


class LoRALinear(LoRALayer):
    """On a GPU it multiplies in the dtype of x, as mixed precision does in diffusers.

    mlx-lm's products with float32 matrices keep a float32 copy of x until the backward pass. Gradients are float32.
    """

    def __call__(self, x: mx.array) -> mx.array:
        base, dropped = self.linear, self.dropout(x)
        if is_cpu() and isinstance(base, Linear) and dropped is x:
            return kernels.lora_linear(x, base.weight, base.get("bias"), self.lora_a, self.lora_b, self.scale)
        if kernels.native() and isinstance(base, nn.QuantizedLinear) and base.mode == "affine" and dropped is x:
            adapter, scheme = (self.lora_a, self.lora_b, self.scale), {"group_size": base.group_size, "bits": base.bits}
            return kernels.quantized_product(
                x, base.weight, base.scales, base["biases"], base.get("bias"), adapter, **scheme
            )
        y: mx.array = base(x)
        return y + (self.scale * low_rank(self, dropped)).astype(x.dtype)

    def fuse(self) -> nn.Module:
        """The linear layer with the adapter in its weight, quantized again if it was."""
        base = self.linear
        scheme = scheme_of(base)
        weight = mx.dequantize(base.weight, base.scales, base.biases, **scheme) if scheme else base.weight
        outputs, inputs = weight.shape
        fused = (Linear if isinstance(base, Linear) else nn.Linear)(inputs, outputs, bias="bias" in base)
        fused.weight = weight + ((self.scale * self.lora_b.T) @ self.lora_a.T).astype(weight.dtype)
        if "bias" in base:
            fused.bias = base.bias
        return nn.QuantizedLinear.from_linear(fused, **scheme) if scheme else fused


class LoRAConv2d(LoRALayer):
    """A convolution with an adapter."""

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


def low_rank(layer: nn.Module, x: mx.array) -> mx.array:
    """B A x: float32 on a CPU, else in the dtype of x."""
    a, b = (matrix if is_cpu() else matrix.astype(x.dtype) for matrix in (layer.lora_a, layer.lora_b))
    return (x @ a) @ b


def scheme_of(linear: nn.Module) -> dict[str, Any]:
    """How a layer's weight is quantized; empty if it is not."""
    if not isinstance(linear, nn.QuantizedLinear):
        return {}
    return {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
