"""Which weights a run began from: a hash that costs little, however large they are."""

from __future__ import annotations

import hashlib

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

SAMPLED = 64
"""Values looked at in each tensor, evenly spread over it."""


def of_weights(module: nn.Module) -> str:
    """A hash of the names and shapes of all parameters, and of some values of each.

    Equal for equal weights wherever they were read from. Another training of the same network changes nearly every
    value of the tensors that it changes, so that a sample of each tells them apart. Dtypes do not count: the same file
    is bfloat16 on one device and float32 on another.
    """
    digest = hashlib.sha256()
    parameters: dict[str, mx.array] = dict(tree_flatten(module.parameters()))
    for name, array in sorted(parameters.items()):
        digest.update(f"{name} {tuple(array.shape)}\n".encode())
        places = np.linspace(0, array.size - 1, min(SAMPLED, array.size)).astype(np.int64)
        if places.size:
            digest.update(np.array(array.reshape(-1)[mx.array(places)].astype(mx.float32)).tobytes())
    return digest.hexdigest()[:16]
