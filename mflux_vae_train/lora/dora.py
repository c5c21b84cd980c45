"""DoRA on linear layers. Importing it takes seconds. It widens the weights of one layer at a time."""

from __future__ import annotations

import os

import mlx.core as mx
import mlx.nn as nn

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # mlx-lm imports it, and it warns without PyTorch
from mlx_lm.tuner import dora

from mflux_vae.runtime.device import is_cpu
from mflux_vae_train.lora.linear import low_rank, scheme_of
from mflux_vae_train.lora.targets import dimensions


class DoRALinear(dora.DoRALinear):
    """mlx-lm's layer. On a GPU or over quantised weights it computes m / |W'| (W x + s B A x) + b, W' = W + s B A, as

        f (layer(x) + s B A x) + (1 - f) b,    f = m / |W'|,    layer(x) = W x + b

    so that no layer's W is kept in full width until the backward pass, and (on a GPU) no x in float32.

    Attributes:
        strength: see `layers.scaled`.
    """

    strength = 1.0

    @staticmethod
    def from_base(linear: nn.Linear, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> DoRALinear:
        outputs, inputs = dimensions(linear)
        layer = DoRALinear(inputs, outputs, r=r, dropout=dropout, scale=scale)
        layer.set_linear(linear)
        return layer

    def __call__(self, x: mx.array) -> mx.array:
        y = self._whole(x)
        if self.strength == 1:
            return y
        base = self.linear(x)
        return base + self.strength * (y - base)

    def _whole(self, x: mx.array) -> mx.array:
        """The output at strength 1."""
        if is_cpu() and not self._is_quantized():
            y: mx.array = super().__call__(x)
            return y
        z = low_rank(self, self.dropout(x))
        factor = (self.m / self._norms(x)).astype(x.dtype)
        y = factor * (self.linear(x) + (self.scale * z).astype(x.dtype))
        return y + (1 - factor) * self.linear.bias if "bias" in self.linear else y

    def _norms(self, x: mx.array) -> mx.array:
        """|W'| of each row, without a gradient (arXiv:2402.09353, section 4.3)."""
        linear = self.linear
        (weight,) = mx.depends([linear.weight], [x])  # not before: all layers' weights would be there together
        if scheme := scheme_of(linear):
            weight = mx.dequantize(weight, linear.scales, linear.biases, **scheme)
        return mx.stop_gradient(mx.linalg.norm(weight + (self.scale * self.lora_b.T) @ self.lora_a.T, axis=1))
