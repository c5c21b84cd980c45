"""Key table of MLX's convolutional VAE example (ml-explore/mlx-examples, `cvae`).

Kernels have our layout. Its linear layers flatten 8 x 8 x C with channels last, ours with channels first as in torch.
Early files also hold the last KL divergence, and norm statistics as (1, 1, 1, C).
"""

from __future__ import annotations

import mlx.core as mx

from mflux_vae.weights.keymaps.rules import Rule

NAMING = "mlx-examples"

LEVELS, SIDE = 3, 64
"""Number of levels, and side of the images (pixels)."""

_LOWEST = SIDE // 2**LEVELS


def _channels_first(tensor: mx.array, axis: int) -> mx.array:
    """Reorder an axis from 8 x 8 x C to C x 8 x 8; other lengths are unchanged and fail the shape check."""
    if tensor.shape[axis] % _LOWEST**2:
        return tensor
    apart = mx.moveaxis(tensor, axis, 0)
    apart = apart.reshape(_LOWEST**2, -1, *apart.shape[1:]).swapaxes(0, 1)
    return mx.moveaxis(apart.reshape(-1, *apart.shape[2:]), 0, axis)


def _channels_last(tensor: mx.array, axis: int) -> mx.array:
    """Inverse of `_channels_first`."""
    if tensor.shape[axis] % _LOWEST**2:
        return tensor
    apart = mx.moveaxis(tensor, axis, 0)
    apart = apart.reshape(-1, _LOWEST**2, *apart.shape[1:]).swapaxes(0, 1)
    return mx.moveaxis(apart.reshape(-1, *apart.shape[2:]), 0, axis)


def _numbered(theirs: str, ours: str, axis: int) -> Rule:
    return Rule(theirs, ours, lambda x: _channels_first(x, axis), lambda x: _channels_last(x, axis))


def _norm(theirs: str, ours: str) -> Rule:
    return Rule(f"{theirs}.{{kind}}", f"{ours}.{{kind}}", lambda x: x.reshape(-1))


def _level(number: int) -> tuple[Rule, ...]:
    return (
        Rule(f"encoder.conv{number}.{{kind}}", f"encoder.down.{number - 1}.conv.{{kind}}"),
        _norm(f"encoder.bn{number}", f"encoder.down.{number - 1}.norm"),
        Rule(f"decoder.upconv{number}.conv.{{kind}}", f"decoder.up.{number - 1}.conv.{{kind}}"),
        _norm(f"decoder.bn{number}", f"decoder.up.{number - 1}.norm"),
    )


MLX_EXAMPLES = (
    Rule("encoder.kl_div", None),
    _numbered("encoder.proj_mu.weight", "encoder.mean.weight", 1),
    _numbered("encoder.proj_log_var.weight", "encoder.logvar.weight", 1),
    Rule("encoder.proj_mu.{kind}", "encoder.mean.{kind}"),
    Rule("encoder.proj_log_var.{kind}", "encoder.logvar.{kind}"),
    _numbered("decoder.lin1.{kind}", "decoder.linear.{kind}", 0),
    *(rule for number in range(1, LEVELS + 1) for rule in _level(number)),
)
