"""Autoencoders with vector latents in torch."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F


class Vectors(nn.Module):
    """A convolutional VAE with vector latents, batch norm and LeakyReLU; parameter names as in `FlatAutoencoder`.

    Args:
        config: as `mflux_vae.networks.vector_latent.FlatConfig`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.output, widths = config.output, (config.in_channels, *config.hidden_dims)
        self.sizes = [config.image_size]
        for _ in widths[1:]:
            self.sizes.append((self.sizes[-1] + 1) // 2)
        flat = widths[-1] * self.sizes[-1] ** 2
        encoder, decoder = nn.Module(), nn.Module()
        encoder.down = nn.ModuleList(self.level(nn.Conv2d(a, b, 3, 2, 1)) for a, b in pairwise(widths))
        encoder.mean, encoder.logvar = (nn.Linear(flat, config.latent_dim) for _ in range(2))
        decoder.linear = nn.Linear(config.latent_dim, flat)
        ways = list(zip(widths[::-1], widths[-2:0:-1], strict=False))
        ways += [(widths[1], widths[1] if config.last_conv else config.in_channels)]
        transposed = config.upsampling == "transposed"
        decoder.up = nn.ModuleList(
            self.level(nn.ConvTranspose2d(a, b, 3, 2, 1) if transposed else nn.Conv2d(a, b, 3, 1, 1)) for a, b in ways
        )
        if config.last_conv:
            decoder.conv_out = nn.Conv2d(widths[1], config.in_channels, 3, 1, 1)
        else:
            del decoder.up[-1].norm
        self.encoder, self.decoder = encoder, decoder

    @staticmethod
    def level(conv: nn.Conv2d | nn.ConvTranspose2d) -> nn.Module:
        level = nn.Module()
        setattr(level, "transposed" if isinstance(conv, nn.ConvTranspose2d) else "conv", conv)
        level.norm = nn.BatchNorm2d(conv.out_channels)
        return level

    def forward(self, x: Any, noise: Any) -> tuple[Any, Any, Any]:
        """(B, C, S, S), noise (B, latent) -> reconstruction (B, C, S, S), mean and log variance (B, latent)."""
        for level in self.encoder.down:
            x = F.leaky_relu(level.norm(level.conv(x)), 0.01)
        mean, logvar = self.encoder.mean(x.flatten(1)), self.encoder.logvar(x.flatten(1))
        x = self.decoder.linear(mean + torch.exp(0.5 * logvar) * noise)
        x = x.unflatten(1, (-1, self.sizes[-1], self.sizes[-1]))
        for level, size in zip(self.decoder.up, self.sizes[-2::-1], strict=True):
            if hasattr(level, "transposed"):
                x = level.transposed(x, output_size=(size, size))
            else:
                x = level.conv(F.interpolate(x, scale_factor=2)[..., :size, :size])
            x = F.leaky_relu(level.norm(x), 0.01) if hasattr(level, "norm") else x
        x = self.decoder.conv_out(x) if hasattr(self.decoder, "conv_out") else x
        return torch.sigmoid(x) if self.output == "sigmoid" else torch.tanh(x), mean, logvar
