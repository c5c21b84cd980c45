"""What identifies a run: the settings that shape its result, and hashes of its files and base weights."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mflux_vae.runtime.threads import exclusive

SAMPLES_PER_TENSOR = 64
"""Values of each tensor that count, evenly spread over it."""

EVALUATED = 16
"""Tensors that are sampled at a time: those of half precision are there in float32, too."""

MAX_HASHED_BYTES = 2**28
"""Total size of the tensors that are sampled. Weights are loaded on first use; this bounds how many are loaded."""


def settings_identity(settings: Any, free: Collection[str]) -> dict[str, Any]:
    """All fields of a settings dataclass, nested ones included, except `free`: those that may change on resume."""

    def shaping(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: shaping(child) for name, child in value.items() if name not in free}
        return [shaping(child) for child in value] if isinstance(value, list | tuple) else value

    identity: dict[str, Any] = shaping(dataclasses.asdict(settings))
    return identity


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def weights_hash(module: nn.Module) -> str:
    """A hash of the names and shapes of all parameters and of sampled values of some; of all parameters if small.

    Equal for equal weights, whichever file they were loaded from. Another training of the same network changes nearly
    all values of tensors in every part of it, so a sample detects it. Dtypes do not count: the same file is loaded as
    bfloat16 on one device and as float32 on another.
    """
    parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    parts: list[bytes | mx.array] = []
    left = MAX_HASHED_BYTES
    for name in sorted(parameters, key=lambda name: hashlib.sha256(name.encode()).digest()):
        array = parameters[name]
        parts.append(f"{name} {tuple(array.shape)}\n".encode())
        if 0 < 4 * array.size <= left:  # counted as float32, so that all devices sample the same tensors
            left -= 4 * array.size
            indices = np.linspace(0, array.size - 1, min(SAMPLES_PER_TENSOR, array.size)).astype(np.int64)
            parts.append(array.reshape(-1)[mx.array(indices)].astype(mx.float32))
    samples = [part for part in parts if isinstance(part, mx.array)]
    with exclusive():  # the weights may be lazy, on a stream of all threads
        for first in range(0, len(samples), EVALUATED):
            mx.eval(samples[first : first + EVALUATED])
    content = b"".join(part if isinstance(part, bytes) else np.array(part).tobytes() for part in parts)
    return hashlib.sha256(content).hexdigest()[:16]
