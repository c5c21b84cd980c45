"""Adapters in the naming of kohya's scripts, which ComfyUI and others read.

One layer of the original network may correspond to several layers here, such as queries, keys and values with one
projection. Its adapter then combines theirs: A stacked, B block diagonal. Adapters trained on the single layer can be
read, too: its parts then share A.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae_train.lora.layers import is_dora, layers
from mflux_vae_train.lora.targets import dimensions, linears

Modules = Mapping[str, Sequence[str]]
"""Name of a layer of the original network -> paths of its parts here, in the order of its outputs."""

_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"

RANK = "ss_network_dim"
"""Metadata key: the rank of a layer's adapter."""


def check_kohya(paths: Sequence[str], modules: Modules) -> None:
    """Check that all layers have a name in kohya's naming.

    Raises:
        SettingsError: names the layers that have none.
    """
    known = {member for members in modules.values() for member in members}
    if without := [path for path in paths if path not in known]:
        some = ", ".join(without[:4]) + (f" and {len(without) - 4} more" if len(without) > 4 else "")
        raise SettingsError(f"--output_kohya_format has no names for {some}; use fewer --lora_layers")


def kohya_tensors(module: nn.Module, modules: Modules) -> dict[str, mx.array]:
    """``{name}.lora_down.weight`` (rank, in), ``.lora_up.weight`` (out, rank) and ``.alpha``, equal to the rank.

    The scale is multiplied into the weights, as some readers ignore the alpha of some layers.

    Raises:
        SettingsError: see `check_kohya`; or there are DoRA magnitudes, which the format cannot store.
    """
    adapted, bases = layers(module), linears(module)
    check_kohya(list(adapted), modules)
    if any(map(is_dora, adapted.values())):
        raise SettingsError("--output_kohya_format cannot store the magnitudes of --use_dora")
    tensors = {}
    for name, members in modules.items():
        present = [path for path in members if path in adapted]
        if not present:
            continue
        down = mx.concatenate([adapted[path].lora_a.T for path in present])
        rows, offset = [], 0
        for path in members:
            layer = adapted.get(path)
            outputs, _ = dimensions(bases[path] if layer is None else layer.linear)
            up = mx.zeros((outputs, 0)) if layer is None else layer.scale * layer.lora_b.T
            rows.append(mx.pad(up, [(0, 0), (offset, down.shape[0] - offset - up.shape[1])]))
            offset += up.shape[1]
        tensors[f"{name}{_DOWN}"] = down
        tensors[f"{name}{_UP}"] = mx.concatenate(rows)
        tensors[f"{name}{_ALPHA}"] = mx.array(float(down.shape[0]))
    return tensors


def is_kohya(tensors: Mapping[str, mx.array]) -> bool:
    """Whether the keys of a file are in kohya's naming."""
    return any(key.endswith(_DOWN) for key in tensors)


def from_kohya(
    tensors: Mapping[str, mx.array],
    metadata: Mapping[str, str],
    networks: Mapping[str, nn.Module],
    names: Mapping[str, Modules],
    where: str,
) -> tuple[dict[str, mx.array], dict[str, object]]:
    """The inverse of `kohya_tensors`: (tensors, configuration) in PEFT's naming, for all networks of a file.

    Args:
        networks, names: by the prefix of PEFT's keys.

    Raises:
        WeightsError: unknown, incomplete or misshapen layers, all listed; or scales that differ.
    """
    known = {name: (prefix, members) for prefix, modules in names.items() for name, members in modules.items()}
    present = {key.removesuffix(end) for key in tensors for end in (_DOWN, _UP, _ALPHA) if key.endswith(end)}
    layers_of = {name: _Layer.of(name, tensors) for name in known if name in present}
    faults = [f"unknown {key}" for key in tensors if not key.endswith((_DOWN, _UP, _ALPHA))]
    faults += [f"unknown {name}" for name in present - known.keys()]
    faults += [f"{name} is not an adapter: {layer}" for name, layer in layers_of.items() if isinstance(layer, str)]
    faults += [
        f"{name} belongs to {known[name][0]}, which is not adapted"
        for name in layers_of
        if known[name][0] not in networks
    ]
    if faults:
        raise WeightsError(f"{where}: does not fit this model: " + "; ".join(sorted(faults)))

    found: dict[str, mx.array] = {}
    scales: dict[str, set[float]] = {}
    bases = {prefix: linears(module) for prefix, module in networks.items()}
    adapters = [layer for layer in layers_of.values() if isinstance(layer, _Layer)]
    rank = min((layer.rank for layer in adapters), key=lambda one: (str(one) != metadata.get(RANK), one))
    for name, layer in zip(layers_of, adapters, strict=True):
        prefix, members = known[name]
        scales.setdefault(prefix, set()).add(layer.scale)
        try:
            parts = layer.split([dimensions(bases[prefix][path])[0] for path in members], rank)
        except ValueError as error:
            raise WeightsError(f"{where}: {name}: {error}") from error
        for path, part in zip(members, parts, strict=True):
            if part is not None:
                found[f"{prefix}.{path}.lora_A.weight"], found[f"{prefix}.{path}.lora_B.weight"] = part
    if differing := [prefix for prefix, values in scales.items() if len(values) > 1]:
        raise WeightsError(f"{where}: layers of {differing[0]} differ in alpha / rank; only equal ones are supported")
    return found, {f"{prefix}.lora_alpha": values.pop() * rank for prefix, values in scales.items()}


class _Layer(NamedTuple):
    """The adapter of one layer: A (rank, in), B (out, rank), and the scale of B A."""

    down: mx.array
    up: mx.array
    scale: float

    @classmethod
    def of(cls, name: str, tensors: Mapping[str, mx.array]) -> _Layer | str:
        """The adapter of this name in a file, or a text that says what is wrong with it."""
        down, up, alpha = (tensors.get(f"{name}{end}") for end in (_DOWN, _UP, _ALPHA))
        if down is None or up is None:
            return f"{_UP if up is None else _DOWN} is missing"
        if down.ndim != 2 or up.ndim != 2 or not down.shape[0] == up.shape[1] > 0:
            return f"its shapes are {tuple(down.shape)} and {tuple(up.shape)}"
        if alpha is not None and alpha.size != 1:
            return f"{_ALPHA} is {tuple(alpha.shape)}"
        return cls(down, up, 1.0 if alpha is None else float(np.array(alpha, np.float32).item()) / down.shape[0])

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def split(self, outputs: Sequence[int], rank: int) -> list[tuple[mx.array, mx.array] | None]:
        """(A, B) of each part of the layer; None for parts without an adapter.

        Args:
            outputs: number of outputs of each part.
            rank: of one part.

        Raises:
            ValueError: it is neither one adapter of this rank for all parts nor one for each part.
        """
        if self.up.shape[0] != sum(outputs):
            raise ValueError(f"{_UP[1:]} has {self.up.shape[0]} rows, expected {sum(outputs)}")
        rows = mx.split(self.up, list(accumulate(outputs))[:-1])
        if self.rank == rank:
            return [(self.down, part) for part in rows]
        count, rest = divmod(self.rank, rank)
        if rest or count > len(outputs):
            raise ValueError(f"its rank is {self.rank}, that of other layers {rank}")
        columns = [slice(rank * block, rank * (block + 1)) for block in range(count)]
        used = [[bool(mx.any(part[:, block])) for block in columns] for part in rows]
        # with as many blocks as parts the assignment is known, even for blocks of zeros
        owners = list(range(count)) if count == len(rows) else [i for i, blocks in enumerate(used) if any(blocks)]
        unique = len(owners) == count and not any(
            used[i][block] for i in range(len(rows)) for block in range(count) if owners[block] != i
        )
        if not unique:
            raise ValueError(f"it has {count} times the rank of other layers, but its blocks are not one for each part")
        parts: list[tuple[mx.array, mx.array] | None] = [None] * len(rows)
        for i, block in zip(owners, columns, strict=True):
            parts[i] = self.down[block], rows[i][:, block]
        return parts
