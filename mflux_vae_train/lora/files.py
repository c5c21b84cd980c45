"""Adapter files in PEFT's format, as diffusers loads them, for one network or several; see `reading` for others.

Keys are ``{prefix}.{path}.lora_A.weight`` (rank, in), ``.lora_B.weight`` (out, rank) and, with DoRA,
``.lora_magnitude_vector`` (out,); the prefix names the network. Alpha is in the metadata. Matrices of convolutions
are kernels, (rank, in, kh, kw) and (out, rank, 1, 1).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import WeightsError
from mflux_vae.utils.formatting import summarize
from mflux_vae.weights.formats.lazy_tensor import check_numbers
from mflux_vae_train.lora.dialects import MAGNITUDE, A, B, as_kernels
from mflux_vae_train.lora.layers import LayerChange, add_lora, changes, layers
from mflux_vae_train.lora.metadata import METADATA_KEY
from mflux_vae_train.lora.reading import Adapter, Names, Networks, read_adapter


def adapter_tensors(module: nn.Module, prefix: str) -> dict[str, mx.array]:
    """Tensors of all adapted layers, by key."""
    return peft_tensors(changes(module), prefix)


def peft_tensors(of_layers: Mapping[str, LayerChange], prefix: str) -> dict[str, mx.array]:
    """Tensors of layers by key.

    Args:
        of_layers: by path in the network.
        prefix: names the network; "" if the paths contain it.
    """
    tensors = {}
    for path, change in of_layers.items():
        name = f"{prefix}.{path}" if prefix else path
        tensors[f"{name}{A}"], tensors[f"{name}{B}"] = as_kernels(change.a, change.b, change.kernel)
        if (magnitudes := change.magnitudes) is not None:
            tensors[f"{name}{MAGNITUDE}"] = magnitudes if change.kernel is None else magnitudes.reshape(1, -1, 1, 1)
    return tensors


def adapter_config(module: nn.Module, prefix: str) -> dict[str, object]:
    """The PEFT configuration, with prefixed keys."""
    adapted = layers(module)
    if not adapted:
        raise ValueError(f"{prefix} has no adapters to save")
    dropout = next(iter(adapted.values())).dropout.p
    return peft_config(changes(module), prefix, target_modules(module, list(adapted)), dropout)


def peft_config(
    adapted: Mapping[str, LayerChange], prefix: str, targets: Sequence[str], dropout: float = 0.0
) -> dict[str, object]:
    """The PEFT configuration of layers, with prefixed keys.

    Args:
        adapted: by path.
        targets: names or paths of the layers, see `target_modules`.
    """
    ranks = {path: change.rank for path, change in adapted.items()}
    alphas = {path: change.alpha for path, change in adapted.items()}
    (rank, _), (alpha, _) = (Counter(values.values()).most_common(1)[0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": [*map(_end, targets)],
        "bias": "none",
        "use_dora": next(iter(adapted.values())).magnitudes is not None,
    }
    for name, values, usual in (("rank_pattern", ranks, rank), ("alpha_pattern", alphas, alpha)):
        # PEFT's patterns match the ends of paths, too
        whole = {path: any(other.endswith(f".{path}") for other in adapted) for path in adapted}
        if other := {f"^{path}" if whole[path] else _end(path): one for path, one in values.items() if one != usual}:
            config[name] = other
    return {f"{prefix}.{key}": value for key, value in config.items()}


def target_modules(module: nn.Module, paths: Sequence[str]) -> list[str]:
    """Last components of the paths of adapted layers if they match no other module, otherwise the paths.

    PEFT matches names with the ends of paths, and versions of transformers differ in the prefix of CLIP's layers.
    """
    names = {path.rpartition(".")[2] for path in paths}
    matched = [path for path, _ in module.named_modules() if path.rpartition(".")[2] in names]
    unique = sorted(matched) == sorted(paths) and not any(map(str.isdigit, names))
    return sorted(names) if unique else sorted(paths)


def _end(path: str) -> str:
    """A path without CLIP's first level, which transformers 5 leaves out."""
    return path.removeprefix("text_model.")


def adapter_metadata(networks: Networks) -> dict[str, str]:
    """Metadata of the safetensors file: PEFT configurations as JSON."""
    config: dict[str, object] = {}
    for prefix, module in networks.items():
        config |= adapter_config(module, prefix)
    return {"format": "pt", METADATA_KEY: json.dumps(config, sort_keys=True)}


def save_adapter(networks: Networks, path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write adapters as a safetensors file for PEFT and diffusers.

    Args:
        metadata: more entries for the file, which other programs ignore.
    """
    from mflux_vae.weights.formats.files import write_safetensors

    tensors: dict[str, mx.array] = {}
    for prefix, module in networks.items():
        tensors |= adapter_tensors(module, prefix)
    write_safetensors(path, tensors, {**adapter_metadata(networks), **(metadata or {})})


def check_adapter_fits(
    networks: Networks, path: str | Path, names: Names | None = None, *, scale: float = 1.0
) -> dict[str, Adapter]:
    """The adapters in a file, by prefix. If a network already has adapters, the paths must be equal.

    Args:
        scale: as in `read_adapter`.

    Raises:
        WeightsError: missing or unknown keys, or values that are not finite; or as `read_adapter`.
    """
    files = read_adapter(path, networks, names, scale=scale)
    _check(networks, files, path)
    return files


def load_adapter(
    networks: Networks,
    path: str | Path,
    names: Names | None = None,
    *,
    dropout: float = 0.0,
    seed: int = 0,
    scale: float = 1.0,
) -> dict[str, list[str]]:
    """Load a file into networks, with its ranks and alphas; adds adapters to networks that have none.

    A network without adapters and without tensors in the file is not changed.

    Args:
        dropout, seed: for `add_lora`.
        scale: alpha / rank of layers whose alpha the file does not state.

    Returns:
        adapted paths of each network in the file, by prefix.

    Raises:
        WeightsError: as `check_adapter_fits`.
    """
    files = read_adapter(path, networks, names, scale=scale)
    _check(networks, files, path)
    for prefix, file in files.items():
        module = networks[prefix]
        if not layers(module):
            add_lora(
                module, sorted(file.ranks), rank=file.rank, dropout=dropout, dora=file.dora, seed=seed, ranks=file.ranks
            )
        for name, layer in layers(module).items():
            # contiguous, as in training: BLAS rounds differently for a transposed view
            layer.lora_a, layer.lora_b = (
                mx.contiguous(file.tensors[f"{name}{end}"].T.astype(mx.float32)) for end in (A, B)
            )
            layer.scale = file.alphas[name] / file.ranks[name]
            if file.dora:
                layer.m = file.tensors[f"{name}{MAGNITUDE}"].astype(mx.float32)
    return {prefix: sorted(file.ranks) for prefix, file in files.items()}


def _check(networks: Networks, files: Mapping[str, Adapter], path: str | Path) -> None:
    faults: dict[str, list[str]] = {"missing ": [], "unknown ": []}
    for prefix, module in networks.items():
        adapted = layers(module)
        if prefix not in files:
            faults["missing "] += [f"{prefix}.*{A}"] if adapted else []
        elif adapted:
            expected = adapter_tensors(module, "").keys()
            found = files[prefix].tensors.keys()
            faults["missing "] += [f"{prefix}.{key}" for key in sorted(expected - found)]
            faults["unknown "] += [f"{prefix}.{key}" for key in sorted(found - expected)]
    if any(faults.values()):
        raise WeightsError(f"{path}: does not fit the adapters of this model: {summarize([*faults.items()])}")
    for file in files.values():
        check_numbers(file.tensors, str(path), "an adapter's values")
