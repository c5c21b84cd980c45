"""Weights files: read whole or not at all, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mflux_vae.errors import WeightsError

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def read_safetensors(path: str | Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Tensors are loaded when they are first used.

    Raises:
        WeightsError: there is no such file, or it is not a whole safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"{path}: not a whole safetensors file ({error}); copy or download it again") from error
    tensors, metadata = loaded
    return dict(tensors), dict(metadata)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; the name appears only when the file is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.writing.safetensors")
    try:
        arrays = {key: mx.contiguous(tensor) for key, tensor in sorted(tensors.items())}
        mx.save_safetensors(str(temporary), arrays, {"format": "pt", **(metadata or {})})
        _replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_folder(folder: str | Path, stem: str) -> dict[str, mx.array]:
    """Tensors of `{stem}.safetensors`, or of the shards that `{stem}.safetensors.index.json` names.

    Raises:
        WeightsError: neither is there, a shard is missing or broken, or the index names a file outside the folder.
    """
    folder = Path(folder)
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return read_safetensors(folder / f"{stem}.safetensors")[0]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{index}: no weight_map; copy or download it again")
    tensors: dict[str, mx.array] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name:
            raise WeightsError(f"{index}: names {name!r}, which is not a file of this folder")
        tensors.update(read_safetensors(folder / name)[0])
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise WeightsError(f"{index}: its shards lack {', '.join(absent)}")
    return tensors


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        WeightsError: no such file, or not a JSON object.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: not a JSON object")
    return content


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object; the name appears only when the file is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        _replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    """Move a finished file into place, after its bytes have reached the disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
