"""Adapters in PEFT's file format, which diffusers loads, of one network or several in a file.

Keys are ``{prefix}.{path}.lora_A.weight`` (rank, in), ``.lora_B.weight`` (out, rank) and, with DoRA,
``.lora_magnitude_vector`` (out,); the prefix says which network. Alpha lives in the metadata alone. Files in kohya's
naming are read as if they were in this one.
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
"""By the prefix of their keys, such as "transformer"."""

Names: TypeAlias = Mapping[str, Modules]
"""Of each network's layers in kohya's naming, by the same prefix."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What a file has for one network.

    Attributes:
        tensors: by the path and the ending of their keys.
        dora: whether there are magnitudes.
    """

    tensors: Mapping[str, mx.array]
    rank: int
    alpha: float
    dora: bool


def adapter_tensors(module: nn.Module, prefix: str) -> dict[str, mx.array]:
    """Every adapted layer's, under their keys."""
    tensors = {}
    for path, layer in layers(module).items():
        tensors[f"{prefix}.{path}{_A}"] = layer.lora_a.T
        tensors[f"{prefix}.{path}{_B}"] = layer.lora_b.T
        if is_dora(layer):
            tensors[f"{prefix}.{path}{_M}"] = layer.m
    return tensors


def adapter_config(module: nn.Module, prefix: str) -> dict[str, object]:
    """The PEFT configuration, keys prefixed."""
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
    """The adapted layers by their last names where these mean no other module, else by their paths.

    Releases of transformers differ in what stands in front of CLIP's layers, and PEFT takes names for endings.
    """
    paths, names = list(layers(module)), {path.rpartition(".")[2] for path in layers(module)}
    meant = [path for path, _ in module.named_modules() if path.rpartition(".")[2] in names]
    clear = sorted(meant) == paths and not any(map(str.isdigit, names))
    return sorted(names) if clear else paths


def adapter_metadata(networks: Networks) -> dict[str, str]:
    """Metadata of the safetensors file: the PEFT configurations as JSON."""
    config: dict[str, object] = {}
    for prefix, module in networks.items():
        config |= adapter_config(module, prefix)
    return {"format": "pt", METADATA_KEY: json.dumps(config, sort_keys=True)}


def save_adapter(networks: Networks, path: str | Path) -> None:
    """Write the adapters as a PEFT/diffusers safetensors file."""
    from mflux_vae.weights.formats.files import write_safetensors

    tensors: dict[str, mx.array] = {}
    for prefix, module in networks.items():
        tensors |= adapter_tensors(module, prefix)
    write_safetensors(path, tensors, adapter_metadata(networks))


def read_adapter(path: str | Path, networks: Networks, names: Names | None = None) -> dict[str, Adapter]:
    """What a file has for these networks, by their prefixes; of some there may be nothing.

    Args:
        networks: only their layers count.
        names: for files in kohya's naming; None where none is known.

    Raises:
        WeightsError: nothing in it for any of them, something for others; ranks or alphas that differ by layer;
            metadata that cannot be read.
    """
    from mflux_vae.weights.formats.files import read_safetensors

    tensors, metadata = read_safetensors(path)
    config = {} if is_kohya(tensors) else _config(metadata, path)
    if is_kohya(tensors):
        tensors, config = from_kohya(tensors, metadata, networks, names or {}, str(path))
    present = {prefix for prefix in networks if any(key.startswith(f"{prefix}.") for key in tensors)}
    if not present:
        asked = " or ".join(map(repr, networks))
        raise WeightsError(f"{path}: holds no adapter for {asked}: no key {next(iter(networks))}.*{_A}")
    if foreign := sorted({key.partition(".")[0] for key in tensors} - present):
        also = f"holds an adapter for {', '.join(map(repr, foreign))}, too"
        raise WeightsError(f"{path}: {also}, and {' and '.join(networks)} alone is to be adapted")
    return {prefix: _of_one(prefix, tensors, config, path) for prefix in networks if prefix in present}


def check_adapter_fits(networks: Networks, path: str | Path, names: Names | None = None) -> dict[str, list[str]]:
    """The paths that a file adapts in each network, or the network's adapted ones, which are then the same.

    Raises:
        WeightsError: missing, unknown and misshapen keys, all listed; and as `read_adapter`.
    """
    return _fitting(networks, read_adapter(path, networks, names), path)


def load_adapter(
    networks: Networks, path: str | Path, names: Names | None = None, *, dropout: float = 0.0, seed: int = 0
) -> dict[str, list[str]]:
    """Read such a file into networks: adds the layers where there are none yet; rank and alpha are the file's.

    A network without adapted layers that the file has nothing for stays as it is.

    Args:
        dropout, seed: as `add_lora` takes them, where it adds layers.

    Returns:
        the adapted paths of each network that there is something for.

    Raises:
        WeightsError: as `check_adapter_fits`.
    """
    files = read_adapter(path, networks, names)
    fitting = _fitting(networks, files, path)
    for prefix, file in files.items():
        module = networks[prefix]
        if not layers(module):
            add_lora(module, fitting[prefix], rank=file.rank, dropout=dropout, dora=file.dora, seed=seed)
        for name, layer in layers(module).items():
            # contiguous as trained: a transposed view would go another way through BLAS and round differently
            layer.lora_a, layer.lora_b = (
                mx.contiguous(file.tensors[f"{name}{end}"].T.astype(mx.float32)) for end in (_A, _B)
            )
            layer.scale = file.alpha / file.rank
            if file.dora:
                layer.m = file.tensors[f"{name}{_M}"].astype(mx.float32)
    return fitting


def _fitting(networks: Networks, files: Mapping[str, Adapter], path: str | Path) -> dict[str, list[str]]:
    found, faults = {}, []
    for prefix, module in networks.items():
        if prefix in files:
            found[prefix], wrong = _compared(module, files[prefix], prefix)
            faults += wrong
        elif layers(module):
            faults.append(f"missing {prefix}.*{_A}")
    if faults:
        raise WeightsError(f"{path}: does not fit this model: " + "; ".join(sorted(faults)))
    return found


def _compared(module: nn.Module, file: Adapter, prefix: str) -> tuple[list[str], list[str]]:
    """Paths that are adapted, and what is wrong with the file."""
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
    """The PEFT configurations, keys prefixed."""
    try:
        config = json.loads(metadata.get(METADATA_KEY, "{}"))
        if not isinstance(config, dict):
            raise ValueError("no object")
        return config
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its {METADATA_KEY} cannot be read ({error})") from error


def _of_one(prefix: str, tensors: Mapping[str, mx.array], config: Mapping[str, object], path: str | Path) -> Adapter:
    own = {key.removeprefix(f"{prefix}."): value for key, value in tensors.items() if key.startswith(f"{prefix}.")}
    ranks = {value.shape[0] for key, value in own.items() if key.endswith(_A) and value.ndim}
    if not ranks:
        raise WeightsError(f"{path}: holds no adapter for {prefix!r}: no key {prefix}.*{_A}")
    try:
        alpha = float(config.get(f"{prefix}.lora_alpha", min(ranks)))  # type: ignore[arg-type]
        if config.get(f"{prefix}.use_rslora"):  # scaled by alpha / sqrt(rank) there (arXiv:2312.03732)
            alpha *= math.sqrt(min(ranks))
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}")
    except (ValueError, TypeError, OverflowError) as error:
        raise WeightsError(f"{path}: its {METADATA_KEY} cannot be read ({error})") from error
    several = config.get(f"{prefix}.rank_pattern") or config.get(f"{prefix}.alpha_pattern")
    if len(ranks) > 1 or several:
        raise WeightsError(f"{path}: its layers differ in rank or alpha (ranks {sorted(ranks)}); one of each is read")
    return Adapter(tensors=own, rank=ranks.pop(), alpha=alpha, dora=any(key.endswith(_M) for key in own))
