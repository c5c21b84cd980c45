"""Key tables of latent-diffusion (CompVis) and of Black Forest Labs, which nests the quant convolutions.

Differences to diffusers: decoder levels are numbered from the highest resolution, and attention projections are 1x1
convolutions. Tensors for training only are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mflux_vae.weights.keymaps.rules import Rule, conv_from_mlx, conv_to_mlx, matrix_to_mlx, pointwise_from_mlx

_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_LINEAR_ATTENTION = {"to_qkv": "to_qkv", "to_out": "to_out"}
_TRAINING_ONLY = (Rule("loss.{rest}", None), Rule("model_ema.{rest}", None))
_LEVEL = re.compile(r"(?:encoder|decoder)\.(?:down|up)(?:_blocks)?\.(\d+)\..*")


def compvis(keys: Iterable[str]) -> tuple[Rule, ...]:
    """Table for a network with these keys (of the file or ours), which give the number of levels."""
    return (*_TRAINING_ONLY, *_blocks(keys), _kernels("{path}", "{path}"))


def bfl(keys: Iterable[str]) -> tuple[Rule, ...]:
    """As `compvis`, with `encoder.quant_conv` and `decoder.post_quant_conv`."""
    nested = [
        _kernels(f"{half}.{name}.{{kind}}", f"{name}.{{kind}}")
        for half, name in (("encoder", "quant_conv"), ("decoder", "post_quant_conv"))
    ]
    return (*_TRAINING_ONLY, *nested, *_blocks(keys), _kernels("{path}", "{path}"))


def _blocks(keys: Iterable[str]) -> list[Rule]:
    levels = 1 + max((int(found[1]) for key in keys if (found := _LEVEL.fullmatch(key))), default=-1)
    rules = []
    for level in range(levels):
        reverse = levels - 1 - level
        rules += _level(f"encoder.down.{level}", f"encoder.down_blocks.{level}", "downsample")
        rules += _level(f"decoder.up.{reverse}", f"decoder.up_blocks.{level}", "upsample")
    for half in ("encoder", "decoder"):
        for number in (1, 2):
            rules.append(
                _kernels(f"{half}.mid.block_{number}.{{rest}}", f"{half}.mid_block.resnets.{number - 1}.{{rest}}")
            )
        rules += _attention(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0")
        rules.append(Rule(f"{half}.norm_out.{{kind}}", f"{half}.conv_norm_out.{{kind}}"))
    return rules


def _level(theirs: str, ours: str, sampling: str) -> list[Rule]:
    return [
        _kernels(f"{theirs}.block.{{b}}.nin_shortcut.{{kind}}", f"{ours}.resnets.{{b}}.conv_shortcut.{{kind}}"),
        _kernels(f"{theirs}.block.{{b}}.{{rest}}", f"{ours}.resnets.{{b}}.{{rest}}"),
        _kernels(f"{theirs}.{sampling}.conv.{{kind}}", f"{ours}.{sampling}rs.0.conv.{{kind}}"),
        *_attention(f"{theirs}.attn.{{a}}", f"{ours}.attentions.{{a}}"),
    ]


def _attention(theirs: str, ours: str) -> list[Rule]:
    return [
        Rule(f"{theirs}.{their}.{{kind}}", f"{ours}.{our}.{{kind}}", matrix_to_mlx, pointwise_from_mlx)
        for their, our in {**_ATTENTION, **_LINEAR_ATTENTION}.items()
    ]


def _kernels(theirs: str, ours: str) -> Rule:
    return Rule(theirs, ours, conv_to_mlx, conv_from_mlx)
