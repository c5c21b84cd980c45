"""Key tables of FLUX.1's weights in Black Forest Labs' single files and in folders saved by mflux.

Names here are diffusers'. Black Forest Labs fuse queries, keys and values, in single blocks also the MLP's input, and
order the last modulation as shift, scale; in diffusers it is scale, shift. mflux renames layers and fuses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import mlx.core as mx

from mflux_vae.weights.keymaps.rules import Rule, Tensors, from_mlx, to_mlx
from mflux_vae_train.pipelines.flux1.transformer import MLP_RATIO
from mflux_vae_train.pipelines.loading.fused_layers import (
    QKV,
    Shares,
    halves_swapped,
    join_fused,
    split_fused,
    unprefixed,
)

_SHARES: Shares = {"qkv": QKV, "linear1": {**QKV, "mlp": MLP_RATIO}}


def _plain(pairs: Mapping[str, str]) -> list[Rule]:
    return [Rule(f"{theirs}.{{kind}}", f"{ours}.{{kind}}") for theirs, ours in pairs.items()]


def _embedder(theirs: str, ours: str) -> dict[str, str]:
    return {
        f"{theirs}.{their}": f"time_text_embed.{ours}.{our}"
        for their, our in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    }


def _stream(theirs: str, projections: Sequence[str], out: str, norms: Sequence[str], mlp: str, mod: str) -> list[Rule]:
    """A double block's image or text stream."""
    their, our = f"double_blocks.{{b}}.{theirs}", "transformer_blocks.{b}"
    fused = {f"{their}_attn.qkv.{part}": f"{our}.attn.{name}" for part, name in zip("qkv", projections, strict=True)}
    pairs = {
        f"{their}_mod.lin": f"{our}.{mod}.linear",
        f"{their}_attn.proj": f"{our}.attn.{out}",
        f"{their}_mlp.0": f"{our}.{mlp}.net.0.proj",
        f"{their}_mlp.2": f"{our}.{mlp}.net.2",
    }
    scales = [
        Rule(f"{their}_attn.norm.{kind}_norm.scale", f"{our}.attn.{name}.weight")
        for kind, name in zip(("query", "key"), norms, strict=True)
    ]
    return [*_plain(fused | pairs), *scales]


_SINGLE, _OUR_SINGLE = "single_blocks.{b}", "single_transformer_blocks.{b}"

BFL = (
    *_plain(
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            **_embedder("time_in", "timestep_embedder"),
            **_embedder("vector_in", "text_embedder"),
            **_embedder("guidance_in", "guidance_embedder"),
        }
    ),
    *_stream("img", ["to_q", "to_k", "to_v"], "to_out.0", ["norm_q", "norm_k"], "ff", "norm1"),
    *_stream(
        "txt",
        ["add_q_proj", "add_k_proj", "add_v_proj"],
        "to_add_out",
        ["norm_added_q", "norm_added_k"],
        "ff_context",
        "norm1_context",
    ),
    *_plain(
        {f"{_SINGLE}.linear1.{part}": f"{_OUR_SINGLE}.attn.to_{part}" for part in "qkv"}
        | {
            f"{_SINGLE}.linear1.mlp": f"{_OUR_SINGLE}.proj_mlp",
            f"{_SINGLE}.linear2": f"{_OUR_SINGLE}.proj_out",
            f"{_SINGLE}.modulation.lin": f"{_OUR_SINGLE}.norm.linear",
            "final_layer.linear": "proj_out",
        }
    ),
    Rule(f"{_SINGLE}.norm.query_norm.scale", f"{_OUR_SINGLE}.attn.norm_q.weight"),
    Rule(f"{_SINGLE}.norm.key_norm.scale", f"{_OUR_SINGLE}.attn.norm_k.weight"),
    Rule("final_layer.adaLN_modulation.1.{kind}", "norm_out.linear.{kind}", halves_swapped, halves_swapped),
)
"""Black Forest Labs' names with fused layers split, see `from_bfl`."""

MFLUX_TRANSFORMER = (
    Rule("{path}.linear1.{kind}", "{path}.net.0.proj.{kind}"),
    Rule("{path}.linear2.{kind}", "{path}.net.2.{kind}"),
)
MFLUX_T5 = (
    Rule("final_layer_norm.weight", "encoder.final_layer_norm.weight"),
    Rule("t5_blocks.0.attention.{rest}", "encoder.block.0.layer.0.{rest}"),
    # mflux copies the first block's bias into every block
    Rule("t5_blocks.{b}.attention.SelfAttention.relative_attention_bias.{kind}", None),
    Rule("t5_blocks.{b}.attention.{rest}", "encoder.block.{b}.layer.0.{rest}"),
    Rule("t5_blocks.{b}.ff.{rest}", "encoder.block.{b}.layer.1.{rest}"),
)
MFLUX_VAE = (
    Rule("{path}.conv2d.{kind}", "{path}.{kind}"),
    Rule("{half}.conv_norm_out.norm.{kind}", "{half}.conv_norm_out.{kind}"),
)
"""mflux stores convolution weights in MLX's layout."""


_MARKS = (
    ("double_blocks.0.img_mod.lin.", "single_blocks.0.linear1.", "vector_in.in_layer."),
    ("transformer_blocks.0.norm1.linear.", "single_transformer_blocks.0.proj_mlp.", "time_text_embed.text_embedder."),
)
"""Beginnings of keys that only FLUX.1 has together, in both namings. FLUX.2 and Chroma have no modulation in blocks."""


def is_flux1(keys: Iterable[str]) -> bool:
    """Whether these are all keys of a FLUX.1 transformer, in any naming."""
    names = unprefixed(keys)
    return any(all(any(name.startswith(mark) for name in names) for mark in marks) for marks in _MARKS)


def is_bfl(keys: Iterable[str]) -> bool:
    """Whether these are keys of Black Forest Labs' transformer."""
    return any(key.startswith(("double_blocks.", "single_blocks.")) for key in unprefixed(keys))


def our_names(tensors: Tensors) -> dict[str, mx.array]:
    """Tensors in any naming under diffusers' names."""
    return from_bfl(tensors) if is_bfl(tensors) else to_mlx(tensors, MFLUX_TRANSFORMER)


def from_bfl(tensors: Tensors) -> dict[str, mx.array]:
    """Black Forest Labs' tensors under diffusers' names. Unknown keys are kept."""
    return to_mlx(split_fused(tensors, _SHARES), BFL)


def to_bfl(tensors: Tensors) -> dict[str, mx.array]:
    """The inverse of `from_bfl`."""
    return join_fused(from_mlx(tensors, BFL), _SHARES)
