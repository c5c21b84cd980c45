"""The adapter in a checkpoint of a run, which holds the state of the training."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import mlx.core as mx

from mflux_vae.errors import WeightsError
from mflux_vae.weights.formats.files import open_weights, read_json
from mflux_vae_train.lora.dialects import MAGNITUDE, A, B
from mflux_vae_train.lora.metadata import METADATA_KEY

ARRAYS, VALUES = "state.safetensors", "state.json"
ALPHAS = "alpha of each layer"
"""Name in the fingerprint: alphas by prefix and path, if they or the ranks differ from the settings."""

CHECKPOINT_NETWORK = "denoiser"
"""Name of the network in the checkpoint of a run that trains one."""

_ENDS = {"lora_a": A, "lora_b": B, "m": MAGNITUDE}


def is_checkpoint(path: Path) -> bool:
    """Whether a path names the arrays of a checkpoint."""
    return path.name == ARRAYS and path.with_name(VALUES).is_file()


def checkpoint_adapter(path: Path, prefixes: Iterable[str]) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Tensors with PEFT's keys, and metadata with alpha, of the arrays of a checkpoint.

    Args:
        prefixes: of the networks, the denoiser's first.

    Raises:
        WeightsError: the checkpoint holds no adapter, or does not state its alpha.
    """
    fingerprint = read_json(path.with_name(VALUES)).get("fingerprint")
    first, *_ = prefixes
    stored = {name: tensor for name, tensor in open_weights(path)[0].items() if name.startswith("denoiser/")}
    if not isinstance(fingerprint, dict) or not any(name.rpartition("/")[2] == "lora_a" for name in stored):
        raise WeightsError(f"{path.parent}: a checkpoint without an adapter; give an adapter, or a run that trains one")
    alpha, rank, several = (fingerprint.get(name) for name in ("lora_alpha", "rank", "train_text_encoder"))
    alphas = stated if isinstance(stated := fingerprint.get(ALPHAS), dict) else {}
    tensors: dict[str, mx.array] = {}
    ranks = set()
    for name, tensor in stored.items():
        *layer, end = name.split("/")[1:]
        key = ".".join(layer if several else [first, *layer])
        array = tensor.load()
        tensors[f"{key}{_ENDS.get(end, f'.{end}')}"] = array.T if end in ("lora_a", "lora_b") else array
        if end == "lora_a":
            ranks.add(array.shape[1])
    if alpha is None or (ranks != {rank} and not alphas):
        raise WeightsError(
            f"{path.parent}: does not state the alpha of each layer; resume that run to its end, and take the adapter"
        )
    return tensors, _metadata(alpha, {key.partition(".")[0] for key in tensors}, alphas)


def _metadata(alpha: object, prefixes: Iterable[str], alphas: Mapping[str, object]) -> dict[str, str]:
    config: dict[str, object] = {f"{prefix}.lora_alpha": alpha for prefix in prefixes}
    for prefix in prefixes:
        start = f"{prefix}."
        config[f"{prefix}.alpha_pattern"] = {
            f"^{re.escape(name.removeprefix(start))}$": value
            for name, value in alphas.items()
            if name.startswith(start)
        }
    return {METADATA_KEY: json.dumps(config)}
