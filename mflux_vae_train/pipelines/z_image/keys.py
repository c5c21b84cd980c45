"""Key table of Z-Image's single files, as ComfyUI reads them. Names here are diffusers'.

Such files fuse queries, keys and values along the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from mflux_vae.weights.keymaps.rules import Rule, Tensors, from_mlx, to_mlx
from mflux_vae_train.pipelines.z_image.transformer import KIND

_PREFIX = "model.diffusion_model."
"""Prefix of every key in files for ComfyUI."""

_FUSED, _PARTS = ".attention.qkv.weight", tuple(f".attention.to_{part}.weight" for part in "qkv")

SINGLE_FILE = (
    Rule("x_embedder.{kind}", f"all_x_embedder.{KIND}.{{kind}}"),
    Rule("final_layer.{rest}", f"all_final_layer.{KIND}.{{rest}}"),
    Rule("norm_final.weight", None),
    Rule("{block}.attention.out.{kind}", "{block}.attention.to_out.0.{kind}"),
    Rule("{block}.attention.q_norm.{kind}", "{block}.attention.norm_q.{kind}"),
    Rule("{block}.attention.k_norm.{kind}", "{block}.attention.norm_k.{kind}"),
)
"""Names of single files with fused layers split, see `from_single_file`."""

_MARKS = ("noise_refiner.0.attention.", "context_refiner.0.attention.", "cap_embedder.", "cap_pad_token")
"""Beginnings of keys that only Z-Image has together, in both namings."""


def is_z_image(keys: Iterable[str]) -> bool:
    """Whether these are all keys of a Z-Image transformer, in any naming."""
    names = [key.removeprefix(_PREFIX) for key in keys]
    return all(any(name.startswith(mark) for name in names) for mark in _MARKS)


def is_single_file(keys: Iterable[str]) -> bool:
    """Whether these are keys of a single file."""
    return any(key.removeprefix(_PREFIX).startswith(("x_embedder.", "final_layer.")) for key in keys)


def from_single_file(tensors: Tensors) -> dict[str, mx.array]:
    """A single file's tensors under diffusers' names. Unknown keys are kept."""
    split: dict[str, mx.array] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if name.endswith(_FUSED) and tensor.shape[0] % len(_PARTS) == 0:
            block = name.removesuffix(_FUSED)
            split |= {f"{block}{part}": rows for part, rows in zip(_PARTS, mx.split(tensor, len(_PARTS)), strict=True)}
        else:
            split[name] = tensor
    return to_mlx(split, SINGLE_FILE)


def to_single_file(tensors: Tensors) -> dict[str, mx.array]:
    """The inverse of `from_single_file`, without a prefix."""
    fused: dict[str, mx.array] = {}
    for key, tensor in tensors.items():
        block = key.removesuffix(_PARTS[0])
        if block != key:
            fused[f"{block}{_FUSED}"] = mx.concatenate([tensors[f"{block}{part}"] for part in _PARTS])
        elif not key.endswith(_PARTS):
            fused[key] = tensor
    return from_mlx(fused, SINGLE_FILE)
