"""LoRA's layer. (Importing it takes seconds.)"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner import lora

from mflux_vae.runtime.device import is_cpu
from mflux_vae_train.lora.targets import dimensions


class LoRALinear(lora.LoRALinear):
    """mlx-lm's layer, which on a GPU multiplies in the dtype of x, as mixed precision does in diffusers.

    mlx-lm's products with float32 matrices keep a float32 copy of x until the backward pass. Gradients are float32.
    """

    @staticmethod
    def from_base(linear: nn.Linear, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> LoRALinear:
        outputs, inputs = dimensions(linear)
        layer = LoRALinear(inputs, outputs, r=r, dropout=dropout, scale=scale)
        layer.linear = linear
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.linear(x)
        return y + (self.scale * low_rank(self, x)).astype(x.dtype)


def low_rank(layer: nn.Module, x: mx.array) -> mx.array:
    """B A x with dropout: float32 on a CPU, else in the dtype of x."""
    a, b = (matrix if is_cpu() else matrix.astype(x.dtype) for matrix in (layer.lora_a, layer.lora_b))
    return (layer.dropout(x) @ a) @ b
