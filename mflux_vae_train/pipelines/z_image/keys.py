"""Key table of Z-Image's single files, as ComfyUI reads them. Names here are diffusers'."""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx

from mflux_vae.weights.keymaps.rules import Rule, Tensors, from_mlx, to_mlx
from mflux_vae_train.pipelines.loading.fused_layers import QKV, join_fused, split_fused, unprefixed
from mflux_vae_train.pipelines.z_image.transformer import KIND

_SHARES = {"qkv": QKV}

SINGLE_FILE = (
    Rule("x_embedder.{kind}", f"all_x_embedder.{KIND}.{{kind}}"),
    Rule("final_layer.{rest}", f"all_final_layer.{KIND}.{{rest}}"),
    Rule("norm_final.weight", None),
    *(Rule(f"{{block}}.attention.qkv.{part}.{{kind}}", f"{{block}}.attention.to_{part}.{{kind}}") for part in QKV),
    Rule("{block}.attention.out.{kind}", "{block}.attention.to_out.0.{kind}"),
    Rule("{block}.attention.q_norm.{kind}", "{block}.attention.norm_q.{kind}"),
    Rule("{block}.attention.k_norm.{kind}", "{block}.attention.norm_k.{kind}"),
)
"""Names of single files with fused layers split, see `from_single_file`."""

_MARKS = ("noise_refiner.0.attention.", "context_refiner.0.attention.", "cap_embedder.", "cap_pad_token")
"""Beginnings of keys that only Z-Image has together, in both namings."""


def is_z_image(keys: Iterable[str]) -> bool:
    """Whether these are all keys of a Z-Image transformer, in any naming."""
    names = unprefixed(keys)
    return all(any(name.startswith(mark) for name in names) for mark in _MARKS)


def from_single_file(tensors: Tensors) -> dict[str, mx.array]:
    """Tensors of any naming under diffusers' names. Unknown keys are kept."""
    return to_mlx(split_fused(tensors, _SHARES), SINGLE_FILE)


def to_single_file(tensors: Tensors) -> dict[str, mx.array]:
    """The inverse of `from_single_file`, without a prefix."""
    return join_fused(from_mlx(tensors, SINGLE_FILE), _SHARES)
