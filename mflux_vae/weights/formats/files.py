"""Weights files: read whole or not at all, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np

from mflux_vae.errors import WeightsError
from mflux_vae.weights.formats.lazy_tensor import LARGEST_DIMENSION, MOST_DIMENSIONS, Stored, read_numbers
from mflux_vae.weights.formats.npz import is_npz, read_npz
from mflux_vae.weights.formats.torch_files import read_torch

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".npz")
"""Of weights files."""

_SAFETENSORS_DTYPES = {
    "BOOL": ("bool", 1),
    **{
        f"{kind[0].upper()}{bits}": (f"{kind}{bits}", bits // 8) for kind in ("int", "uint") for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": (f"float{bits}", bits // 8) for bits in (16, 32, 64)},
    "BF16": ("bfloat16", 2),
    "C64": ("complex64", 8),
    **{name: (name.lower(), 1) for name in ("F8_E4M3", "F8_E5M2", "F8_E8M0")},
}
"""Name in numpy and MLX, where they have it, and bytes of each of the format's dtypes."""

_SAFETENSORS_NAMES = {dtype: name for name, (dtype, _) in _SAFETENSORS_DTYPES.items()}

Entry: TypeAlias = "tuple[tuple[int, ...], str, int]"

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000
"""As in the reference implementation."""


def open_weights(path: str | Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Tensors, unread, and metadata of a weights file: safetensors, torch's or .npz, whatever its name says.

    Raises:
        WeightsError: no such file; not a whole file of its kind; see `header`, `torch_files.read_torch` and
            `npz.read_npz`.
    """
    path = Path(path)
    if is_npz(path):
        return read_npz(path), {}
    if _is_torchs(path):
        return read_torch(path), {}
    entries, metadata = header(path)
    if all(hasattr(mx, dtype) and dtype != "float64" for _, dtype, _ in entries.values()):

        @cache
        def loaded() -> dict[str, mx.array]:
            return read_safetensors(path)[0]

        def load(name: str) -> mx.array:
            return loaded()[name]

    else:  # MLX refuses the whole file

        def load(name: str) -> mx.array:
            shape, dtype, first = entries[name]
            return read_numbers(np.memmap(path, np.uint8, "r", first), name, dtype, shape)

    return {name: Stored(shape, dtype, partial(load, name)) for name, (shape, dtype, _) in entries.items()}, metadata


def _is_torchs(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:  # `header` says it
        return False
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and any(start[4:8])):  # no header is that long
        return True
    return path.suffix != ".safetensors" and start[8:] != b"{"


def header(path: str | Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Shape, dtype and first byte of every tensor of a safetensors file by name, and its metadata.

    All that the header says is checked against the file, as the format asks: MLX takes it at its word.

    Raises:
        WeightsError: no such file, or not a whole safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES:
                raise ValueError(f"it has {size} bytes")
            if length > min(size - _LENGTH_BYTES, _LONGEST_HEADER):
                raise ValueError(f"a header of {length} bytes, in a file of {size}")
            text = file.read(length)
        told = json.loads(text.decode(), object_pairs_hook=_without_doubles)
        return _entries(told, _LENGTH_BYTES + length, size)
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).replace("\n", " ")
        raise WeightsError(f"{path}: not a whole safetensors file ({reason}); copy or download it again") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("a name stands twice in its header")
    return content


def _entries(told: Any, start: int, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """What a header tells, if its tensors fill the bytes from `start` to `size` without gap; else a ValueError."""
    if not isinstance(told, dict):
        raise ValueError("its header is no JSON object")
    metadata = told.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are not texts")
    entries: dict[str, Entry] = {}
    places = []
    for name, entry in told.items():
        try:
            shape, kind, (first, end) = entry["shape"], entry["dtype"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"no shape, dtype and place of {name[:100]}") from None
        if not isinstance(kind, str) or kind not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{name} is of an unknown kind, {str(kind)[:20]}")
        whole = isinstance(shape, list) and len(shape) <= MOST_DIMENSIONS and all(type(n) is int for n in shape)
        if not whole or not all(0 <= n <= LARGEST_DIMENSION for n in shape):
            raise ValueError(f"{name} has an impossible shape")
        dtype, width = _SAFETENSORS_DTYPES[kind]
        if type(first) is not int or type(end) is not int or end - first != prod(shape) * width:
            raise ValueError(f"{name} is {kind} of shape {shape}, which does not fit the bytes {first} to {end}")
        entries[name] = tuple(shape), dtype, start + first
        places.append((first, end, name))
    reached = 0
    for first, end, name in sorted(places):
        if first != reached:
            raise ValueError(f"{name} begins at byte {first}, and what stands before it ends at {reached}")
        reached = end
    if start + reached != size:
        raise ValueError(f"its tensors have {reached} bytes, and the file {size - start} for them")
    return entries, metadata


def read_safetensors(path: str | Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Tensors and metadata of a safetensors file. Tensors are loaded when they are first used.

    Raises:
        WeightsError: there is no such file, it is not a whole safetensors file, or has numbers that MLX has not.
    """
    path = Path(path)
    header(path)
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise WeightsError(f"{path}: MLX does not read it ({error})") from error
    tensors, metadata = loaded
    return dict(tensors), dict(metadata)


def write_safetensors(
    path: str | Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file; the name appears only when the file is complete.

    Raises:
        OSError: it cannot be written there.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.writing.safetensors")
    try:
        arrays = {key: mx.contiguous(tensor) for key, tensor in sorted(tensors.items())}
        mx.save_safetensors(str(temporary), arrays, {"format": "pt", **(metadata or {})})
        _replace(temporary, path)
    except RuntimeError as error:  # what MLX says of a full disk
        raise OSError(f"{path}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def convert_safetensors(path: str | Path, tensors: dict[str, mx.array], dtype: mx.Dtype) -> None:
    """Write tensors in another precision, one after the other; the name appears only when the file is complete.

    Args:
        tensors: is emptied, so that each tensor can be freed as soon as it is written.
        dtype: of the stored tensors; what is not floating-point, such as quantised weights, keeps its own.

    Raises:
        OSError: it cannot be written there.
    """
    path = Path(path)
    dtypes = {name: dtype if mx.issubdtype(one.dtype, mx.floating) else one.dtype for name, one in tensors.items()}
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    first = 0
    for name in sorted(tensors):
        end = first + tensors[name].size * dtypes[name].size
        told[name] = {
            "dtype": _SAFETENSORS_NAMES[str(dtypes[name]).removeprefix("mlx.core.")],
            "shape": tensors[name].shape,
            "data_offsets": [first, end],
        }
        first = end
    text = json.dumps(told).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.writing.safetensors")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
            for name in sorted(tensors):
                file.write(np.array(tensors.pop(name).astype(dtypes[name]).reshape(-1).view(mx.uint8)).data)
        _replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_folder(folder: str | Path, stem: str, variant: str | None = None) -> dict[str, Stored]:
    """Tensors, unread, of `{stem}.safetensors`, or of the shards that `{stem}.safetensors.index.json` names, or of
    what older releases wrote: `{stem}.bin`; each also as a variant, `{stem}.fp16...`.

    Args:
        variant: the one that is wanted, such as "fp16"; None for the plain files, or where they are not, for fp16.

    Raises:
        WeightsError: none is there, a shard is missing or broken, or the index names a file outside the folder.
    """
    folder = Path(folder)
    middles = ("", ".fp16") if variant is None else (f".{variant}",)
    for kind in ("safetensors", "bin"):
        for middle in middles:
            index = folder / f"{stem}.{kind}.index{middle}.json"
            if index.is_file():
                return _open_shards(index)
            if (folder / f"{stem}{middle}.{kind}").is_file():
                return open_weights(folder / f"{stem}{middle}.{kind}")[0]
    raise WeightsError(f"{folder / stem}{middles[0]}.safetensors: no such weights file")


def read_folder(folder: str | Path, stem: str, variant: str | None = None) -> dict[str, mx.array]:
    """As `open_folder`, and read; safetensors are read when the arrays are first used."""
    return {name: stored.load() for name, stored in open_folder(folder, stem, variant).items()}


def _open_shards(index: Path) -> dict[str, Stored]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{index}: no weight_map; copy or download it again")
    tensors: dict[str, Stored] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or "\0" in name or len(name) > 255 or not _lies_in(index.parent, name):
            raise WeightsError(f"{index}: names {name[:200]!r}, which is not a file of this folder")
        tensors.update(open_weights(index.parent / name)[0])
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise WeightsError(f"{index}: its shards lack {', '.join(absent)}")
    return tensors


def _lies_in(folder: Path, name: str) -> bool:
    """Whether a name is that of something in a folder, and of no link out of it; the hub's cache is made of links."""
    home = folder.resolve()
    cache = next((place.parent for place in home.parents if place.name == "snapshots"), home)
    try:
        return (folder / name).resolve().is_relative_to(cache if (cache / "blobs").is_dir() else home)
    except (OSError, RuntimeError, ValueError):  # too long a name, a circle of links
        return False


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        WeightsError: no such file, or not a JSON object.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_float=_number, parse_constant=_number)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: not a JSON object")
    return content


def _number(text: str) -> float:
    """A number of a JSON file. NaN and infinity, which JSON does not have, would go unseen into every latent."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no number")
    return number


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object; the name appears only when the file is complete."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file; the name appears only when the file is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        _replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    """Move a finished file into place, after its bytes have reached the disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
