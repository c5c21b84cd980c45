"""Random initial weights of a text encoder."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten


def draw_weights(model: nn.Module, key: mx.array, std: Mapping[str, float], *, norm: float = 1.0) -> None:
    """Set the weights of a model; equal keys give equal weights.

    Args:
        std: standard deviation of the normal weights by name of the layer, the last but one component of a path.
        norm: weight of all other layers. Biases are 0.
    """
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    drawn = []
    for (path, value), one in zip(parameters.items(), mx.random.split(key, len(parameters)), strict=True):
        layer, kind = path.split(".")[-2:]
        if kind == "bias":
            new = mx.zeros(value.shape)
        elif layer in std:
            new = std[layer] * mx.random.normal(value.shape, key=one)
        else:
            new = mx.full(value.shape, norm)
        drawn.append((path, new))
    model.update(tree_unflatten(drawn))
