"""Write an edited adapter, in PEFT's or kohya's naming."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx

from mflux_vae.errors import SettingsError
from mflux_vae.utils.formatting import first_few
from mflux_vae.weights.formats.files import DTYPES, write_safetensors
from mflux_vae_train.lora.dialects import ALPHA
from mflux_vae_train.lora.editing.adapter import Changes, Naming
from mflux_vae_train.lora.editing.model import Model
from mflux_vae_train.lora.editing.resizing import scaled
from mflux_vae_train.lora.files import peft_config, peft_tensors, target_modules
from mflux_vae_train.lora.kohya import kohya_layers, unnamed
from mflux_vae_train.lora.layers import bases
from mflux_vae_train.lora.metadata import METADATA_KEY
from mflux_vae_train.lora.targets import dimensions

SUFFIX = ".safetensors"

EDIT = "adapter_edit"
"""Key of the metadata: the command, its options, and the names of what it read, as JSON."""


def check_target(target: Path, overwrite: bool) -> None:
    """
    Raises:
        SettingsError: it has another suffix, or exists.
    """
    if target.suffix != SUFFIX or target.is_dir():
        raise SettingsError(f"--output {target}: give the name of a file that ends in {SUFFIX}")
    if target.exists() and not overwrite:
        raise SettingsError(f"--output {target} exists; give --overwrite, or another name")


def write_adapter(
    target: Path,
    changes: Changes,
    *,
    naming: Naming,
    model: Model | None = None,
    targets: Mapping[str, Sequence[str]] | None = None,
    dtype: str | None = None,
    given: mx.Dtype = mx.float32,
    metadata: Mapping[str, str] | None = None,
) -> str:
    """Write an adapter; the file is written whole or not at all.

    Args:
        naming: of the file. Names that are neither PEFT's nor kohya's are written with PEFT's ends and scale 1.
        model: whose layers `changes` are for; needed for kohya's naming, unless they have it already.
        targets: PEFT's `target_modules` by prefix, without a model; paths where it is missing.
        dtype: of the tensors; None for `given` if it holds their values exactly, else float32.
        metadata: further metadata.

    Returns:
        dtype of the tensors.

    Raises:
        SettingsError: a layer has no name in kohya's naming, or a value is too large for the dtype.
    """
    if naming == "kohya":
        tensors, stated = _kohya(changes, model, target)
    else:
        tensors, stated = _peft(changes if naming == "peft" else scaled(changes, 1.0), naming, model, targets or {})
    tensors, name = _cast(tensors, dtype, given)
    write_safetensors(target, tensors, {**(metadata or {}), **stated})
    return name


def _peft(
    changes: Changes, naming: Naming, model: Model | None, targets: Mapping[str, Sequence[str]]
) -> tuple[dict[str, mx.array], dict[str, str]]:
    tensors: dict[str, mx.array] = {}
    config: dict[str, object] = {}
    for prefix, unordered in changes.items():
        of_network = dict(sorted(unordered.items()))
        tensors |= peft_tensors(of_network, prefix)
        paths = [*of_network]
        names = target_modules(model.networks[prefix], paths) if model is not None else targets.get(prefix, paths)
        config |= peft_config(of_network, prefix, names)
    return tensors, {METADATA_KEY: json.dumps(config, sort_keys=True)} if naming == "peft" else {}


def _kohya(changes: Changes, model: Model | None, target: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    tensors: dict[str, mx.array] = {}
    for prefix, of_network in changes.items():
        if model is None:
            tensors |= kohya_layers(of_network, {name: [name] for name in of_network}, {})
            continue
        modules = model.kohya.get(prefix, {})
        if without := unnamed(of_network, modules):
            raise SettingsError(
                f"{target}: kohya's naming has no names for {first_few(without, 4, 50)} of {model.name}"
            )
        outputs = {path: dimensions(layer)[0] for path, layer in bases(model.networks[prefix]).items()}
        tensors |= kohya_layers(of_network, modules, outputs)
    ranks = {change.rank for of_network in changes.values() for change in of_network.values()}
    rank = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"  # as kohya's scripts do
    return tensors, {"ss_network_dim": rank, "ss_network_alpha": rank}


def _cast(tensors: Mapping[str, mx.array], dtype: str | None, given: mx.Dtype) -> tuple[dict[str, mx.array], str]:
    """Tensors in a dtype, without alphas, which stay float32; and its name."""
    matrices = {key: tensor for key, tensor in tensors.items() if not key.endswith(ALPHA)}
    name = dtype or next((name for name, one in DTYPES.items() if one == given), "float32")
    if dtype is None and not all(_equal(tensor.astype(DTYPES[name]), tensor) for tensor in matrices.values()):
        name = "float32"
    cast = {key: tensor.astype(DTYPES[name]) for key, tensor in matrices.items()}
    if not all(mx.all(mx.isfinite(tensor)) for tensor in cast.values()):
        raise SettingsError(f"--dtype {name}: values are too large for it; give --dtype float32")
    return {**tensors, **cast}, name


def _equal(one: mx.array, other: mx.array) -> bool:
    return bool(mx.array_equal(one.astype(mx.float32), other.astype(mx.float32)))
