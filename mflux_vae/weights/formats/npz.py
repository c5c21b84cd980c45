"""Arrays as MLX's `save_weights` and NumPy's `savez` store them (.npz), read without executing anything.

An uncompressed zip archive of .npy files: magic and version, a header (dtype, order and shape as a Python literal),
then the numbers (NumPy's NEP 1).
"""

from __future__ import annotations

import io
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from mflux_vae.weights.formats.lazy_tensor import LARGEST_DIMENSION, MOST_DIMENSIONS, Stored, read_numbers
from mflux_vae.weights.formats.safe_reading import BROKEN, Refused, told
from mflux_vae.weights.formats.zip_archive import MAGIC, Archive

_SUFFIX = ".npy"
_HEADERS: dict[tuple[int, int], Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
"""By version. NumPy's readers take at most 10,000 characters, and literals only."""

_MOST_HEADER = 2**14


def is_npz(path: str | Path) -> bool:
    """Whether a file is a zip archive of .npy files."""
    try:
        with Path(path).open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return False
            names = Archive(file, "").names
    except BROKEN:  # told by whoever reads it
        return False
    return bool(names) and all(name.endswith(_SUFFIX) for name in names)


def read_npz(path: str | Path) -> dict[str, Stored]:
    """The arrays of an .npz file by their names; loaded when asked for, float64 as float32.

    Raises:
        WeightsError: no such file; not a whole .npz file; arrays that are compressed, of objects, or of another size
            than their bytes.
    """
    path = Path(path)
    with told(path, "an .npz file"):
        with path.open("rb") as file:
            archive = Archive(file, "mx.savez")
            places = {name.removesuffix(_SUFFIX): archive.place(name) for name in archive.names}
        data = np.memmap(path, np.uint8, "r")
        return {name: _stored(name, data[first : first + size]) for name, (first, size) in places.items()}


def _stored(name: str, data: np.ndarray) -> Stored:
    """The array of one .npy file (n,) uint8."""
    head = io.BytesIO(data[:_MOST_HEADER].tobytes())
    if (version := np.lib.format.read_magic(head)) not in _HEADERS:
        raise Refused(f"{name} is of version {version[0]}.{version[1]} of the format")
    shape, columns_first, dtype = _HEADERS[version](head)
    numbers = data[head.tell() :]
    bfloat16 = dtype == np.dtype("V2")  # NumPy has no such dtype, and MLX writes it so
    if not bfloat16 and (dtype.kind not in "biuf" or dtype != dtype.newbyteorder("<") or dtype.itemsize > 8):
        raise Refused(f"{name} is of {dtype.str}; only plain little-endian numbers are read")
    if len(shape) > MOST_DIMENSIONS or not all(0 <= n <= LARGEST_DIMENSION for n in shape):
        raise Refused(f"{name} has an impossible shape")
    if prod(shape) * dtype.itemsize != len(numbers):
        raise Refused(f"{name} is {shape}, which {len(numbers)} bytes are stored for")
    kind = "bfloat16" if bfloat16 else dtype.name
    strides = list(accumulate(shape[:-1], lambda a, b: a * b, initial=1)) if columns_first and shape else None
    return Stored(tuple(shape), kind, partial(read_numbers, numbers, name, kind, shape, strides))
