"""Adapters in PEFT's file format, which diffusers loads.

Keys are ``{prefix}.{path}.lora_A.weight`` (rank, in), ``.lora_B.weight`` (out, rank) and, with DoRA,
``.lora_magnitude_vector`` (out,). Alpha lives in the metadata alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import WeightsError
from mflux_vae_train.lora.layers import add_lora, is_dora, layers
from mflux_vae_train.lora.targets import dimensions, linears

METADATA_KEY = "lora_adapter_metadata"
_A, _B, _M = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A file, read.

    Attributes:
        tensors: by path and ending.
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


def adapter_metadata(module: nn.Module, prefix: str) -> dict[str, str]:
    """Metadata of the safetensors file: the PEFT configuration, keys prefixed, as JSON."""
    adapted = layers(module)
    if not adapted:
        raise ValueError("the module has no adapters to save")
    first = next(iter(adapted.values()))
    rank = int(first.lora_a.shape[1])
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": first.scale * rank,
        "lora_dropout": first.dropout.p,
        "target_modules": list(adapted),
        "bias": "none",
        "use_dora": is_dora(first),
    }
    text = json.dumps({f"{prefix}.{key}": value for key, value in config.items()}, sort_keys=True)
    return {"format": "pt", METADATA_KEY: text}


def save_adapter(module: nn.Module, path: str | Path, prefix: str) -> None:
    """Write the adapters as a PEFT/diffusers safetensors file."""
    from mflux_vae.weights.files import write_safetensors

    write_safetensors(path, adapter_tensors(module, prefix), adapter_metadata(module, prefix))


def read_adapter(path: str | Path, prefix: str) -> Adapter:
    """The adapters of a file for `prefix`.

    Raises:
        WeightsError: none in it; ranks or alphas that differ by layer; metadata that cannot be read.
    """
    from mflux_vae.weights.files import read_safetensors

    tensors, metadata = read_safetensors(path)
    rank, alpha = _rank_and_alpha(tensors, metadata, prefix, path)
    return Adapter(tensors=tensors, rank=rank, alpha=alpha, dora=any(key.endswith(_M) for key in tensors))


def check_adapter_fits(module: nn.Module, path: str | Path, prefix: str) -> list[str]:
    """The paths that a file adapts, or the module's adapted ones, which are then the same.

    Raises:
        WeightsError: missing, unknown and misshapen keys, all listed; and as `read_adapter`.
    """
    return _fitting(module, read_adapter(path, prefix), path, prefix)


def load_adapter(module: nn.Module, path: str | Path, prefix: str, *, dropout: float = 0.0, seed: int = 0) -> list[str]:
    """Read such a file into a module: adds the layers where there are none yet; rank and alpha are the file's.

    Args:
        dropout, seed: as `add_lora` takes them, where it adds layers.

    Returns:
        the adapted paths.

    Raises:
        WeightsError: as `check_adapter_fits`.
    """
    file = read_adapter(path, prefix)
    names = _fitting(module, file, path, prefix)
    if not layers(module):
        add_lora(module, names, rank=file.rank, dropout=dropout, dora=file.dora, seed=seed)
    for name, layer in layers(module).items():
        a, b, m = (file.tensors.get(f"{prefix}.{name}{end}") for end in (_A, _B, _M))
        assert a is not None and b is not None
        # contiguous as trained: a transposed view would go another way through BLAS and round differently
        layer.lora_a, layer.lora_b = (mx.contiguous(one.T.astype(mx.float32)) for one in (a, b))
        layer.scale = file.alpha / file.rank
        if m is not None:
            layer.m = m.astype(mx.float32)
    return names


def _fitting(module: nn.Module, file: Adapter, path: str | Path, prefix: str) -> list[str]:
    adapted, tensors = layers(module), file.tensors
    bases = {name: layer.linear for name, layer in adapted.items()} or linears(module)
    in_file = {
        key.removeprefix(f"{prefix}.").removesuffix(end) for key in tensors for end in (_A, _B) if key.endswith(end)
    }
    names = sorted(adapted) or sorted(in_file & bases.keys())
    dora = any(map(is_dora, adapted.values())) if adapted else file.dora
    expected: dict[str, tuple[int, ...]] = {}
    for name in names:
        outputs, inputs = dimensions(bases[name])
        expected |= {f"{prefix}.{name}{_A}": (file.rank, inputs), f"{prefix}.{name}{_B}": (outputs, file.rank)}
        if dora:
            expected[f"{prefix}.{name}{_M}"] = (outputs,)
    faults = [f"missing {key}" for key in expected if key not in tensors]
    faults += [f"unknown {key}" for key in tensors if key not in expected]
    faults += [
        f"{key} is {tuple(tensors[key].shape)}, expected {shape}"
        for key, shape in expected.items()
        if key in tensors and tuple(tensors[key].shape) != shape
    ]
    if faults:
        raise WeightsError(f"{path}: does not fit this model: " + "; ".join(sorted(faults)))
    return names


def _rank_and_alpha(
    tensors: dict[str, mx.array], metadata: dict[str, str], prefix: str, path: str | Path
) -> tuple[int, float]:
    ranks = {x.shape[0] for key, x in tensors.items() if key.startswith(f"{prefix}.") and key.endswith(_A) and x.ndim}
    if not ranks:
        raise WeightsError(f"{path}: holds no adapter for {prefix!r}: no key {prefix}.*{_A}")
    try:
        config = json.loads(metadata.get(METADATA_KEY, "{}"))
        several = config.get(f"{prefix}.rank_pattern") or config.get(f"{prefix}.alpha_pattern")
        alpha = float(config.get(f"{prefix}.lora_alpha", min(ranks)))
        if not math.isfinite(alpha):
            raise ValueError(f"alpha is {alpha}")
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise WeightsError(f"{path}: its {METADATA_KEY} cannot be read ({error})") from error
    if len(ranks) > 1 or several:
        raise WeightsError(f"{path}: its layers differ in rank or alpha (ranks {sorted(ranks)}); one of each is read")
    return ranks.pop(), alpha
