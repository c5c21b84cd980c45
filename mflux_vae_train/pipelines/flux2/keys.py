"""Key tables of FLUX.2's weights in Black Forest Labs' single files and in mflux; names here are diffusers'.

The former fuse queries, keys and values of double blocks, and order the last modulation as shift, scale; in diffusers
it is scale, shift. Layers of single blocks are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import mlx.core as mx

from mflux_vae.weights.keymaps.rules import Rule, Tensors, from_mlx, to_mlx
from mflux_vae_train.pipelines.loading.fused_layers import (
    QKV,
    halves_swapped,
    join_fused,
    split_fused,
    unprefixed,
)

DOUBLE = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
}
SINGLE = {"linear1": ("attn.to_qkv_mlp_proj",), "linear2": ("attn.to_out",)}
"""Linear layers of a block: original name, and names here, several for a fused layer."""

OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
"""Linear layers outside the blocks, without the last modulation."""

BLOCKS: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] = {
    "double_blocks": ("transformer_blocks", DOUBLE),
    "single_blocks": ("single_transformer_blocks", SINGLE),
}
"""Blocks: original name; name here, and layers."""

_NORMS = {
    "double_blocks.{b}.img_attn.norm.query_norm": "transformer_blocks.{b}.attn.norm_q",
    "double_blocks.{b}.img_attn.norm.key_norm": "transformer_blocks.{b}.attn.norm_k",
    "double_blocks.{b}.txt_attn.norm.query_norm": "transformer_blocks.{b}.attn.norm_added_q",
    "double_blocks.{b}.txt_attn.norm.key_norm": "transformer_blocks.{b}.attn.norm_added_k",
    "single_blocks.{b}.norm.query_norm": "single_transformer_blocks.{b}.attn.norm_q",
    "single_blocks.{b}.norm.key_norm": "single_transformer_blocks.{b}.attn.norm_k",
}


def _layers(theirs: str, ours: tuple[str, ...]) -> list[Rule]:
    parts = [theirs] if len(ours) == 1 else [f"{theirs}.{part}" for part in QKV]
    return [Rule(f"{their}.{{kind}}", f"{our}.{{kind}}") for their, our in zip(parts, ours, strict=True)]


BFL = (
    *(
        rule
        for theirs, (ours, layers) in BLOCKS.items()
        for name, members in layers.items()
        for rule in _layers(f"{theirs}.{{b}}.{name}", tuple(f"{ours}.{{b}}.{member}" for member in members))
    ),
    *(Rule(f"{theirs}.scale", f"{ours}.weight") for theirs, ours in _NORMS.items()),
    *(rule for theirs, ours in OUTSIDE.items() for rule in _layers(theirs, (ours,))),
    Rule("final_layer.adaLN_modulation.1.{kind}", "norm_out.linear.{kind}", halves_swapped, halves_swapped),
)
"""Black Forest Labs' names with fused layers split."""

MFLUX_TRANSFORMER = (
    Rule("transformer_blocks.{b}.attn.to_out.0.{kind}", "transformer_blocks.{b}.attn.to_out.0.{kind}"),
    Rule("transformer_blocks.{b}.attn.to_out.{kind}", "transformer_blocks.{b}.attn.to_out.0.{kind}"),
    Rule("time_guidance_embed.linear_{n}.{kind}", "time_guidance_embed.timestep_embedder.linear_{n}.{kind}"),
)
"""mflux's names; the first rule keeps diffusers'."""

MFLUX_VAE = (Rule("{path}.attentions.0.to_out.{kind}", "{path}.attentions.0.to_out.0.{kind}"),)
"""mflux stores convolution weights in MLX's layout."""

_SHARES = {"qkv": QKV}
_MARK = "single_stream_modulation.lin"
"""Beginning of a key that only FLUX.2 has, in both namings."""


def is_flux2(keys: Iterable[str]) -> bool:
    """Whether these are keys of a FLUX.2 transformer, in any naming."""
    return any(key.startswith(_MARK) for key in unprefixed(keys))


def our_names(tensors: Tensors) -> dict[str, mx.array]:
    """Tensors of any naming under diffusers' names. Unknown keys are kept."""
    return to_mlx(split_fused(tensors, _SHARES), (*BFL, *MFLUX_TRANSFORMER))


def to_bfl(tensors: Tensors) -> dict[str, mx.array]:
    """Tensors of a single file, without a prefix."""
    return join_fused(from_mlx(tensors, BFL), _SHARES)
