"""Random weights as a function of a tensor's name and shape, so that every implementation draws the same."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def tensor(name: str, shape: tuple[int, ...], gain: float = 1.0) -> np.ndarray:
    """float32 in torch's layout: std gain / sqrt(fan_in); norm weights near 1, biases near 0."""
    draws = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
    if len(shape) > 1:
        return draws * np.float32(gain / np.sqrt(np.prod(shape[1:])))
    return draws * np.float32(0.1) + np.float32(name.endswith("weight"))


def fill_torch(model: Any, gains: Mapping[str, float] | None = None, prefix: str = "") -> None:
    """Fill a torch module; `prefix` is added to names that lack it."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            name = name if name.startswith(prefix) else prefix + name
            parameter.copy_(torch.from_numpy(tensor(name, tuple(parameter.shape), gain_of(name, gains))))


def fill_mlx(model: Any, gains: Mapping[str, float] | None = None) -> None:
    """Fill an MLX module that has torch's parameter names, kernels in MLX's layout."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten

    drawn = []
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name, parameter in parameters.items():
        shape, gain = parameter.shape, gain_of(name, gains)
        if len(shape) == 4 and "transposed" in name:  # (O, kh, kw, I) <- (I, O, kh, kw)
            array = tensor(name, (shape[3], shape[0], shape[1], shape[2]), gain).transpose(1, 2, 3, 0)
        elif len(shape) == 4:  # (O, kh, kw, I) <- (O, I, kh, kw)
            array = tensor(name, (shape[0], shape[3], shape[1], shape[2]), gain).transpose(0, 2, 3, 1)
        else:
            array = tensor(name, shape, gain)
        drawn.append((name, mx.array(np.ascontiguousarray(array))))
    model.update(tree_unflatten(drawn))
    mx.eval(model.parameters())


def gain_of(name: str, gains: Mapping[str, float] | None) -> float:
    """Gain of the first entry contained in the name, else 1."""
    return next((gain for part, gain in (gains or {}).items() if part in name), 1.0)


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 inputs."""
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)
