"""Which layers an adapter is for: patterns over the paths of linear layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import mlx.nn as nn

from mflux_vae.errors import SettingsError

ALL_LAYERS = "all"


def patterns_of(choice: str, presets: Mapping[str, Sequence[str]]) -> Sequence[str]:
    """A preset's patterns, those of `ALL_LAYERS`, or a comma-separated list of patterns and names.

    A name such as ``to_q`` or ``attn.to_q`` means every layer whose path is that or ends in it, as in PEFT.

    Raises:
        SettingsError: nothing in the list.
    """
    if choice == ALL_LAYERS:
        return ("*",)
    if choice in presets:
        return presets[choice]
    names = [name for part in choice.split(",") if (name := part.strip())]
    if not names:
        known = ", ".join([*presets, ALL_LAYERS])
        raise SettingsError(f"--lora_layers is {choice!r}; {known}, or names and patterns with commas between")
    return [pattern for name in names for pattern in ([name] if "*" in name else [name, f"*.{name}"])]


def matching(module: nn.Module, patterns: Sequence[str]) -> dict[str, int]:
    """Paths of the linear layers that match a pattern, sorted, each with (inputs + outputs): weights per rank.

    Raises:
        SettingsError: none matches; some that are there are named.
    """
    found = linears(module)
    matched = sorted(path for path in found if any(fnmatchcase(path, pattern) for pattern in patterns))
    if not matched:
        some = ", ".join(sorted(found)[:8]) or "none at all"
        raise SettingsError(f"no linear layer matches {', '.join(patterns)}; the module has {some}")
    return {path: sum(dimensions(found[path])) for path in matched}


def linears(module: nn.Module) -> dict[str, Any]:
    """Linear layers, plain and quantised, by path."""
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, (nn.Linear, nn.QuantizedLinear))}


def dimensions(layer: Any) -> tuple[int, int]:
    """(outputs, inputs) of a plain or quantised linear layer."""
    outputs, inputs = layer.weight.shape
    return outputs, inputs * 32 // layer.bits if isinstance(layer, nn.QuantizedLinear) else inputs
