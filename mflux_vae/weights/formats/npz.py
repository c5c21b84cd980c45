"""Read .npz files of MLX's `save_weights` and NumPy's `savez` without executing code.

An uncompressed zip archive of .npy files: magic and version, header (dtype, order and shape as a Python literal),
values (NumPy's NEP 1).
"""

from __future__ import annotations

import io
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mflux_vae.weights.formats.lazy_tensor import MAX_DIMENSION_SIZE, MAX_DIMENSIONS, LazyTensor, read_numbers
from mflux_vae.weights.formats.safe_reading import BROKEN, InvalidFile, reading
from mflux_vae.weights.formats.zip_archive import MAGIC, Archive

_SUFFIX = ".npy"
_HEADERS: dict[tuple[int, int], Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
"""Header readers by version; NumPy limits headers to 10,000 characters of literals."""

_MAX_HEADER = 2**14


def is_npz(path: str | Path) -> bool:
    """Whether a file is a zip archive of .npy files."""
    try:
        with Path(path).open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return False
            names = Archive(file, "").names
    except BROKEN:  # the reader reports it
        return False
    return bool(names) and all(name.endswith(_SUFFIX) for name in names)


def read_npz(path: str | Path) -> dict[str, LazyTensor]:
    """Open the arrays of an .npz file by name, lazily; float64 is read as float32.

    Raises:
        WeightsError: the file is missing or incomplete, or has compressed arrays, objects or inconsistent sizes.
    """
    path = Path(path)
    with reading(path, "an .npz file"):
        with path.open("rb") as file:
            archive = Archive(file, "mx.savez")
            ranges = {name.removesuffix(_SUFFIX): archive.byte_range(name) for name in archive.names}
        data = np.memmap(path, np.uint8, "r")
        return {name: _lazy_tensor(path, name, data[first : first + size]) for name, (first, size) in ranges.items()}


def _lazy_tensor(path: Path, name: str, data: np.ndarray) -> LazyTensor:
    """The array of an .npy file given as uint8 (n,)."""
    head = io.BytesIO(data[:_MAX_HEADER].tobytes())
    if (version := np.lib.format.read_magic(head)) not in _HEADERS:
        raise InvalidFile(f"{name} has the unknown format version {version[0]}.{version[1]}")
    shape, columns_first, dtype = _HEADERS[version](head)
    numbers = data[head.tell() :]
    bfloat16 = dtype == np.dtype("V2")  # MLX writes bfloat16 this way
    if not bfloat16 and (dtype.kind not in "biuf" or dtype != dtype.newbyteorder("<") or dtype.itemsize > 8):
        raise InvalidFile(f"{name} has dtype {dtype.str}; only little-endian numbers are supported")
    if len(shape) > MAX_DIMENSIONS or not all(0 <= n <= MAX_DIMENSION_SIZE for n in shape):
        raise InvalidFile(f"{name} has an impossible shape")
    if prod(shape) * dtype.itemsize != len(numbers):
        raise InvalidFile(f"{name} has shape {shape} but {len(numbers)} bytes")
    kind = "bfloat16" if bfloat16 else dtype.name
    strides = list(accumulate(shape[:-1], lambda a, b: a * b, initial=1)) if columns_first and shape else None
    return LazyTensor(tuple(shape), kind, partial(read_numbers, numbers, f"{path}: {name}", kind, shape, strides))
