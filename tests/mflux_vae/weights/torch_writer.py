"""torch's files, written without torch: opcodes are put together by hand, broken and hostile ones, too."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

KINDS = {"float32": "Float", "float64": "Double", "float16": "Half", "uint16": "BFloat16", "int64": "Long"}
"""Storage classes; the bits of bfloat16 come as uint16."""

PROTOCOL = b"\x80\x02"
HEAD = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})


def name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def dump(value: Any) -> bytes:
    """Opcodes of strings, whole numbers, tuples, lists and dicts; bytes are opcodes already."""
    match value:
        case bytes():
            return value
        case bool():
            return b"\x88" if value else b"\x89"
        case None:
            return b"N"
        case int():
            size = (value.bit_length() + 8) // 8
            return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)
        case str():
            return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return b"(" + b"".join(map(dump, value)) + b"t"
        case list():
            return b"](" + b"".join(map(dump, value)) + b"e"
        case dict():
            return b"}(" + b"".join(dump(key) + dump(item) for key, item in value.items()) + b"u"
    raise TypeError(value)


def call(function: bytes, *arguments: Any) -> bytes:
    return function + dump(arguments) + b"R"


def tensor(
    key: str, kind: str, size: int, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0, old: bool = False
) -> bytes:
    """A view of the storage `key` of `size` numbers."""
    storage = ("storage", name("torch", f"{kind}Storage"), key, "cpu", size, *([None] if old else []))
    ordered = call(name("collections", "OrderedDict"))
    return call(
        name("torch._utils", "_rebuild_tensor_v2"), dump(storage) + b"Q", offset, shape, strides, False, ordered
    )


def of_arrays(arrays: dict[str, np.ndarray], old: bool = False) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Opcodes of each array by name, and each storage's bytes by key."""
    tensors, storages = {}, {}
    for index, (key, array) in enumerate(arrays.items()):
        base = array if array.base is None else array.base
        if not base.flags.c_contiguous or base.dtype != array.dtype:
            base = array = array.copy(order="C")
        strides = tuple(step // array.itemsize for step in array.strides)
        tensors[key] = tensor(str(index), KINDS[array.dtype.name], base.size, array.shape, strides, old=old)
        storages[str(index)] = base.tobytes()
    return tensors, storages


def write_zip(path: Path, content: Any, storages: dict[str, bytes], **changes: Any) -> Path:
    """The format since torch 1.6."""
    with zipfile.ZipFile(path, "w", changes.pop("compression", zipfile.ZIP_STORED)) as archive:
        archive.writestr("archive/data.pkl", PROTOCOL + dump(content) + b".")
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
        for entry, data in changes.items():
            archive.writestr(f"archive/{entry}", data)
    return path


def write_old(path: Path, content: Any, storages: dict[str, bytes], itemsize: int = 4) -> Path:
    """The format before."""
    pickles = [*HEAD, content, list(storages)]
    data = b"".join(struct.pack("<q", len(part) // itemsize) + part for part in storages.values())
    path.write_bytes(b"".join(PROTOCOL + dump(part) + b"." for part in pickles) + data)
    return path
