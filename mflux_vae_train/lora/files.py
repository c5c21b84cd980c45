"""Adapter files in PEFT's format, as diffusers loads them, for one network or several.

Keys are ``{prefix}.{path}.lora_A.weight`` (rank, in), ``.lora_B.weight`` (out, rank) and, with DoRA,
``.lora_magnitude_vector`` (out,); the prefix names the network. Alpha is in the metadata. Files in kohya's naming can
be read, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import WeightsError
from mflux_vae_train.lora.kohya import Modules, from_kohya, is_kohya
from mflux_vae_train.lora.layers import add_lora, is_dora, layers
from mflux_vae_train.lora.targets import dimensions, linears

METADATA_KEY = "lora_adapter_metadata"
_A, _B, _M = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"

Networks: TypeAlias = Mapping[str, nn.Module]
"""Networks by the prefix of their keys, such as "transformer"."""

Names: TypeAlias = Mapping[str, Modules]
"""Layers of each network in kohya's naming, by the same prefix."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The adapter of one network in a file.

    Attributes:
        tensors: by key without the prefix.
        dora: whether there are magnitudes.
    """

    tensors: Mapping[str, mx.array]
    rank: int
    alpha: float
    dora: bool


def adapter_tensors(module: nn.Module, prefix: str) -> dict[str, mx.array]:
    """Tensors of all adapted layers, by key."""
    tensors = {}
    for path, layer in layers(module).items():
        tensors[f"{prefix}.{path}{_A}"] = layer.lora_a.T
        tensors[f"{prefix}.{path}{_B}"] = layer.lora_b.T
        if is_dora(layer):
            tensors[f"{prefix}.{path}{_M}"] = layer.m
    return tensors


def adapter_config(module: nn.Module, prefix: str) -> dict[str, object]:
    """The PEFT configuration, with prefixed keys."""
    adapted = layers(module)
    if not adapted:
        raise ValueError(f"{prefix} has no adapters to save")
    first = next(iter(adapted.values()))
    rank = int(first.lora_a.shape[1])
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": first.dropout.p,
        "target_modules": _targets(module),
        "bias": "none",
        "use_dora": is_dora(first),
    }
    return {f"{prefix}.{key}": value for key, value in config.items()}


def _targets(module: nn.Module) -> list[str]:
    """Last components of the adapted layers' paths if they match no other module, otherwise the paths.

    PEFT matches names with the ends of paths, and versions of transformers differ in the prefix of CLIP's layers.
    """
    paths, names = list(layers(module)), {path.rpartition(".")[2] for path in layers(module)}
    matched = [path for path, _ in module.named_modules() if path.rpartition(".")[2] in names]
    unique = sorted(matched) == paths and not any(map(str.isdigit, names))
    return sorted(names) if unique else paths


def adapter_metadata(networks: Networks) -> dict[str, str]:
    """Metadata of the safetensors file: PEFT configurations as JSON."""
    config: dict[str, object] = {}
    for prefix, module in networks.items():
        config |= adapter_config(module, prefix)
    return {"format": "pt", METADATA_KEY: json.dumps(config, sort_keys=True)}


def save_adapter(networks: Networks, path: str | Path) -> None:
    """Write adapters as a safetensors file for PEFT and diffusers."""
    from mflux_vae.weights.formats.files import write_safetensors

    tensors: dict[str, mx.array] = {}
    for prefix, module in networks.items():
        tensors |= adapter_tensors(module, prefix)
    write_safetensors(path, tensors, adapter_metadata(networks))


def read_adapter(path: str | Path, networks: Networks, names: Names | None = None) -> dict[str, Adapter]:
    """The adapters of these networks in a file, by prefix; networks may be missing.

    Args:
        networks: only the paths and shapes of their layers are used.
        names: for files in kohya's naming; None if unknown.

    Raises:
        WeightsError: there is no adapter for any network, or one for another network; ranks or alphas differ between
            layers; or the metadata cannot be read.
    """
    from mflux_vae.weights.formats.files import read_safetensors

    tensors, metadata = read_safetensors(path)
    config = {} if is_kohya(tensors) else _config(metadata, path)
    if is_kohya(tensors):
        tensors, config = from_kohya(tensors, metadata, networks, names or {}, str(path))
    present = {prefix for prefix in networks if any(key.startswith(f"{prefix}.") for key in tensors)}
    if not present:
        prefixes = " or ".join(map(repr, networks))
        raise WeightsError(f"{path}: contains no adapter for {prefixes}: no key {next(iter(networks))}.*{_A}")
    if foreign := sorted({key.partition(".")[0] for key in tensors} - present):
        others = ", ".join(map(repr, foreign))
        raise WeightsError(f"{path}: also contains an adapter for {others}; expected only {' and '.join(networks)}")
    return {prefix: _adapter(prefix, tensors, config, path) for prefix in networks if prefix in present}


def check_adapter_fits(networks: Networks, path: str | Path, names: Names | None = None) -> dict[str, list[str]]:
    """Paths that a file adapts, by prefix. If a network already has adapters, the paths must be equal.

    Raises:
        WeightsError: missing, unknown or misshapen keys, all listed; or as `read_adapter`.
    """
    return _check(networks, read_adapter(path, networks, names), path)


def load_adapter(
    networks: Networks, path: str | Path, names: Names | None = None, *, dropout: float = 0.0, seed: int = 0
) -> dict[str, list[str]]:
    """Load a file into networks, with its rank and alpha; adds adapters to networks that have none.

    A network without adapters and without tensors in the file is not changed.

    Args:
        dropout, seed: for `add_lora`.

    Returns:
        adapted paths of each network in the file, by prefix.

    Raises:
        WeightsError: as `check_adapter_fits`.
    """
    files = read_adapter(path, networks, names)
    paths = _check(networks, files, path)
    for prefix, file in files.items():
        module = networks[prefix]
        if not layers(module):
            add_lora(module, paths[prefix], rank=file.rank, dropout=dropout, dora=file.dora, seed=seed)
        for name, layer in layers(module).items():
            # contiguous, as in training: BLAS rounds differently for a transposed view
            layer.lora_a, layer.lora_b = (
                mx.contiguous(file.tensors[f"{name}{end}"].T.astype(mx.float32)) for end in (_A, _B)
            )
            layer.scale = file.alpha / file.rank
            if file.dora:
                layer.m = file.tensors[f"{name}{_M}"].astype(mx.float32)
    return paths


def _check(networks: Networks, files: Mapping[str, Adapter], path: str | Path) -> dict[str, list[str]]:
    paths, faults = {}, []
    for prefix, module in networks.items():
        if prefix in files:
            paths[prefix], wrong = _compare(module, files[prefix], prefix)
            faults += wrong
        elif layers(module):
            faults.append(f"missing {prefix}.*{_A}")
    if faults:
        raise WeightsError(f"{path}: does not fit this model: " + "; ".join(sorted(faults)))
    return paths


def _compare(module: nn.Module, file: Adapter, prefix: str) -> tuple[list[str], list[str]]:
    """(adapted paths, faults of the file)."""
    adapted = layers(module)
    bases = {name: layer.linear for name, layer in adapted.items()} or linears(module)
    in_file = {key.removesuffix(end) for key in file.tensors for end in (_A, _B) if key.endswith(end)}
    names = sorted(adapted) or sorted(in_file & bases.keys())
    dora = any(map(is_dora, adapted.values())) if adapted else file.dora
    expected: dict[str, tuple[int, ...]] = {}
    for name in names:
        outputs, inputs = dimensions(bases[name])
        expected |= {f"{name}{_A}": (file.rank, inputs), f"{name}{_B}": (outputs, file.rank)}
        if dora:
            expected[f"{name}{_M}"] = (outputs,)
    faults = [f"missing {prefix}.{key}" for key in expected if key not in file.tensors]
    faults += [f"unknown {prefix}.{key}" for key in file.tensors if key not in expected]
    faults += [
        f"{prefix}.{key} is {tuple(file.tensors[key].shape)}, expected {shape}"
        for key, shape in expected.items()
        if key in file.tensors and tuple(file.tensors[key].shape) != shape
    ]
    return names, faults


def _config(metadata: Mapping[str, str], path: str | Path) -> Mapping[str, object]:
    """The PEFT configurations, with prefixed keys."""
    try:
        config = json.loads(metadata.get(METADATA_KEY, "{}"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
        return config
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its {METADATA_KEY} cannot be read ({error})") from error


def _adapter(prefix: str, tensors: Mapping[str, mx.array], config: Mapping[str, object], path: str | Path) -> Adapter:
    tensors = {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}
    ranks = {value.shape[0] for key, value in tensors.items() if key.endswith(_A) and value.ndim}
    if not ranks:
        raise WeightsError(f"{path}: contains no adapter for {prefix!r}: no key {prefix}.*{_A}")
    try:
        alpha = float(config.get(f"{prefix}.lora_alpha", min(ranks)))  # type: ignore[arg-type]
        if config.get(f"{prefix}.use_rslora"):  # scale alpha / sqrt(rank), arXiv:2312.03732
            alpha *= math.sqrt(min(ranks))
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}")
    except (ValueError, TypeError, OverflowError) as error:
        raise WeightsError(f"{path}: its {METADATA_KEY} cannot be read ({error})") from error
    several = config.get(f"{prefix}.rank_pattern") or config.get(f"{prefix}.alpha_pattern")
    if len(ranks) > 1 or several:
        raise WeightsError(
            f"{path}: layers differ in rank or alpha (ranks {sorted(ranks)}); only equal ones are supported"
        )
    return Adapter(tensors=tensors, rank=ranks.pop(), alpha=alpha, dora=any(key.endswith(_M) for key in tensors))
