"""Weights that are stored as 8-bit floats times a scale, as ComfyUI writes them.

    scaled_fp8 (an empty tensor)     {layer}.weight  {layer}.scale_weight  {layer}.scale_input
    {layer}.comfy_quant (JSON)       {layer}.weight  {layer}.weight_scale  {layer}.input_scale

The scale is one number, or one per row of the weight. Scales of inputs serve computing in 8 bits and are dropped.
Other schemes are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from math import prod

import mlx.core as mx
import numpy as np

from mflux_vae.errors import WeightsError
from mflux_vae.utils.formatting import first_few
from mflux_vae.weights.formats.lazy_tensor import FP8, LazyTensor

_MARKER, _FORMAT, _METADATA = "scaled_fp8", "comfy_quant", "_quantization_metadata"
_SCALES, _INPUT_SCALES = ("scale_weight", "weight_scale"), ("scale_input", "input_scale")
_READ = ("float8_e4m3fn", "float8_e5m2")
"""Formats that `comfy_quant` and the metadata may name."""

_LONGEST = 10_000

_SCHEMES = {
    ".weight_scale_inv": "fp8 with a scale per block",
    ".weight_scale_2": "NVFP4",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight._data": "quanto",
    ".qweight": "GPTQ or AWQ",
}
"""Ends of keys -> the scheme they belong to."""


def unscaled(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str], where: str) -> dict[str, LazyTensor]:
    """The tensors of a file, or of all shards, with scales multiplied in.

    Args:
        where: file, for messages.

    Raises:
        WeightsError: the weights are quantized in another way.
    """
    for key in tensors:
        if scheme := next((name for end, name in _SCHEMES.items() if key.endswith(end)), None):
            raise _unsupported(where, f"{first_few([key])} belongs to a file quantized with {scheme}")
    marked = any(key.rpartition(".")[2] == _MARKER for key in tensors)
    formats = _stored_formats(metadata, where)
    found = dict(tensors)
    for key, stored in tensors.items():
        layer, _, kind = key.rpartition(".")
        weight = tensors.get(f"{layer}.weight")
        if kind == _FORMAT:
            formats[layer] = _format(stored)
        elif kind != _MARKER and (
            kind not in (*_SCALES, *_INPUT_SCALES) or weight is None or not (marked or weight.dtype in FP8)
        ):
            continue
        del found[key]
        if kind in _SCALES and weight is not None:
            count = prod(stored.shape)
            if count != 1 and (count, stored.shape[:1]) != (weight.shape[0], weight.shape[:1]):
                raise _unsupported(where, f"{first_few([key])} of shape {stored.shape} scales blocks of a weight")
            found[f"{layer}.weight"] = replace(weight, load=partial(_product, weight, stored))
    for layer, name in formats.items():
        if name not in _READ and f"{layer}.weight" in tensors:
            raise _unsupported(where, f"{first_few([layer])} is quantized as {str(name)[:40]!r}")
    return found


def _product(weight: LazyTensor, scale: LazyTensor) -> mx.array:
    rows = prod(scale.shape)
    factor = scale.load().astype(mx.float32).reshape(rows, *[1] * (len(weight.shape) - 1)) if rows > 1 else None
    return weight.load().astype(mx.float32) * (scale.load().reshape(()) if factor is None else factor)


def _stored_formats(metadata: Mapping[str, str], where: str) -> dict[str, object]:
    """Format by layer, as the file's metadata gives it."""
    try:
        layers = json.loads(metadata.get(_METADATA, "{}")).get("layers", {})
        return {layer: description["format"] for layer, description in layers.items()}
    except (ValueError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise _unsupported(where, f"{_METADATA} cannot be read ({type(error).__name__})") from error


def _format(stored: LazyTensor) -> object:
    """Format in a `comfy_quant` tensor; None if it cannot be read."""
    if stored.dtype != "uint8" or prod(stored.shape) > _LONGEST:
        return None
    try:
        return json.loads(np.array(stored.load()).tobytes())["format"]
    except (ValueError, RecursionError, TypeError, KeyError):
        return None


def _unsupported(where: str, what: str) -> WeightsError:
    return WeightsError(f"{where}: {what}, which is not supported; take a file with 16-bit weights, or save it so")
