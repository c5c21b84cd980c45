"""A convolutional autoencoder with vector latents: strided convolutions, two linear heads, and the reverse."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn

from mflux_vae import kernels
from mflux_vae.errors import ImageError, SettingsError
from mflux_vae.kernels import leaky_relu
from mflux_vae.kernels.overrides import overridable
from mflux_vae.networks.config import NetworkConfig
from mflux_vae.networks.latent_scaling import ScaledConfig
from mflux_vae.networks.layers import BatchNorm, Conv2d, Linear, TransposedConv2d, layer_input
from mflux_vae.posterior import DiagonalGaussian

NEGATIVE_SLOPE = 0.01


@dataclass(frozen=True, kw_only=True)
class FlatConfig(NetworkConfig, ScaledConfig):
    """Configuration of `FlatAutoencoder`.

    Every level halves the resolution, rounding up; the decoder restores each size without padding or cropping.

    Attributes:
        in_channels, out_channels: channels of an image.
        hidden_dims: width of each level.
        latent_dim: length of a latent vector.
        image_size: side of the images (pixels); fixed by the linear layers.
        batch_norm: whether convolutions are followed by batch normalisation.
        upsampling: "transposed" convolutions, or "repeat" (nearest neighbour) and convolutions.
        last_conv: True: a further convolution after the last level outputs the image. False: the last level does.
        output: output activation. With "sigmoid" the network works in [0, 1] internally, else in [-1, 1]; "linear" may
            leave the range. `encode` and `decode` always use [-1, 1].
    """

    in_channels: int = 1
    out_channels: int = 1
    hidden_dims: tuple[int, ...] = (32, 64, 128, 256)
    latent_dim: int = 128
    image_size: int = 28
    batch_norm: bool = True
    upsampling: Literal["transposed", "repeat"] = "transposed"
    last_conv: bool = True
    output: Literal["sigmoid", "tanh", "linear"] = "sigmoid"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden_dims", tuple(self.hidden_dims))
        for name in ("in_channels", "out_channels", "latent_dim", "image_size"):
            if getattr(self, name) < 1:
                raise SettingsError(f"FlatAutoencoder: {name} must be positive, not {getattr(self, name)}")
        if not self.hidden_dims or min(self.hidden_dims) < 1:
            raise SettingsError(f"FlatAutoencoder: hidden_dims {self.hidden_dims} must be positive, one per level")
        for name, known in (("upsampling", ("transposed", "repeat")), ("output", ("sigmoid", "tanh", "linear"))):
            if getattr(self, name) not in known:
                raise SettingsError(f"FlatAutoencoder: {name} is {' or '.join(known)}, not {getattr(self, name)!r}")

    NAME: ClassVar[str] = "FlatAutoencoder"
    vectors: ClassVar[bool] = True
    scaling_factor: ClassVar[float] = 1.0
    shift_factor: ClassVar[float | None] = None
    force_upcast: ClassVar[bool] = False

    @property
    def latent_channels(self) -> int:
        """Length of a latent."""
        return self.latent_dim

    @property
    def downsampling(self) -> int:
        """Pixels per latent in each direction: the image side."""
        return self.image_size

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side at every level, from full resolution to the lowest."""
        sizes = [self.image_size]
        for _ in self.hidden_dims:
            sizes.append((sizes[-1] + 1) // 2)
        return tuple(sizes)


class Down(nn.Module):
    """Halve the resolution, rounding up."""

    def __init__(self, in_channels: int, out_channels: int, *, norm: bool):
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, 3, stride=2, padding=1)
        if norm:
            self.norm = BatchNorm(out_channels)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.conv(x)
        return self.norm(x, NEGATIVE_SLOPE) if "norm" in self else leaky_relu(x, NEGATIVE_SLOPE)


class Up(nn.Module):
    """Double the resolution to 2n or 2n - 1; `plain` omits norm and activation."""

    def __init__(self, in_channels: int, out_channels: int, *, transposed: bool, norm: bool, plain: bool = False):
        super().__init__()
        if transposed:
            self.transposed = TransposedConv2d(in_channels, out_channels)
        else:
            self.conv = Conv2d(in_channels, out_channels, 3, padding=1)
        if norm and not plain:
            self.norm = BatchNorm(out_channels)
        self._plain = plain

    def __call__(self, x: mx.array, size: int) -> mx.array:
        if "transposed" in self:
            x = self.transposed(x, size=(size, size))
        elif size == 2 * x.shape[1]:
            x = kernels.repeat_conv2d(x, self.conv.weight, self.conv.bias, padding=1)
        else:
            x = self.conv(kernels.upsample_nearest_2x(x)[:, :size, :size])
        if self._plain:
            return x
        return self.norm(x, NEGATIVE_SLOPE) if "norm" in self else leaky_relu(x, NEGATIVE_SLOPE)


@overridable
def _heads(x: mx.array, mean: nn.Linear, logvar: nn.Linear) -> mx.array:
    """(B, s, s, C) -> latent moments, (B, 2 * latent)."""
    x = x.transpose(0, 3, 1, 2).flatten(1)  # channels first, as torch flattens
    return mx.concatenate([mean(x), logvar(x)], axis=-1)


@overridable
def _unflatten(z: mx.array, linear: nn.Linear, channels: int, side: int) -> mx.array:
    """Latents (B, latent) -> (B, side, side, channels)."""
    x = linear(layer_input(z, linear))
    return x.reshape(-1, channels, side, side).transpose(0, 2, 3, 1)


class Encoder(nn.Module):
    """Pixels to latent moments: (B, S, S, in) -> (B, 2 * latent)."""

    def __init__(self, config: FlatConfig):
        super().__init__()
        widths = (config.in_channels, *config.hidden_dims)
        self.down = [Down(a, b, norm=config.batch_norm) for a, b in pairwise(widths)]
        flat = widths[-1] * config.sizes[-1] ** 2
        self.mean = Linear(flat, config.latent_dim)
        self.logvar = Linear(flat, config.latent_dim)

    def __call__(self, x: mx.array) -> mx.array:
        for level in self.down:
            x = level(x)
        return _heads(x, self.mean, self.logvar)


class Decoder(nn.Module):
    """Latents to pixels before the last activation: (B, latent) -> (B, S, S, out)."""

    def __init__(self, config: FlatConfig):
        super().__init__()
        self._sizes = config.sizes
        widths = config.hidden_dims[::-1]
        self._top = widths[0]
        self.linear = Linear(config.latent_dim, widths[0] * config.sizes[-1] ** 2)
        settings: dict[str, Any] = {"transposed": config.upsampling == "transposed", "norm": config.batch_norm}
        self.up = [Up(a, b, **settings) for a, b in pairwise(widths)]
        if config.last_conv:
            self.up.append(Up(widths[-1], widths[-1], **settings))
            self.conv_out = Conv2d(widths[-1], config.out_channels, 3, padding=1)
        else:
            self.up.append(Up(widths[-1], config.out_channels, **settings, plain=True))

    def __call__(self, z: mx.array) -> mx.array:
        x = _unflatten(z, self.linear, self._top, self._sizes[-1])
        for level, size in zip(self.up, self._sizes[-2::-1], strict=True):
            x = level(x, size)
        return self.conv_out(x) if "conv_out" in self else x


class FlatAutoencoder(nn.Module):
    """Encoder and decoder with a diagonal Gaussian posterior over vectors; images in [-1, 1], latents unscaled."""

    def __init__(self, config: FlatConfig | None = None):
        super().__init__()
        self.config = config = config or FlatConfig()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def latent_dim(self) -> int:
        """Length of a latent."""
        return self.config.latent_dim

    def encode(self, pixels: mx.array) -> DiagonalGaussian:
        """(B, S, S, C) in [-1, 1] -> posterior over (B, latent).

        Raises:
            ImageError: images of another size.
        """
        size = self.config.image_size
        if pixels.shape[1:3] != (size, size):
            height, width = pixels.shape[1:3]
            raise ImageError(f"this autoencoder takes images of {size} x {size}, not {height} x {width}; resize them")
        if self.config.output == "sigmoid":
            pixels = pixels * 0.5 + 0.5
        return DiagonalGaussian.from_moments(self.encoder(pixels))

    def decode(self, latents: mx.array) -> mx.array:
        """(B, latent) -> (B, S, S, C) in [-1, 1]; about that range with linear output."""
        x = self.decoder(latents)
        if self.config.output == "sigmoid":
            return kernels.sigmoid(x) * 2 - 1
        return kernels.tanh(x) if self.config.output == "tanh" else x

    def to_scaled(self, latents: mx.array) -> mx.array:
        """Return latents (B, latent) unchanged."""
        return latents

    def from_scaled(self, latents: mx.array) -> mx.array:
        """Return latents (B, latent) unchanged."""
        return latents
