"""The weighted sum of several adapters: exact with the sum of their ranks, or the nearest one of a lower rank."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae_train.lora.editing.adapter import AdapterFile, Changes, refuse_dora
from mflux_vae_train.lora.editing.resizing import scaled
from mflux_vae_train.lora.layers import LayerChange


def merged(adapters: Sequence[AdapterFile], weights: Sequence[float]) -> Changes:
    """The sum, weight times change, with scale 1. Layers, ranks and alphas may differ.

    Raises:
        SettingsError: not one weight for each adapter.
        WeightsError: an adapter has magnitudes, or one layer has different shapes.
    """
    if len(weights) != len(adapters):
        raise SettingsError(f"--weights has {len(weights)} numbers for {len(adapters)} adapters; give one for each")
    parts: dict[str, dict[str, list[LayerChange]]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        refuse_dora(adapter, "cannot be merged")
        for prefix, changes in scaled(adapter.changes, weight).items():
            for path, change in changes.items():
                others = parts.setdefault(prefix, {}).setdefault(path, [])
                if others and _shape(others[0]) != _shape(change):
                    raise WeightsError(
                        f"{adapter.name}: {path} is for a layer of shape {_shape(change)}, in {adapters[0].name} of"
                        f" {_shape(others[0])}; merge adapters of one model"
                    )
                others.append(change)
    return {prefix: {path: _joined(each) for path, each in changes.items()} for prefix, changes in parts.items()}


def _shape(change: LayerChange) -> tuple[int, ...]:
    return change.b.shape[0], change.a.shape[1], *(change.kernel or ())


def _joined(parts: Sequence[LayerChange]) -> LayerChange:
    a, b = mx.concatenate([one.a for one in parts]), mx.concatenate([one.b for one in parts], axis=1)
    return LayerChange(a=a, b=b, scale=1.0, kernel=parts[0].kernel)


def merged_targets(adapters: Sequence[AdapterFile]) -> dict[str, list[str]]:
    """PEFT's `target_modules` of the sum by prefix, where all adapters of that network list theirs."""
    found = {}
    for prefix in {prefix for adapter in adapters for prefix in adapter.changes}:
        each = [adapter.targets.get(prefix) for adapter in adapters if prefix in adapter.changes]
        if None not in each:
            found[prefix] = sorted({name for names in each for name in names or ()})
    return found
