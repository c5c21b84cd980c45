"""Which weights and files a run began from: hashes, wherever those lie and whatever they are called."""

from __future__ import annotations

import hashlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

SAMPLES_PER_TENSOR = 64
"""Values looked at in each tensor, evenly spread over it."""

MAX_HASHED_BYTES = 2**28
"""Bytes of the tensors that are looked into. Weights are read when they are first used: no more is read for this."""


def file_hash(path: Path) -> str:
    """The hash of a file's bytes, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def weights_hash(module: nn.Module) -> str:
    """A hash of the names and shapes of all parameters, and of some values of some of them: of all where they are few.

    Equal for equal weights wherever they were read from. Another training of the same network changes nearly every
    value of the tensors that it changes, and tensors in every part of it, so that a sample tells them apart. Dtypes do
    not count: the same file is bfloat16 on one device and float32 on another.
    """
    digest = hashlib.sha256()
    parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    left = MAX_HASHED_BYTES
    for name in sorted(parameters, key=lambda name: hashlib.sha256(name.encode()).digest()):
        array = parameters[name]
        digest.update(f"{name} {tuple(array.shape)}\n".encode())
        if 0 < 4 * array.size <= left:  # as if all were float32, so that no device looks at others
            left -= 4 * array.size
            places = mx.array(np.linspace(0, array.size - 1, min(SAMPLES_PER_TENSOR, array.size)).astype(np.int64))
            digest.update(np.array(array.reshape(-1)[places].astype(mx.float32)).tobytes())
    return digest.hexdigest()[:16]
