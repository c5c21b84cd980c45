"""Key table of MLX's example of a convolutional autoencoder (ml-explore/mlx-examples, `cvae`), as it saves weights.

Kernels have our layout already. Its linear layers number the 8 x 8 x C values between them and the convolutions place
by place; ours number them channel by channel, as torch does. Early files hold the last divergence beside the weights,
and statistics of norms as (1, 1, 1, C).
"""

from __future__ import annotations

import mlx.core as mx

from mflux_vae.weights.keymaps.rules import Rule

NAMING = "mlx-examples"

LEVELS, SIDE = 3, 64
"""How often the image is halved there, and its pixels on a side."""

_LOWEST = SIDE // 2**LEVELS


def _places_to_channels(tensor: mx.array, axis: int) -> mx.array:
    """An axis of 8 x 8 x C numbers -> of C x 8 x 8; one of another length stays, and is then found misshapen."""
    if tensor.shape[axis] % _LOWEST**2:
        return tensor
    apart = mx.moveaxis(tensor, axis, 0)
    apart = apart.reshape(_LOWEST**2, -1, *apart.shape[1:]).swapaxes(0, 1)
    return mx.moveaxis(apart.reshape(-1, *apart.shape[2:]), 0, axis)


def _channels_to_places(tensor: mx.array, axis: int) -> mx.array:
    """The inverse."""
    if tensor.shape[axis] % _LOWEST**2:
        return tensor
    apart = mx.moveaxis(tensor, axis, 0)
    apart = apart.reshape(-1, _LOWEST**2, *apart.shape[1:]).swapaxes(0, 1)
    return mx.moveaxis(apart.reshape(-1, *apart.shape[2:]), 0, axis)


def _numbered(theirs: str, ours: str, axis: int) -> Rule:
    return Rule(theirs, ours, lambda x: _places_to_channels(x, axis), lambda x: _channels_to_places(x, axis))


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
