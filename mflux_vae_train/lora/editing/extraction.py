"""An adapter from the difference of two models, read layer by layer: one layer of each is in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.runtime.threads import exclusive
from mflux_vae.utils.formatting import first_few
from mflux_vae_train.lora.editing.adapter import Changes
from mflux_vae_train.lora.editing.low_rank import decompose
from mflux_vae_train.lora.layers import LayerChange
from mflux_vae_train.lora.reading import Networks
from mflux_vae_train.lora.targets import kernel_of, linears, matches


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """
    Attributes:
        changes: of the layers that differ.
        kept: share of the squared norm of the difference that the rank holds, by layer.
        kept_in_all: the same of these layers together.
        rounded: names of parameters that are equal after rounding to half precision, and are not adapted: one model is
            stored in another dtype.
        left_out: norm of the difference relative to that of the base, by name of each parameter that differs and is
            not adapted.
    """

    changes: Changes
    kept: Mapping[str, float]
    kept_in_all: float
    rounded: Sequence[str]
    left_out: Mapping[str, float]


def extract(
    base: Networks,
    tuned: Networks,
    rank: int,
    *,
    patterns: Sequence[str] | None = None,
    progress: Callable[[Sequence[str]], Iterator[str]] = iter,
) -> Extracted:
    """The difference of networks as an adapter of a rank with scale 1. The networks lose their weights.

    Args:
        base, tuned: by prefix, in float32, with weights that are not loaded yet if they are large.
        patterns: of the layers to adapt, see `matching`; None for all linear layers and convolutions.
        progress: shows progress over the names of parameters.

    Raises:
        SettingsError: quantized networks, networks of different shapes, or no layer that differs.
        WeightsError: values that are not finite.
    """
    kernels = _layers(base, patterns)
    ours, theirs = _taken(base), _taken(tuned)
    _check_shapes(ours, theirs)
    changes: dict[str, dict[str, LayerChange]] = {prefix: {} for prefix in base}
    kept: dict[str, float] = {}
    left_out: dict[str, float] = {}
    rounded: list[str] = []
    energies = [0.0, 0.0]
    for name in progress(sorted(ours)):
        before, after = _values(ours.pop(name), f"base: {name}"), _values(theirs.pop(name), f"tuned: {name}")
        if np.array_equal(before, after):
            continue
        if _is_rounded(before, after) or _is_rounded(after, before):
            rounded.append(name)
            continue
        difference = after - before
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in kernels:
            prefix, _, path = layer.partition(".")
            found = decompose(difference.reshape(len(difference), -1), rank, kernels[layer])
            changes[prefix][path], kept[layer] = found.change, found.kept / found.total
            energies = [energies[0] + found.kept, energies[1] + found.total]
        else:
            norm = float(np.linalg.norm(before))
            left_out[name] = float(np.linalg.norm(difference)) / norm if norm else math.inf
    if not kept:
        others = [*left_out, *rounded]
        reason = f"only {first_few(others, 3, 60)} differ" if others else "they are equal"
        raise SettingsError(f"the models differ in no layer that an adapter changes: {reason}")
    return Extracted(
        changes={prefix: layers for prefix, layers in changes.items() if layers},
        kept=kept,
        kept_in_all=energies[0] / energies[1],
        rounded=rounded,
        left_out=left_out,
    )


def _layers(networks: Networks, patterns: Sequence[str] | None) -> dict[str, tuple[int, int] | None]:
    """Layers to adapt: kernel by name; None for linear ones."""
    layers = {
        f"{prefix}.{path}": kernel_of(layer)
        for prefix, module in networks.items()
        for path, layer in linears(module).items()
        if patterns is None or matches(path, layer, patterns)
    }
    if not layers:
        raise SettingsError(f"--layers: no layer matches {first_few(list(patterns or ()), 4, 50)}")
    return layers


def _taken(networks: Networks) -> dict[str, mx.array]:
    """The parameters by name; the networks keep none of them, so that each can be freed."""
    parameters: dict[str, mx.array] = {}
    for prefix, module in networks.items():
        if any(isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding) for layer in module.modules()):
            raise SettingsError(f"{prefix} is quantized, and rounding is part of its weights; give the full weights")
        values: Any = module.parameters()
        flat: dict[str, mx.array] = dict(tree_flatten(values))
        parameters |= {f"{prefix}.{name}": array for name, array in flat.items()}
        module.update(tree_map(lambda _: mx.zeros(()), values))
    return parameters


def _check_shapes(base: Mapping[str, mx.array], tuned: Mapping[str, mx.array]) -> None:
    if unlike := sorted(name for name in base.keys() | tuned.keys() if _shape(base, name) != _shape(tuned, name)):
        name = unlike[0]
        raise SettingsError(
            f"the models differ in the shapes of {len(unlike)} parameters, such as {name}: {_shape(base, name)} and"
            f" {_shape(tuned, name)}; give two versions of one model"
        )


def _shape(parameters: Mapping[str, mx.array], name: str) -> tuple[int, ...] | None:
    return tuple(parameters[name].shape) if name in parameters else None


def _values(array: mx.array, name: str) -> np.ndarray:
    """Values in float32; nothing else keeps them."""
    with exclusive():
        values = np.array(array.astype(mx.float32))
    del array
    mx.clear_cache()
    if not np.isfinite(values).all():
        raise WeightsError(f"{name} has values that are NaN or infinite; take another file")
    return values


def _is_rounded(values: np.ndarray, other: np.ndarray) -> bool:
    """Whether `other` is `values` in half precision."""
    array = mx.array(values)
    return any(
        np.array_equal(np.array(array.astype(dtype).astype(mx.float32)), other) for dtype in (mx.float16, mx.bfloat16)
    )
