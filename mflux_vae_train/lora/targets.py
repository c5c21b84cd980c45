"""The layers to adapt: patterns over the paths of linear layers and convolutions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae.networks.layers import Conv2d
from mflux_vae.utils.formatting import first_few

ALL_LAYERS = "all"


def patterns_of(choice: str, presets: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """Patterns of a preset, of `ALL_LAYERS`, or of a comma-separated list of patterns and names.

    A name such as ``to_q`` or ``attn.to_q`` matches each layer whose path equals it or ends with it, as in PEFT.

    Raises:
        SettingsError: the list is empty.
    """
    if choice == ALL_LAYERS:
        return ("*",)
    if choice in presets:
        return presets[choice]
    names = [name for part in choice.split(",") if (name := part.strip())]
    if not names:
        known = ", ".join([*presets, ALL_LAYERS])
        raise SettingsError(f"--lora_layers is {choice!r}; expected {known}, or names and patterns separated by commas")
    return [pattern for name in names for pattern in ([name] if "*" in name else [name, f"*.{name}"])]


def matching(module: nn.Module, patterns: Sequence[str]) -> dict[str, int]:
    """Sorted paths of the layers that match a pattern -> inputs + outputs: adapter weights per rank.

    The pattern "*" stands for all linear layers; others match convolutions, too.

    Raises:
        SettingsError: none matches; names some existing layers.
    """
    layers = linears(module)
    matched = sorted(path for path, layer in layers.items() if matches(path, layer, patterns))
    if not matched:
        some = first_few(sorted(layers), 4, 50) or "none"
        raise SettingsError(f"no linear layer matches {first_few(patterns, 4, 50)}; the module has {some}")
    return {path: sum(dimensions(layers[path])) for path in matched}


def matches(path: str, layer: Any, patterns: Sequence[str]) -> bool:
    """Whether one of the patterns selects a layer, see `matching`."""
    kept = [pattern for pattern in patterns if not (pattern == "*" and isinstance(layer, Conv2d))]
    return any(fnmatchcase(path, pattern) for pattern in kept)


def linears(module: nn.Module) -> dict[str, Any]:
    """Layers that can be adapted, by path: linear ones, plain and quantized, and convolutions."""
    kinds = nn.Linear, nn.QuantizedLinear, Conv2d
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, kinds)}


def dimensions(layer: Any) -> tuple[int, int]:
    """(outputs, inputs) of a layer; inputs of a convolution are the numbers in its window."""
    outputs, inputs = layer.weight.shape[0], math.prod(layer.weight.shape[1:])
    return outputs, inputs * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else inputs


def kernel_of(layer: Any) -> tuple[int, int] | None:
    """(kh, kw) of a convolution; None for a linear layer."""
    return tuple(layer.weight.shape[1:3]) if layer.weight.ndim == 4 else None
