"""An adapter in memory, read from a file of any spelling, with or without its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import mlx.core as mx

from mflux_vae.errors import WeightsError
from mflux_vae.weights.formats.files import open_weights
from mflux_vae.weights.formats.lazy_tensor import check_numbers
from mflux_vae_train.lora.editing.model import Model
from mflux_vae_train.lora.from_checkpoint import is_checkpoint
from mflux_vae_train.lora.layers import LayerChange
from mflux_vae_train.lora.reading import read_adapter, read_by_names

Naming: TypeAlias = Literal["peft", "kohya", "other"]

Changes: TypeAlias = Mapping[str, Mapping[str, LayerChange]]
"""By prefix of the network and path of the layer; by "" and the file's names, where these do not name networks."""


@dataclass(frozen=True, kw_only=True)
class AdapterFile:
    """
    Attributes:
        name: of the file, without folders.
        changes: what it changes.
        naming: of the layers: paths in networks as in PEFT's files, kohya's, or other names of the file.
        targets: PEFT's `target_modules` by prefix, where the file lists them.
        dtype: of its tensors; float32 if they differ.
        metadata: of the file.
        unstated: number of layers whose alpha the file does not state; the rank is assumed.
    """

    name: str
    changes: Changes
    naming: Naming
    targets: Mapping[str, Sequence[str]]
    dtype: mx.Dtype
    metadata: Mapping[str, str]
    unstated: int

    def layers(self) -> Iterator[tuple[str, LayerChange]]:
        """Yield all layers, by name with the prefix."""
        for prefix, changes in self.changes.items():
            for path, change in changes.items():
                yield (f"{prefix}.{path}" if prefix else path), change

    @property
    def dora(self) -> bool:
        return any(change.magnitudes is not None for _, change in self.layers())


def open_adapter(path: Path, model: Model | None = None, name: str = "") -> AdapterFile:
    """Read an adapter.

    Args:
        model: find the layers in it; None to take the names in the file.
        name: of the adapter; "" for that of the file.

    Raises:
        WeightsError: see `read_adapter` and `read_by_names`; or values that are not finite.
    """
    read = read_by_names(path) if model is None else read_adapter(path, model.networks, model.names)
    for one in read.values():
        check_numbers(one.tensors, str(path), "an adapter's values")
    changes = {prefix: one.changes for prefix, one in read.items()}
    dtypes = {tensor.dtype for one in read.values() for tensor in one.tensors.values()}
    return AdapterFile(
        name=name or path.name,
        changes=changes,
        naming=_naming(path, changes) if model is None else "peft",
        targets={prefix: one.targets for prefix, one in read.items() if one.targets},
        dtype=dtypes.pop() if len(dtypes) == 1 else mx.float32,
        metadata={} if is_checkpoint(path) else open_weights(path)[1],
        unstated=sum(one.unstated for one in read.values()),
    )


def _naming(path: Path, changes: Changes) -> Naming:
    if is_checkpoint(path):  # which names no network if it has one alone
        return "other"
    if "" not in changes:
        return "peft"
    return "other" if len(changes) > 1 or any("." in name for name in changes[""]) else "kohya"


def refuse_dora(adapter: AdapterFile, what: str) -> None:
    """
    Raises:
        WeightsError: the adapter has magnitudes.
    """
    if adapter.dora:
        raise WeightsError(
            f"{adapter.name}: is a DoRA adapter, which {what}: its magnitudes fix the norm of each row of the changed"
            " weights, so that its effect is not proportional to a factor; fuse it into a model, and extract that"
        )
