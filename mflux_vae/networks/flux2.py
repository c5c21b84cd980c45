"""FLUX.2's autoencoder: `AutoencoderKL` with latents in 2x2 patches, normalised by running statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae.networks.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mflux_vae.networks.latent_scaling import patchify, unpatchify


@dataclass(frozen=True, kw_only=True)
class AutoencoderKLFlux2Config(AutoencoderKLConfig):
    """Fields of the config.json of diffusers' `AutoencoderKLFlux2`; defaults are those of FLUX.2.

    `scaling_factor`, `shift_factor`, `latents_mean` and `latents_std` are not used.

    Attributes:
        batch_norm_eps: added to the running variance.
        batch_norm_momentum: momentum of the running statistics in training; not used here.
        patch_size: latents per patch (rows, columns), equal.
    """

    latent_channels: int = 32
    scaling_factor: float = 1.0
    sample_size: int = 1024
    batch_norm_eps: float = 1e-4
    batch_norm_momentum: float = 0.1
    patch_size: tuple[int, int] = (2, 2)

    NAME: ClassVar[str] = "AutoencoderKLFlux2"
    ABSENT: ClassVar[Mapping[str, Any]] = {}
    UNKNOWN_TO_DIFFUSERS: ClassVar[tuple[str, ...]] = tuple(
        name for name in AutoencoderKLConfig.UNKNOWN_TO_DIFFUSERS if name != "decoder_block_out_channels"
    )
    _SCALING: ClassVar[Mapping[str, Any]] = {
        "scaling_factor": 1.0,
        "shift_factor": None,
        "latents_mean": None,
        "latents_std": None,
    }

    def _check(self) -> None:
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        super()._check()
        if len(self.patch_size) != 2 or self.patch_size[0] != self.patch_size[1] or self.patch_size[0] < 1:
            raise SettingsError(f"{self.NAME}: patch_size {self.patch_size} must be two equal positive numbers")
        if given := [name for name, idle in self._SCALING.items() if getattr(self, name) != idle]:
            raise SettingsError(f"{self.NAME}: {', '.join(given)} not supported; running statistics scale the latents")

    @property
    def scaled_channels(self) -> int:
        """Channels of a scaled latent (a patch)."""
        return self.latent_channels * self.patch_size[0] * self.patch_size[1]

    @property
    def scaled_downsampling(self) -> int:
        """Pixels per scaled latent in each direction."""
        return self.downsampling * self.patch_size[0]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AutoencoderKLFlux2Config:
        """As `AutoencoderKLConfig.from_dict`."""
        return super().from_dict({key: value for key, value in config.items() if key not in cls._SCALING})

    def to_dict(self) -> dict[str, Any]:
        """As `AutoencoderKLConfig.to_dict`, without `force_upcast` if it is the default: diffusers lacks it here."""
        idle = {*self._SCALING, "force_upcast"} if self.force_upcast else {*self._SCALING}
        return {key: value for key, value in super().to_dict().items() if key not in idle}


class RunningStatistics(nn.Module):
    """Running mean and variance of a batch norm without scale and shift. Always frozen."""

    def __init__(self, channels: int):
        super().__init__()
        self.running_mean = mx.zeros((channels,))
        self.running_var = mx.ones((channels,))
        self.num_batches_tracked = mx.array(0, mx.int64)

    @property
    def _no_grad(self) -> set[str]:
        """Names of frozen parameters, read by MLX: all, even after `unfreeze`."""
        return {*self}

    @_no_grad.setter
    def _no_grad(self, names: set[str]) -> None:
        pass


class AutoencoderKLFlux2(AutoencoderKL):
    """`AutoencoderKL` with scaled latents in normalised patches: (B, h, w, C) -> (B, h/2, w/2, 4C)."""

    config: AutoencoderKLFlux2Config

    def __init__(self, config: AutoencoderKLFlux2Config | None = None):
        super().__init__(config or AutoencoderKLFlux2Config())
        self.bn = RunningStatistics(self.config.scaled_channels)

    def to_scaled(self, latents: mx.array) -> mx.array:
        """Scale raw latents for a denoiser: (B, h, w, C) -> (B, h/p, w/p, p*p*C).

        Raises:
            ImageError: sides are not multiples of the patch size.
        """
        mean, std = self._statistics()
        return (patchify(latents, self.config.patch_size[0]) - mean) / std

    def from_scaled(self, latents: mx.array) -> mx.array:
        """Inverse of `to_scaled`."""
        mean, std = self._statistics()
        return unpatchify(latents * std + mean, self.config.patch_size[0])

    def _statistics(self) -> tuple[mx.array, mx.array]:
        variance = self.bn.running_var.astype(mx.float32)
        return self.bn.running_mean.astype(mx.float32), mx.sqrt(variance + self.config.batch_norm_eps)
