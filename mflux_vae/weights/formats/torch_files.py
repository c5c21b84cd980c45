"""torch's files (.ckpt, .pt, .pth) read without torch, and without executing anything.

zip format (torch >= 1.6)    NAME/data.pkl, NAME/data/KEY (one storage each, not compressed), NAME/byteorder
older format                 pickles: magic number, version, system, object, storage keys; then each storage's bytes
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

from mflux_vae.weights.formats.lazy_tensor import LARGEST_DIMENSION, Stored, read_numbers, width
from mflux_vae.weights.formats.safe_reading import Refused, told
from mflux_vae.weights.formats.torch_pickle import Placeholder, Storage, Tensor, interpret
from mflux_vae.weights.formats.zip_archive import MAGIC, Archive

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_LONGEST_KEY = 1000


def read_torch(path: str | Path) -> dict[str, Stored]:
    """The tensors of a torch file, by their keys in its nested dictionaries, joined with dots; loaded when asked for.

    float64 is loaded as float32; other dtypes keep their bits.

    Raises:
        WeightsError: no such file; not a whole torch file; one that holds other things than tensors and containers
            (whole modules, functions to call), or tensors that reach beyond their data.
    """
    path = Path(path)
    with told(path, "a torch file"):
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
            content, where = (_read_zip if start == MAGIC else _read_old)(file)
        data = np.memmap(path, np.uint8, "r")
        return {name: _stored(name, tensor, where, data) for name, tensor in _flatten(content)}


_Places: TypeAlias = "dict[str, tuple[int, int]]"
"""Storage key -> first byte and number of bytes in the file."""


def _read_zip(file: IO[bytes]) -> tuple[Any, _Places]:
    archive = Archive(file, "torch")
    top = next((name.removesuffix("data.pkl") for name in archive.names if name.endswith("/data.pkl")), None)
    if top is None or top.count("/") != 1:
        raise Refused("a zip archive without data.pkl; not written by torch.save")
    if f"{top}constants.pkl" in archive.names:
        raise Refused("a TorchScript archive, which holds a program; save its state_dict instead")
    order = archive.read(f"{top}byteorder") if f"{top}byteorder" in archive.names else b"little"
    if order != b"little":
        raise Refused(f"its byte order is {order[:20]!r}; only little-endian files are read")
    storages: dict[str, Storage] = {}
    content = interpret(archive.read(f"{top}data.pkl"), storages)
    return content, {key: archive.place(f"{top}data/{key}") for key in storages}


def _read_old(file: IO[bytes]) -> tuple[Any, _Places]:
    length = file.seek(0, 2)
    if not length:
        raise Refused("it is empty")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:1] != b"\x80":
            tar = data[257:262] == b"ustar"
            raise Refused(
                "the tar format of torch 0.1; save it anew" if tar else "no format of torch's, nor safetensors"
            )
        if interpret(data) != _MAGIC or interpret(data) != _VERSION:
            raise Refused("a pickle, but not one of torch.save's")
        interpret(data)  # of the machine that wrote it
        storages: dict[str, Storage] = {}
        content = interpret(data, storages)
        places: dict[str, tuple[int, int]] = {}
        for key in interpret(data):
            if key not in storages or not storages[key].dtype:
                raise Refused(f"storage {key!r} is of no tensor")
            (count,) = struct.unpack("<q", data.read(8))
            size = count * (width(storages[key].dtype) or 1)
            if not 0 <= size <= length - data.tell():
                raise Refused(f"storage {key!r} reaches beyond the end of the file")
            places[key] = data.tell(), size
            data.seek(size, 1)
    return content, places


def _flatten(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dictionaries by their keys, joined with dots; each dictionary once."""
    if not isinstance(content, dict):
        kind = content.kind if isinstance(content, Placeholder) else type(content).__name__
        raise Refused(f"it holds one {kind}, not a dictionary of tensors")
    pending, seen = [("", content)], set()
    while pending:
        prefix, item = pending.pop()
        if len(prefix) > _LONGEST_KEY:
            raise Refused("its dictionaries are nested without end")
        if isinstance(item, dict) and id(item) not in seen:
            seen.add(id(item))
            pending.extend(
                (f"{prefix}.{key}" if prefix else key, value) for key, value in item.items() if type(key) is str
            )
        elif isinstance(item, Tensor):
            yield prefix, item


def _stored(name: str, tensor: Tensor, where: _Places, data: np.ndarray) -> Stored:
    """A tensor that is checked to lie within its storage, and that within the file."""
    size_of_one, count = width(tensor.dtype) or 1, prod(tensor.shape)
    first, size = where[tensor.storage.key] if count else (0, 0)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    # a view that repeats elements could be of any size, whatever the file's
    needed = size_of_one * max(count, last + 1) if count else 0
    if needed > size or max(tensor.shape, default=0) > LARGEST_DIMENSION:
        raise Refused(f"{name} is {tensor.shape}, which {size} bytes are stored for")
    numbers = data[first + size_of_one * tensor.offset : first + size]
    return Stored(
        tensor.shape,
        tensor.dtype,
        partial(read_numbers, numbers, name, tensor.dtype, tensor.shape, tensor.strides),
    )
