"""DoRA's layer, which takes quantised weights in full width one layer at a time. (Importing it takes seconds.)"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner import dora

from mflux_vae_train.lora.targets import dimensions


class DoRALinear(dora.DoRALinear):
    """mlx-lm's layer. Over quantised weights W it computes m / |W'| (W x + s B A x) + b, W' = W + s B A, as

        f (quantised(x) + s B A x) + (1 - f) b,    f = m / |W'|,    quantised(x) = W x + b

    so that no layer's W is kept in full width until the backward pass.
    """

    @staticmethod
    def from_base(linear: nn.Linear, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> DoRALinear:
        outputs, inputs = dimensions(linear)
        layer = DoRALinear(inputs, outputs, r=r, dropout=dropout, scale=scale)
        layer.set_linear(linear)
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        if not self._is_quantized():
            return super().__call__(x)
        z = (self.dropout(x) @ self.lora_a) @ self.lora_b
        factor = (self.m / self._norms(x)).astype(x.dtype)
        y = factor * (self.linear(x) + (self.scale * z).astype(x.dtype))
        return y + (1 - factor) * self.linear.bias if "bias" in self.linear else y

    def _norms(self, x: mx.array) -> mx.array:
        """|W'| of each row, without a gradient (arXiv:2402.09353, section 4.3)."""
        linear = self.linear
        (packed,) = mx.depends([linear.weight], [x])  # not before: all layers' weights would be there together
        scheme = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode}
        weight = mx.dequantize(packed, linear.scales, linear.biases, **scheme)
        return mx.stop_gradient(mx.linalg.norm(weight + (self.scale * self.lora_b.T) @ self.lora_a.T, axis=1))
