"""Initial weights with which a small autoencoder trains in minutes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mflux_vae_train.randomness import Stream, rng

LOGVAR_BIAS = -5.0
"""Initial log variance: a narrow posterior, so that noise does not hide the latents from the decoder."""

_MOMENTS = ("quant_conv.bias", "encoder.conv_out.bias")
"""Bias of the last layer before the posterior, by network; its second half is the log variance."""


def orthogonal(network: Any, seed: int) -> None:
    """Set kernels with orthonormal rows, zero residual branches, zero biases and a narrow posterior."""
    draw = rng(seed, Stream.INIT)
    weights: dict[str, mx.array] = dict(tree_flatten(network.parameters()))
    moments = next((name for name in _MOMENTS if name in weights), None)
    new: list[tuple[str, mx.array]] = []
    for name, value in weights.items():
        if value.ndim == 4:
            u, _, v = np.linalg.svd(draw.standard_normal((value.shape[0], value.size // value.shape[0])), False)
            branch = ".conv2." in name
            new.append((name, mx.array(np.zeros(value.shape) if branch else (u @ v).reshape(value.shape), mx.float32)))
        elif name.endswith(".bias") and ".norm" not in name:
            bias = np.zeros(value.shape, np.float32)
            if name == moments:
                bias[value.size // 2 :] = LOGVAR_BIAS
            elif name == "encoder.logvar.bias":
                bias[:] = LOGVAR_BIAS
            new.append((name, mx.array(bias)))
    network.update(tree_unflatten(new))
