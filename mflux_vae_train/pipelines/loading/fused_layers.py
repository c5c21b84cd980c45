"""Layers that single files fuse along their outputs, such as queries, keys and values, and the prefix of their keys."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import mlx.core as mx

from mflux_vae.weights.keymaps.rules import Tensors

COMFYUI = "model.diffusion_model."
"""Prefix of every key in files for ComfyUI."""

QKV = {"q": 1, "k": 1, "v": 1}

Shares: TypeAlias = Mapping[str, Mapping[str, int]]
"""Last component of a fused layer's path -> its parts in order, and their relative numbers of outputs."""


def unprefixed(names: Iterable[str]) -> list[str]:
    """Keys without ComfyUI's prefix."""
    return [name.removeprefix(COMFYUI) for name in names]


def split_fused(tensors: Tensors, shares: Shares) -> dict[str, mx.array]:
    """Split fused layers, ``{layer}.weight`` -> ``{layer}.{part}.weight``; keys lose ComfyUI's prefix.

    A tensor that does not divide is kept.
    """
    split: dict[str, mx.array] = {}
    for key, tensor in tensors.items():
        path, _, kind = key.removeprefix(COMFYUI).rpartition(".")
        parts = shares.get(path.rpartition(".")[2])
        if parts is None or tensor.shape[0] % sum(parts.values()):
            split[f"{path}.{kind}" if path else kind] = tensor
            continue
        width = tensor.shape[0] // sum(parts.values())
        ends = [width * sum(list(parts.values())[:count]) for count in range(1, len(parts))]
        for part, values in zip(parts, mx.split(tensor, ends), strict=True):
            split[f"{path}.{part}.{kind}"] = values
    return split


def join_fused(tensors: Tensors, shares: Shares) -> dict[str, mx.array]:
    """The inverse of `split_fused`, without a prefix."""
    fused: dict[str, mx.array] = {}
    parts: dict[str, dict[str, mx.array]] = {}
    for key, tensor in tensors.items():
        path, _, kind = key.rpartition(".")
        layer, _, part = path.rpartition(".")
        if part in shares.get(layer.rpartition(".")[2], ()):
            parts.setdefault(f"{layer}.{kind}", {})[part] = tensor
        else:
            fused[key] = tensor
    for key, of_layer in parts.items():
        order = shares[key.rpartition(".")[0].rpartition(".")[2]]
        fused[key] = mx.concatenate([of_layer[part] for part in order])
    return fused


def halves_swapped(tensor: mx.array) -> mx.array:
    """For modulations, whose shift and scale are in the other order in diffusers."""
    first, second = mx.split(tensor, 2)
    return mx.concatenate([second, first])
