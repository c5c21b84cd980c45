"""Weights of 4 or 8 bits: quantize linear layers, and load weights that are stored quantized.

The scheme is MLX's affine one (`mx.quantize`): a group of inputs shares a scale and a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.kernels import product_choice, quantized_product
from mflux_vae.networks.layers import Linear
from mflux_vae.utils.modules import replace_layers

GROUP_SIZES = (64, 32)
"""Inputs per scale: the first of these that divides the number of inputs."""

_STORED_BITS = (2, 3, 4, 5, 6, 8)
_STORED_GROUPS = (32, 64, 128)
"""Schemes that are read from files; `--quantize` offers 4 and 8 bits."""


class QuantizedLinear(nn.QuantizedLinear):
    """MLX's layer, which dequantizes the weights for products with many rows: see `kernels.quantized`."""

    def __call__(self, x: mx.array) -> mx.array:
        scheme = {"group_size": self.group_size, "bits": self.bits}
        return quantized_product(x, self.weight, self.scales, self["biases"], self.get("bias"), **scheme)


def group_size(inputs: int) -> int | None:
    """Group size of a layer; None if it cannot be quantized."""
    return next((size for size in GROUP_SIZES if inputs % size == 0), None)


def quantize(module: nn.Module, bits: int, selects: Callable[[str], bool]) -> None:
    """Replace linear layers by quantized ones, one at a time: at most one layer exists in both forms.

    Args:
        bits: 4 or 8.
        selects: whether to quantize the layer at a path. Layers whose inputs no group size divides are kept.

    Raises:
        SettingsError: the environment variable that chooses the products has an unknown value.
    """
    _check_choice()
    paths = [path for path, layer in module.named_modules() if selects(path) and _group_size_of(layer) is not None]
    replace_layers(module, paths, partial(_quantized, bits=bits))


def _check_choice() -> None:
    try:
        product_choice()
    except ValueError as error:
        raise SettingsError(str(error)) from None


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
    """Group size of a plain linear layer; None for other layers."""
    return group_size(layer.weight.shape[1]) if type(layer) in (nn.Linear, Linear) else None


def adopt_quantization(
    module: nn.Module,
    tensors: Mapping[str, mx.array],
    source: str,
    *,
    keep: bool = True,
    embeddings: Collection[str] = (),
) -> dict[str, mx.array]:
    """Prepare a module for the tensors of a file, of which any may be quantized.

    Args:
        source: for messages.
        keep: replace the module's linear layers by quantized ones; False dequantizes their weights instead.
        embeddings: paths of embeddings to replace by quantized ones, too.

    Returns:
        the tensors for `load_strict`. Quantized weights of other layers are dequantized.

    Raises:
        WeightsError: scales that do not fit the layer, or another scheme than MLX's affine one.
        SettingsError: see `quantize`.
    """
    _check_choice()
    ready = dict(tensors)
    layers = dict(module.named_modules())
    for key, scales in tensors.items():
        path, _, kind = key.rpartition(".")
        if kind != "scales" or path not in layers:
            continue
        layer: Any = layers[path]
        weight, biases = tensors.get(f"{path}.weight"), tensors.get(f"{path}.biases")
        if weight is None or biases is None:
            raise WeightsError(f"{source}: {path} has scales, and no weight or no biases; affine quantization is read")
        bits, size = _scheme(layer.weight.shape[-1], weight, scales, f"{source}: {path}")
        rows, columns = layer.weight.shape[0], layer.weight.shape[-1]
        if path in embeddings:
            module.update_modules(tree_unflatten([(path, nn.QuantizedEmbedding(rows, columns, size, bits))]))
        elif keep and isinstance(layer, nn.Linear):
            smaller = QuantizedLinear(columns, rows, "bias" in layer, group_size=size, bits=bits)
            module.update_modules(tree_unflatten([(path, smaller)]))
        else:
            del ready[key], ready[f"{path}.biases"]
            ready[f"{path}.weight"] = mx.dequantize(weight, scales, biases, group_size=size, bits=bits)
    return ready


def _scheme(inputs: int, weight: mx.array, scales: mx.array, where: str) -> tuple[int, int]:
    """Bits and group size, which follow from the shapes."""
    bits, size = weight.shape[-1] * 32 / inputs, inputs / scales.shape[-1]
    if bits not in _STORED_BITS or size not in _STORED_GROUPS or weight.dtype != mx.uint32:
        raise WeightsError(
            f"{where}: its shapes {weight.shape} and {scales.shape} do not fit a layer of {inputs} inputs"
        )
    return int(bits), int(size)


def stored_bytes(module: nn.Module, width: int, bits: int | None = None, selects: Callable[[str], bool] = bool) -> int:
    """Bytes of a module's weights, also as `quantize` would leave them; nothing is computed.

    Args:
        width: bytes of a number that is not quantized.
        bits: None for no quantization.
    """
    total = 0
    for path, layer in module.named_modules():
        arrays = [value for value in layer.values() if isinstance(value, mx.array)]
        size = _group_size_of(layer)
        if bits is None or size is None or not selects(path):
            total += sum(value.size * (width if mx.issubdtype(value.dtype, mx.floating) else 4) for value in arrays)
        else:
            packed = layer.weight.size * bits // 8 + 2 * width * layer.weight.size // size
            total += packed + sum(value.size * width for value in arrays if value.ndim == 1)
    return total
