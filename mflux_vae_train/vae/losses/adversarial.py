"""A critic of patches that an autoencoder is trained against, as in latent-diffusion (Esser et al. 2021, Rombach 2022).

The autoencoder's loss is nll + w * generator_loss(critic(reconstruction)), where w is `adaptive_weight`, from the step
on where the critic starts; the critic's is `hinge_loss`. Values are per sample, (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae.kernels import leaky_relu
from mflux_vae.networks.layers import BatchNorm, Conv2d

NEGATIVE_SLOPE = 0.2
MOST = 1e4
"""Of the adaptive weight."""

FromWeight: TypeAlias = Callable[[mx.array], mx.array]
"""The weight of the decoder's last layer -> a loss, a scalar."""


class PatchDiscriminator(nn.Module):
    """Tells real patches from made ones: with three layers a logit for each 70 x 70 pixels (Isola et al. 2017).

    Kernels are 4x4 with padding 1; `n_layers` halve the resolution, one more keeps it, and one makes the logits. All
    but the first and the last are followed by batch norms, which in training use the batch's statistics (see
    `layers.BatchNorm`).

    Args:
        in_channels: of an image.
        width: channels of the first layer; each doubles them, to 8 times as many at most.
        n_layers: strided layers.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, n_layers: int = 3):
        super().__init__()
        if min(in_channels, width, n_layers) < 1:
            raise SettingsError(f"a discriminator of {n_layers} layers, {width} wide, for {in_channels} channels")
        widths = [width * min(2**level, 8) for level in range(n_layers + 1)]
        self.convs = [_convolution(in_channels, width, stride=2, bias=True)]
        self.norms = []
        for level, (previous, out) in enumerate(pairwise(widths), 1):
            self.convs.append(_convolution(previous, out, stride=2 if level < n_layers else 1, bias=False))
            self.norms.append(BatchNorm(out))
            self.norms[-1].weight = 1 + 0.02 * mx.random.normal((out,))
        self.convs.append(_convolution(widths[-1], 1, stride=1, bias=True))

    def __call__(self, pixels: mx.array) -> mx.array:
        """(B, H, W, C) in [-1, 1] -> logits (B, h, w, 1), positive for real."""
        x = leaky_relu(self.convs[0](pixels), NEGATIVE_SLOPE)
        for conv, norm in zip(self.convs[1:-1], self.norms, strict=True):
            x = leaky_relu(norm(conv(x)), NEGATIVE_SLOPE)
        return self.convs[-1](x)


def hinge_loss(real: mx.array, made: mx.array) -> mx.array:
    """The critic's: logits of pictures and of reconstructions, (B, h, w, 1) each -> (B,).

    Both are to be computed with gradients for the critic alone: `mx.stop_gradient` what it sees.
    """
    return 0.5 * (_mean(mx.maximum(1 - real, 0)) + _mean(mx.maximum(1 + made, 0)))


def generator_loss(made: mx.array) -> mx.array:
    """The autoencoder's: logits of its reconstructions (B, h, w, 1) -> (B,)."""
    return -_mean(made)


def adaptive_weight(
    nll: FromWeight, generator: FromWeight, weight: mx.array, *, scale: float = 0.5, most: float = MOST
) -> mx.array:
    """The generator's weight with which it pulls the decoder's last layer about as hard as the reconstruction does.

    scale * clip(|grad nll| / (|grad generator| + 1e-4), 0, most), with gradients by the last layer's weight (Esser et
    al. 2021, equation 7); a constant for the gradients of the loss it is used in.

    Args:
        nll, generator: both losses, averaged over the batch, as functions of that weight alone. The layers before it
            should be computed once, outside.
        weight: the present one.
        scale: latent-diffusion's `disc_weight`.
    """
    norms = [mx.sqrt(mx.square(mx.grad(loss)(mx.stop_gradient(weight))).sum()) for loss in (nll, generator)]
    return mx.stop_gradient(scale * mx.clip(norms[0] / (norms[1] + 1e-4), 0.0, most))


def started(step: int, start: int) -> float:
    """1.0 from step number `start` on, 0.0 before: the factor of both adversarial losses."""
    return float(step >= start)


def _convolution(in_channels: int, out_channels: int, *, stride: int, bias: bool) -> Conv2d:
    conv = Conv2d(in_channels, out_channels, 4, stride=stride, padding=1, bias=bias)
    conv.weight = 0.02 * mx.random.normal(conv.weight.shape)
    return conv


def _mean(values: mx.array) -> mx.array:
    return values.reshape(values.shape[0], -1).mean(axis=1)
