"""Weights of 4 or 8 bits: modules built for what a file holds, and quantised while they are loaded.

The scheme is MLX's (`mx.quantize`, affine): groups of inputs share a scale and a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mflux_vae.errors import WeightsError
from mflux_vae.runtime import device
from mflux_vae.utils.modules import replace_layers

GROUP_SIZES = (64, 32)
"""Inputs that share a scale: the first of these that divides a layer's inputs."""

_STORED_BITS = (2, 3, 4, 5, 6, 8)
_STORED_GROUPS = (32, 64, 128)
"""What files may hold; `--quantize` offers 4 and 8 bits."""


class QuantizedLinear(nn.QuantizedLinear):
    """MLX's. On a CPU, whose own product of quantised matrices is slow, weights are widened for each product anew."""

    def __call__(self, x: mx.array) -> mx.array:
        if not device.is_cpu():
            return super().__call__(x)
        y = self._product(x)
        return y + self["bias"] if "bias" in self else y

    def _product(self, x: mx.array) -> mx.array:
        def widened(needed_for: mx.array) -> mx.array:
            (packed,) = mx.depends([self.weight], [needed_for])  # not before: all layers' weights would lie there
            return mx.dequantize(packed, self.scales, self.biases, group_size=self.group_size, bits=self.bits)

        run: Any = mx.custom_function(lambda x: x @ widened(x).T)

        @run.vjp
        def slope(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
            return cotangent @ widened(cotangent)

        return run(x)


def group_size(inputs: int) -> int | None:
    """Of a layer with so many inputs; None where it cannot be quantised."""
    return next((size for size in GROUP_SIZES if inputs % size == 0), None)


def quantize(module: nn.Module, bits: int, wanted: Callable[[str], bool]) -> None:
    """Replace linear layers by quantised ones, one after the other: no more than one is held in both forms.

    Args:
        bits: 4 or 8.
        wanted: which of them, by their path. Those whose inputs no group size divides stay.
    """
    paths = [path for path, layer in module.named_modules() if wanted(path) and _group_size_of(layer) is not None]
    replace_layers(module, paths, partial(_quantized, bits=bits))


def _quantized(layer: nn.Linear, bits: int) -> QuantizedLinear:
    outputs, inputs = layer.weight.shape
    size = group_size(inputs)
    assert size is not None
    smaller = QuantizedLinear(inputs, outputs, "bias" in layer, group_size=size, bits=bits)
    smaller.weight, smaller.scales, smaller.biases = mx.quantize(layer.weight, size, bits)
    if "bias" in layer:
        smaller.bias = layer.bias
    return smaller


def _group_size_of(layer: nn.Module) -> int | None:
    """Group size of a plain linear layer; None where it cannot be quantised."""
    return group_size(layer.weight.shape[1]) if type(layer) is nn.Linear else None


def prepared(module: nn.Module, tensors: Mapping[str, mx.array], where: str) -> dict[str, mx.array]:
    """Make a module's linear layers what a file holds, as it can hold some or all quantised.

    Returns:
        the tensors for `load_strict`. What is quantised and no linear layer, such as an embedding, is widened.

    Raises:
        WeightsError: scales that do not fit the layer, or another scheme than MLX's affine one.
    """
    return _prepared(module, tensors, where, keep=True)


def widened(module: nn.Module, tensors: Mapping[str, mx.array], where: str) -> dict[str, mx.array]:
    """As `prepared`, with every layer widened: the module stays as it is."""
    return _prepared(module, tensors, where, keep=False)


def _prepared(module: nn.Module, tensors: Mapping[str, mx.array], where: str, *, keep: bool) -> dict[str, mx.array]:
    ready = dict(tensors)
    layers = dict(module.named_modules())
    for key, scales in tensors.items():
        path, _, kind = key.rpartition(".")
        if kind != "scales" or path not in layers:
            continue
        layer: Any = layers[path]
        weight, biases = tensors.get(f"{path}.weight"), tensors.get(f"{path}.biases")
        if weight is None or biases is None:
            raise WeightsError(f"{where}: {path} has scales, and no weight or no biases; affine quantisation is read")
        bits, size = _scheme(layer, weight, scales, f"{where}: {path}")
        if keep and isinstance(layer, nn.Linear):
            outputs, inputs = layer.weight.shape
            smaller = QuantizedLinear(inputs, outputs, "bias" in layer, group_size=size, bits=bits)
            module.update_modules(tree_unflatten([(path, smaller)]))
        else:
            del ready[key], ready[f"{path}.biases"]
            ready[f"{path}.weight"] = mx.dequantize(weight, scales, biases, group_size=size, bits=bits)
    return ready


def _scheme(layer: Any, weight: mx.array, scales: mx.array, where: str) -> tuple[int, int]:
    """Bits and group size, which a file need not say: they follow from its shapes."""
    inputs = layer.weight.shape[-1]
    bits, size = weight.shape[-1] * 32 / inputs, inputs / scales.shape[-1]
    if bits not in _STORED_BITS or size not in _STORED_GROUPS or weight.dtype != mx.uint32:
        raise WeightsError(
            f"{where}: its shapes {weight.shape} and {scales.shape} do not fit a layer of {inputs} inputs"
        )
    return int(bits), int(size)


def stored_bytes(module: nn.Module, width: int, bits: int | None = None, wanted: Callable[[str], bool] = bool) -> int:
    """What a module's weights take, with those layers quantised that `quantize` would take; nothing is computed.

    Args:
        width: bytes of a number that is not quantised.
        bits: None for no quantisation.
    """
    total = 0
    for path, layer in module.named_modules():
        own = [value for value in layer.values() if isinstance(value, mx.array)]
        size = _group_size_of(layer)
        if bits is None or size is None or not wanted(path):
            total += sum(value.size * (width if mx.issubdtype(value.dtype, mx.floating) else 4) for value in own)
        else:
            packed = layer.weight.size * bits // 8 + 2 * width * layer.weight.size // size
            total += packed + sum(value.size * width for value in own if value.ndim == 1)
    return total
