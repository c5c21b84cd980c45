"""Key tables of Stable Diffusion's networks in single files: CompVis' naming.

Names here are diffusers' and transformers'. CompVis number the UNet's layers through; OpenCLIP, the text encoder of
Stable Diffusion 2 and the second one of SDXL, stacks queries, keys and values and transposes the last projection.
The tables follow from a configuration: SSD-1B and other depths need no table of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import count

import mlx.core as mx

from mflux_vae.weights.keymaps.rules import (
    Rule,
    Tensors,
    conv_from_mlx,
    conv_to_mlx,
    from_mlx,
    to_mlx,
)
from mflux_vae_train.pipelines.stable_diffusion.unet_config import UNetConfig

_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}

OPEN_CLIP = (
    Rule("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    Rule("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    Rule("ln_final.{kind}", "text_model.final_layer_norm.{kind}"),
    Rule("text_projection", "text_projection.weight", mx.transpose, mx.transpose),
    Rule("logit_scale", None),
    Rule("transformer.text_model.embeddings.position_ids", None),  # in files of ComfyUI
    *(
        Rule(f"transformer.resblocks.{{b}}.{theirs}", f"text_model.encoder.layers.{{b}}.{ours}")
        for theirs, ours in (
            ("ln_1.{kind}", "layer_norm1.{kind}"),
            ("ln_2.{kind}", "layer_norm2.{kind}"),
            ("mlp.c_fc.{kind}", "mlp.fc1.{kind}"),
            ("mlp.c_proj.{kind}", "mlp.fc2.{kind}"),
            *((f"attn.in_proj.{part}.{{kind}}", f"self_attn.{part}_proj.{{kind}}") for part in "qkv"),
            ("attn.{rest}", "self_attn.{rest}"),
        )
    ),
)
"""OpenCLIP's names with stacked layers split, see `from_open_clip`."""

_STACKED = re.compile(r"(.+\.attn\.in_proj)_(weight|bias)")
_PART = re.compile(r"(.+\.attn\.in_proj)\.([qkv])\.(weight|bias)")
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\..+")


def unet_layers(config: UNetConfig) -> dict[str, str]:
    """CompVis' names of the UNet's layers, and diffusers'. Names inside a transformer are the same in both."""
    return {**_OUTSIDE, **dict(_blocks(config))}


def transformers(config: UNetConfig) -> list[tuple[str, str, int]]:
    """CompVis' names of the UNet's transformers, diffusers', and their numbers of blocks."""
    levels = [*config.down, *([] if config.mid is None else [config.mid]), *config.up]
    depths = [depth for level in levels for depth in level.depths]
    names = [(theirs, ours) for theirs, ours in unet_layers(config).items() if ".attentions." in ours]
    return [(*pair, depth) for pair, depth in zip(names, depths, strict=True)]


def original_unet(config: UNetConfig) -> list[Rule]:
    """Table between CompVis' names, without ``model.diffusion_model.``, and ours."""
    return [
        Rule(f"{theirs}.{{rest}}", f"{ours}.{{rest}}", conv_to_mlx, conv_from_mlx)
        for theirs, ours in unet_layers(config).items()
    ]


def from_open_clip(tensors: Tensors, layers: int) -> dict[str, mx.array]:
    """OpenCLIP's tensors under transformers' names. Unknown keys are kept.

    Args:
        layers: number of layers of the text encoder. Further ones are dropped: Stable Diffusion 2 takes the states
            before the last of 24, and has no use for that layer and the projection.
    """
    split: dict[str, mx.array] = {}
    for key, tensor in tensors.items():
        if (block := _RESBLOCK.fullmatch(key)) and int(block[1]) >= layers:
            continue
        if stacked := _STACKED.fullmatch(key):
            for part, values in zip("qkv", mx.split(tensor, 3), strict=True):
                split[f"{stacked[1]}.{part}.{stacked[2]}"] = values
        else:
            split[key] = tensor
    return to_mlx(split, OPEN_CLIP)


def to_open_clip(tensors: Tensors) -> dict[str, mx.array]:
    """The inverse of `from_open_clip`, without the layers that it drops, as diffusers' scripts write it."""
    stacked: dict[str, mx.array] = {}
    parts: dict[str, dict[str, mx.array]] = {}
    for key, tensor in from_mlx(tensors, OPEN_CLIP).items():
        if part := _PART.fullmatch(key):
            parts.setdefault(f"{part[1]}_{part[3]}", {})[part[2]] = tensor
        else:
            stacked[key] = tensor
    return stacked | {key: mx.concatenate([of_layer[part] for part in "qkv"]) for key, of_layer in parts.items()}


def _blocks(config: UNetConfig) -> Iterator[tuple[str, str]]:
    number = count(1)
    for index, level in enumerate(config.down):
        block = f"down_blocks.{index}"
        for layer in range(level.layers):
            yield from _layer(f"input_blocks.{next(number)}", block, layer, bool(level.depths))
        if level.resamples:
            yield f"input_blocks.{next(number)}.0.op", f"{block}.downsamplers.0.conv"
    if config.mid is not None:
        yield from _layer("middle_block", "mid_block", 0, bool(config.mid.depths))
        if config.mid.layers > 1:
            yield from _resnet("middle_block.2", "mid_block.resnets.1")
    number = count()
    for index, level in enumerate(config.up):
        block, attends = f"up_blocks.{index}", bool(level.depths)
        for layer in range(level.layers):
            last = f"output_blocks.{next(number)}"
            yield from _layer(last, block, layer, attends)
        if level.resamples:
            yield f"{last}.{1 + attends}.conv", f"{block}.upsamplers.0.conv"


def _layer(theirs: str, block: str, layer: int, attends: bool) -> Iterator[tuple[str, str]]:
    yield from _resnet(f"{theirs}.0", f"{block}.resnets.{layer}")
    if attends:
        yield f"{theirs}.1", f"{block}.attentions.{layer}"


def _resnet(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    return ((f"{theirs}.{their}", f"{ours}.{our}") for their, our in _RESNET.items())
