"""Read and write weights files. Reads validate the whole file; writes are atomic."""

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
from mflux_vae.runtime.device_errors import device_errors
from mflux_vae.utils.formatting import first_few
from mflux_vae.utils.links import missing
from mflux_vae.utils.paths import printable
from mflux_vae.utils.text_files import parse_json, read_text
from mflux_vae.weights.formats.lazy_tensor import (
    FP8,
    MAX_DIMENSION_SIZE,
    MAX_DIMENSIONS,
    LazyTensor,
    decode_fp8,
    read_numbers,
)
from mflux_vae.weights.formats.npz import is_npz, read_npz
from mflux_vae.weights.formats.scaled_weights import unscaled
from mflux_vae.weights.formats.torch_files import open_torch

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".npz")
"""Extensions of weights files."""

_SAFETENSORS_DTYPES = {
    "BOOL": ("bool", 1),
    **{
        f"{kind[0].upper()}{bits}": (f"{kind}{bits}", bits // 8) for kind in ("int", "uint") for bits in (8, 16, 32, 64)
    },
    **{f"F{bits}": (f"float{bits}", bits // 8) for bits in (16, 32, 64)},
    "BF16": ("bfloat16", 2),
    "C64": ("complex64", 8),
    **{name: (name.lower(), 1) for name in ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")},
}
"""Safetensors dtypes: name in numpy and MLX (if they have it), bytes per value."""

_NARROW_DTYPES = ("F4", "F6_E2M3", "F6_E3M2")
"""Safetensors dtypes of less than a byte, which are refused."""

_SAFETENSORS_NAMES = {dtype: name for name, (dtype, _) in _SAFETENSORS_DTYPES.items()}

Entry: TypeAlias = "tuple[tuple[int, ...], str, int]"

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""Limit of the reference implementation."""


def open_weights(path: str | Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Open a weights file (safetensors, torch or .npz, detected by content): lazy tensors and metadata.

    Raises:
        WeightsError: the file is missing or broken; see `header`, `torch_files.open_torch`, `npz.read_npz` and
            `scaled_weights.unscaled`.
    """
    tensors, metadata = _open_stored(Path(path))
    return unscaled(tensors, metadata, str(path)), metadata


def _open_stored(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """As `open_weights`, with scales as separate tensors."""
    if is_npz(path):
        return read_npz(path), {}
    if _is_torch_file(path):
        return open_torch(path)
    return _open_safetensors(path)


def _open_safetensors(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    entries, metadata = header(path)

    @cache
    def loaded() -> dict[str, mx.array]:
        try:
            with device_errors():
                return dict(mx.load(str(path), format="safetensors"))  # type: ignore[arg-type]
        except (RuntimeError, ValueError) as error:
            raise WeightsError(f"{path}: cannot be read by MLX ({error})") from error

    whole = _mlx_opens(path) and all(
        (hasattr(mx, dtype) and dtype != "float64") or dtype == FP8[0] for _, dtype, _ in entries.values()
    )

    def load(name: str) -> mx.array:
        shape, dtype, first = entries[name]
        if not whole:  # MLX refuses the whole file because of its name or one dtype
            return read_numbers(np.memmap(path, np.uint8, "r", first), f"{path}: {name}", dtype, shape)
        return decode_fp8(loaded()[name], dtype) if dtype in FP8 else loaded()[name]

    return {
        name: LazyTensor(shape, dtype, partial(load, name)) for name, (shape, dtype, _) in entries.items()
    }, metadata


def _is_torch_file(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError:  # `header` reports it
        return False
    if start[:4] == b"GGUF":
        raise WeightsError(f"{path}: a GGUF file, which is not supported; take a safetensors file with 16-bit weights")
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and any(start[4:8])):  # no safetensors header is that long
        return True
    return path.suffix != ".safetensors" and start[8:] != b"{"


_OTHER_FORMATS = (
    (b"version https://git-lfs", "a pointer of Git LFS: git lfs pull gets the file"),
    (b"PK", "a zip archive, as torch and .npz files are"),
    (b"\x93NUMPY", "a .npy file"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"<", "a web page"),
)


def _other_format(start: bytes) -> str:
    """What a file is by its first bytes; empty if unknown."""
    return next((text for mark, text in _OTHER_FORMATS if start.lstrip().startswith(mark)), "")


def header(path: str | Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Read the header of a safetensors file: (shape, dtype, first byte) by tensor name, and metadata.

    The header is validated against the file, which MLX does not do.

    Raises:
        WeightsError: the file is missing or not a complete safetensors file.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: {missing(path, 'no such weights file')}")
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES:
                raise ValueError(f"only {size} bytes")
            if length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                file.seek(0)
                if known := _other_format(file.read(64)):
                    raise ValueError(f"it is {known}")
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            text = file.read(length)
        content = json.loads(text.decode(), object_pairs_hook=_unique_keys)
        return _entries(content, _LENGTH_BYTES + length, size)
    except _Unsupported as error:
        raise WeightsError(f"{path}: {error}, which is not supported; save the weights as bfloat16") from error
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).replace("\n", " ")[:200]
        raise WeightsError(f"{path}: not a complete safetensors file ({reason}); copy or download it again") from error


class _Unsupported(Exception):
    """A sound file with a dtype that is not supported; the message names tensor and dtype."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("duplicate name in the header")
    return content


def _entries(content: Any, start: int, size: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries and metadata of a header; a ValueError unless its tensors fill the bytes from `start` to `size`."""
    if not isinstance(content, dict):
        raise ValueError("the header is not a JSON object")
    metadata = content.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("metadata values are not strings")
    entries: dict[str, Entry] = {}
    ranges = []
    for name, entry in content.items():
        try:
            shape, kind, (first, end) = entry["shape"], entry["dtype"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise ValueError(f"no shape, dtype or offsets of {name[:100]}") from None
        if kind in _NARROW_DTYPES:
            raise _Unsupported(f"{first_few([name])} is stored as {kind}")
        if not isinstance(kind, str) or kind not in _SAFETENSORS_DTYPES:
            raise ValueError(f"{name} has the unknown dtype {str(kind)[:20]}")
        whole = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS and all(type(n) is int for n in shape)
        if not whole or not all(0 <= n <= MAX_DIMENSION_SIZE for n in shape):
            raise ValueError(f"{name} has an impossible shape")
        dtype, width = _SAFETENSORS_DTYPES[kind]
        if type(first) is not int or type(end) is not int or end - first != prod(shape) * width:
            raise ValueError(f"{name} is {kind} of shape {shape}, which does not fit the bytes {first} to {end}")
        entries[name] = tuple(shape), dtype, start + first
        ranges.append((first, end, name))
    reached = 0
    for first, end, name in sorted(ranges):
        if first != reached:
            raise ValueError(f"{name} starts at byte {first}, its predecessor ends at {reached}")
        reached = end
    if start + reached != size:
        raise ValueError(f"tensors have {reached} bytes, the file {size - start}")
    return entries, metadata


def read_safetensors(path: str | Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Read a safetensors file: lazy tensors and metadata. float64 is read as float32, 8-bit floats as bfloat16.

    Raises:
        WeightsError: the file is missing, incomplete, or has dtypes that are not supported.
    """
    tensors, metadata = _open_safetensors(Path(path))
    return {name: stored.load() for name, stored in tensors.items()}, metadata


def write_safetensors(
    path: str | Path, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.writing.safetensors")
    try:
        arrays = {key: mx.contiguous(tensor) for key, tensor in sorted(tensors.items())}
        save_arrays(temporary, arrays, {"format": "pt", **(metadata or {})})
        _replace(temporary, path)
    except RuntimeError as error:  # MLX raises this when the disk is full
        raise OSError(f"{path}: cannot be written ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_arrays(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """`mx.save_safetensors` for any file name, and for metadata that contains file names.

    Raises:
        RuntimeError: the disk is full.
        DeviceError: arrays that are not computed yet cannot be computed.
    """
    texts = {key: printable(text) for key, text in (metadata or {}).items()}
    with device_errors():
        if _mlx_opens(path):
            mx.save_safetensors(str(path), dict(arrays), texts)
            return
        with path.open("wb") as file:
            mx.save_safetensors(file, dict(arrays), texts)


def _mlx_opens(path: Path) -> bool:
    """Whether MLX can open a file: its name is UTF-8."""
    return printable(path) == str(path)


def convert_safetensors(
    path: str | Path, tensors: dict[str, mx.array], dtype: mx.Dtype, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors in another precision, one at a time, atomically.

    Args:
        tensors: emptied, so that each tensor is freed once written.
        dtype: dtype of floating-point tensors; others, such as quantised weights, are unchanged.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    dtypes = {name: dtype if mx.issubdtype(one.dtype, mx.floating) else one.dtype for name, one in tensors.items()}
    texts = {key: printable(text) for key, text in (metadata or {}).items()}
    content: dict[str, Any] = {"__metadata__": {"format": "pt", **texts}}
    first = 0
    for name in sorted(tensors):
        end = first + tensors[name].size * dtypes[name].size
        content[name] = {
            "dtype": _SAFETENSORS_NAMES[str(dtypes[name]).removeprefix("mlx.core.")],
            "shape": tensors[name].shape,
            "data_offsets": [first, end],
        }
        first = end
    text = json.dumps(content).encode()
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


def open_folder(folder: str | Path, stem: str, variant: str | None = None) -> dict[str, LazyTensor]:
    """Open `{stem}.safetensors`, the shards of `{stem}.safetensors.index.json`, or `{stem}.bin`: lazy tensors.

    Args:
        variant: variant such as "fp16" (`{stem}.fp16.safetensors`); None: plain files, else fp16.

    Raises:
        WeightsError: no file, a shard is missing or broken, or the index names a file outside the folder.
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
    file = folder / f"{stem}{middles[0]}.safetensors"
    raise WeightsError(f"{file}: {missing(file, 'no such weights file')}")


def read_folder(folder: str | Path, stem: str, variant: str | None = None) -> dict[str, mx.array]:
    """As `open_folder`, with arrays; those of safetensors are lazy."""
    return {name: stored.load() for name, stored in open_folder(folder, stem, variant).items()}


def _open_shards(index: Path) -> dict[str, LazyTensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{index}: no weight_map; copy or download it again")
    tensors: dict[str, LazyTensor] = {}
    metadata: dict[str, str] = {}
    for name in sorted(set(map(str, weight_map.values()))):
        if Path(name).name != name or "\0" in name or len(name) > 255 or not _lies_in(index.parent, name):
            reason = missing(index.parent / name[:200], "which is not a file in this folder")
            raise WeightsError(f"{index}: names {name[:200]!r}, {reason}")
        shard, found = _open_stored(index.parent / name)
        tensors.update(shard)
        metadata.update(found)
    if absent := sorted(weight_map.keys() - tensors.keys()):
        raise WeightsError(f"{index}: its shards lack {first_few(absent)}")
    return unscaled(tensors, metadata, str(index))


def _lies_in(folder: Path, name: str) -> bool:
    """Whether a name stays inside a folder after resolving links; links inside the hub's cache are allowed."""
    home = folder.resolve()
    cache = next((parent.parent for parent in home.parents if parent.name == "snapshots"), home)
    try:
        return (folder / name).resolve().is_relative_to(cache if (cache / "blobs").is_dir() else home)
    except (OSError, RuntimeError, ValueError):  # name too long, cyclic links
        return False


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        WeightsError: the file is missing or not a JSON object.
    """
    path = Path(path)
    try:
        content = parse_json(read_text(path, WeightsError), parse_number=_number)
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: {missing(path, 'no such file')}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path}: not a JSON object")
    return content


def _number(text: str) -> float:
    """Parse a number; NaN and infinity, which JSON lacks, are refused."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a number")
    return number


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    try:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")  # names that are not UTF-8
        _replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _replace(temporary: Path, path: Path) -> None:
    """Move a complete file into place after syncing it to disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
