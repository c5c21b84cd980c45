"""Key tables of `FlatAutoencoder`: unchanged names, and those of PyTorch-VAE's `VanillaVAE` (AntixK/PyTorch-VAE).

Files hold kernels of transposed convolutions as in torch, (C, O, 3, 3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import mlx.core as mx

from mflux_vae.weights.keymaps.rules import Rule, conv_from_mlx, conv_to_mlx

_COUNTER = Rule("{path}.num_batches_tracked", None)
_LEVEL = re.compile(r"(?:model\.)?(?:encoder|encoder\.down)\.(\d+)\..*")


def _transposed_to_mlx(tensor: mx.array) -> mx.array:
    return tensor.transpose(1, 2, 3, 0) if tensor.ndim == 4 else tensor


def _transposed_from_mlx(tensor: mx.array) -> mx.array:
    return tensor.transpose(3, 0, 1, 2) if tensor.ndim == 4 else tensor


def _transposed(theirs: str, ours: str) -> Rule:
    return Rule(theirs, ours, _transposed_to_mlx, _transposed_from_mlx)


def _kernels(theirs: str, ours: str) -> Rule:
    return Rule(theirs, ours, conv_to_mlx, conv_from_mlx)


FLAT = (
    _COUNTER,
    _transposed("{path}.transposed.{kind}", "{path}.transposed.{kind}"),
    _kernels("{path}", "{path}"),
)
"""Unchanged names."""


def pytorch_vae(keys: Iterable[str]) -> tuple[Rule, ...]:
    """Table for a network with these keys (of the file or ours), which give the number of levels."""
    last = max((int(found[1]) for key in keys if (found := _LEVEL.fullmatch(key))), default=0)
    return (
        _COUNTER,
        _kernels("encoder.{i}.0.{kind}", "encoder.down.{i}.conv.{kind}"),
        Rule("encoder.{i}.1.{kind}", "encoder.down.{i}.norm.{kind}"),
        Rule("fc_mu.{kind}", "encoder.mean.{kind}"),
        Rule("fc_var.{kind}", "encoder.logvar.{kind}"),
        Rule("decoder_input.{kind}", "decoder.linear.{kind}"),
        _transposed("final_layer.0.{kind}", f"decoder.up.{last}.transposed.{{kind}}"),
        Rule("final_layer.1.{kind}", f"decoder.up.{last}.norm.{{kind}}"),
        _kernels("final_layer.3.{kind}", "decoder.conv_out.{kind}"),
        _transposed("decoder.{i}.0.{kind}", "decoder.up.{i}.transposed.{kind}"),
        Rule("decoder.{i}.1.{kind}", "decoder.up.{i}.norm.{kind}"),
    )
