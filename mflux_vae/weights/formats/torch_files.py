"""Read torch files (.ckpt, .pt, .pth) without torch and without executing code.

zip format (torch >= 1.6)    NAME/data.pkl, NAME/data/KEY (a storage each, not compressed), NAME/byteorder
legacy format                pickles: magic number, version, system, object, storage keys; then the storages
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np

from mflux_vae.weights.formats.lazy_tensor import MAX_DIMENSION_SIZE, LazyTensor, read_numbers, width
from mflux_vae.weights.formats.safe_reading import InvalidFile, reading
from mflux_vae.weights.formats.torch_pickle import Placeholder, Storage, Tensor, interpret
from mflux_vae.weights.formats.zip_archive import MAGIC, Archive

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_MAX_KEY_LENGTH = 1000

STEPS = "global_step"


def read_torch(path: str | Path) -> dict[str, LazyTensor]:
    """The tensors of `open_torch`."""
    return open_torch(path)[0]


def open_torch(path: str | Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Open the tensors of a torch file lazily; keys of nested dictionaries are joined with dots. And its metadata.

    The metadata is the number of updates, `global_step`, which PyTorch Lightning stores beside the tensors.
    float64 is read as float32, 8-bit floats as bfloat16; other dtypes are unchanged.

    Raises:
        WeightsError: the file is missing or incomplete, holds other objects than tensors and containers, or has
            tensors that exceed their data.
    """
    path = Path(path)
    with reading(path, "a torch file"):
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
            content, ranges = (_read_zip if start == MAGIC else _read_old)(file)
        data = np.memmap(path, np.uint8, "r")
        tensors = {name: _lazy_tensor(path, name, tensor, ranges, data) for name, tensor in _flatten(content)}
        steps = content.get(STEPS)
        return tensors, {STEPS: str(steps)} if type(steps) is int else {}


_Ranges: TypeAlias = "dict[str, tuple[int, int]]"
"""Storage key -> first byte and number of bytes in the file."""


def _read_zip(file: IO[bytes]) -> tuple[Any, _Ranges]:
    archive = Archive(file, "torch")
    top = next((name.removesuffix("data.pkl") for name in archive.names if name.endswith("/data.pkl")), None)
    if top is None or top.count("/") != 1:
        raise InvalidFile(
            "a zip archive without data.pkl, not written by torch.save; unpack it if it holds weights files"
        )
    if f"{top}constants.pkl" in archive.names:
        raise InvalidFile("a TorchScript archive; save its state_dict instead")
    order = archive.read(f"{top}byteorder") if f"{top}byteorder" in archive.names else b"little"
    if order != b"little":
        raise InvalidFile(f"byte order {order[:20]!r}; only little-endian files are supported")
    storages: dict[str, Storage] = {}
    content = interpret(archive.read(f"{top}data.pkl"), storages)
    return content, {key: archive.byte_range(f"{top}data/{key}") for key in storages}


def _read_old(file: IO[bytes]) -> tuple[Any, _Ranges]:
    length = file.seek(0, 2)
    if not length:
        raise InvalidFile("the file is empty")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:1] != b"\x80":
            tar = data[257:262] == b"ustar"
            raise InvalidFile(
                "the tar format of torch 0.1; save it again" if tar else "neither a torch file nor safetensors"
            )
        if interpret(data) != _MAGIC or interpret(data) != _VERSION:
            raise InvalidFile("a pickle that torch.save did not write")
        interpret(data)  # description of the writing machine
        storages: dict[str, Storage] = {}
        content = interpret(data, storages)
        ranges: dict[str, tuple[int, int]] = {}
        for key in interpret(data):
            if key not in storages or not storages[key].dtype:
                raise InvalidFile(f"storage {key!r} belongs to no tensor")
            (count,) = struct.unpack("<q", data.read(8))
            size = count * (width(storages[key].dtype) or 1)
            if not 0 <= size <= length - data.tell():
                raise InvalidFile(f"storage {key!r} exceeds the file")
            ranges[key] = data.tell(), size
            data.seek(size, 1)
    return content, ranges


def _flatten(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dictionaries by keys joined with dots; each dictionary once."""
    if not isinstance(content, dict):
        kind = content.kind if isinstance(content, Placeholder) else type(content).__name__
        raise InvalidFile(f"it holds a {kind}, not a dictionary of tensors")
    pending, seen = [("", content)], set()
    while pending:
        prefix, item = pending.pop()
        if len(prefix) > _MAX_KEY_LENGTH:
            raise InvalidFile("dictionaries are nested too deeply")
        if isinstance(item, dict) and id(item) not in seen:
            seen.add(id(item))
            pending.extend(
                (f"{prefix}.{key}" if prefix else key, value) for key, value in item.items() if type(key) is str
            )
        elif isinstance(item, Tensor):
            yield prefix, item


def _lazy_tensor(path: Path, name: str, tensor: Tensor, ranges: _Ranges, data: np.ndarray) -> LazyTensor:
    """Check that a tensor lies within its storage, and the storage within the file."""
    size_of_one, count = width(tensor.dtype) or 1, prod(tensor.shape)
    first, size = ranges[tensor.storage.key] if count else (0, 0)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    # a view with repeated elements could have any size
    needed = size_of_one * max(count, last + 1) if count else 0
    if needed > size or max(tensor.shape, default=0) > MAX_DIMENSION_SIZE:
        raise InvalidFile(f"{name} has shape {tensor.shape} but {size} bytes")
    numbers = data[first + size_of_one * tensor.offset : first + size]
    return LazyTensor(
        tensor.shape,
        tensor.dtype,
        partial(read_numbers, numbers, f"{path}: {name}", tensor.dtype, tensor.shape, tensor.strides),
    )
