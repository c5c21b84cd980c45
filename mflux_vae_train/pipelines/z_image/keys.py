"""Key tables of Z-Image's weights in single files for ComfyUI and in folders of mflux. Names here are diffusers'."""

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
"""Names of single files with fused layers split, see `our_names`."""

MFLUX_TRANSFORMER = (
    Rule("t_embedder.linear1.{kind}", "t_embedder.mlp.0.{kind}"),
    Rule("t_embedder.linear2.{kind}", "t_embedder.mlp.2.{kind}"),
    Rule(f"all_final_layer.{KIND}.adaLN_modulation.0.{{kind}}", f"all_final_layer.{KIND}.adaLN_modulation.1.{{kind}}"),
    Rule("rope_embedder.{rest}", None),
)
MFLUX_VAE = (
    Rule("{path}.conv2d.{kind}", "{path}.{kind}"),
    Rule("decoder.conv_{end}.conv.{kind}", "decoder.conv_{end}.{kind}"),
    Rule("{half}.conv_norm_out.norm.{kind}", "{half}.conv_norm_out.{kind}"),
)
"""mflux stores convolution weights in MLX's layout."""

_MARKS = ("noise_refiner.0.attention.", "context_refiner.0.attention.", "cap_embedder.", "cap_pad_token")
"""Beginnings of keys that only Z-Image has together, in both namings."""


def is_z_image(keys: Iterable[str]) -> bool:
    """Whether these are all keys of a Z-Image transformer, in any naming."""
    names = unprefixed(keys)
    return all(any(name.startswith(mark) for name in names) for mark in _MARKS)


def our_names(tensors: Tensors) -> dict[str, mx.array]:
    """Tensors of any naming under diffusers' names. Unknown keys are kept."""
    return to_mlx(split_fused(tensors, _SHARES), (*SINGLE_FILE, *MFLUX_TRANSFORMER))


def to_single_file(tensors: Tensors) -> dict[str, mx.array]:
    """A single file's tensors, without a prefix."""
    return join_fused(from_mlx(tensors, SINGLE_FILE), _SHARES)
