"""Adversarial losses with a patch discriminator, as in latent-diffusion (Esser et al. 2021, Rombach et al. 2022).

The discriminator minimizes `hinge_loss`. From its first step on, the autoencoder minimizes nll + w *
generator_loss(discriminator(reconstruction)), where w is `adaptive_weight`. Values are per sample, (B,).
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
MAX_ADAPTIVE_WEIGHT = 1e4
"""Upper limit of the adaptive weight."""

FromWeight: TypeAlias = Callable[[mx.array], mx.array]
"""Weight of the decoder's last layer -> scalar loss."""


class PatchDiscriminator(nn.Module):
    """PatchGAN discriminator: with three strided layers, one logit per 70 x 70 patch (Isola et al. 2017).

    Kernels are 4x4 with padding 1. `n_layers` layers halve the resolution, one keeps it, one computes the logits. All
    but the first and the last are followed by batch normalization (see `layers.BatchNorm`).

    Args:
        in_channels: image channels.
        width: channels of the first layer; each layer doubles them, up to 8 * width.
        n_layers: strided layers.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, n_layers: int = 3):
        super().__init__()
        if min(in_channels, width, n_layers) < 1:
            raise SettingsError(
                f"discriminator: n_layers {n_layers}, width {width}, in_channels {in_channels}; all must be at least 1"
            )
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
            x = norm(conv(x), NEGATIVE_SLOPE)
        return self.convs[-1](x)


def hinge_loss(real: mx.array, fake: mx.array) -> mx.array:
    """Discriminator loss: logits of images and of reconstructions, (B, h, w, 1) each -> (B,).

    Apply `mx.stop_gradient` to the reconstructions before the discriminator.
    """
    return 0.5 * (_sample_mean(mx.maximum(1 - real, 0)) + _sample_mean(mx.maximum(1 + fake, 0)))


def generator_loss(fake: mx.array) -> mx.array:
    """Autoencoder loss: logits of reconstructions (B, h, w, 1) -> (B,)."""
    return -_sample_mean(fake)


def adaptive_weight(
    nll: FromWeight, generator: FromWeight, weight: mx.array, *, scale: float = 0.5, limit: float = MAX_ADAPTIVE_WEIGHT
) -> mx.array:
    """Weight that balances the gradients of generator and reconstruction loss at the decoder's last layer.

    scale * clip(|grad nll| / (|grad generator| + 1e-4), 0, limit), with gradients with respect to that layer's weight
    (Esser et al. 2021, equation 7). No gradient flows through the result.

    Args:
        nll, generator: batch averages of the losses as functions of that weight. Compute earlier layers once, outside.
        weight: current weight of the layer.
        scale: latent-diffusion's `disc_weight`.
    """
    norms = [mx.sqrt(mx.square(mx.grad(loss)(mx.stop_gradient(weight))).sum()) for loss in (nll, generator)]
    return mx.stop_gradient(scale * mx.clip(norms[0] / (norms[1] + 1e-4), 0.0, limit))


def started(step: int, start: int) -> bool:
    """Whether the adversarial losses apply at this step."""
    return step >= start


def _convolution(in_channels: int, out_channels: int, *, stride: int, bias: bool) -> Conv2d:
    conv = Conv2d(in_channels, out_channels, 4, stride=stride, padding=1, bias=bias)
    conv.weight = 0.02 * mx.random.normal(conv.weight.shape)
    return conv


def _sample_mean(values: mx.array) -> mx.array:
    return values.reshape(values.shape[0], -1).mean(axis=1)
