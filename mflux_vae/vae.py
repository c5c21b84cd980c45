"""`VAE`: images to latents and back, NCHW and [0, 255] outside, NHWC and [-1, 1] inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae.errors import ImageError, SettingsError, WeightsError
from mflux_vae.networks.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mflux_vae.networks.plain import PlainAutoencoder, PlainConfig
from mflux_vae.posterior import DiagonalGaussian
from mflux_vae.runtime import compute_dtype
from mflux_vae.weights.diffusers import AUTOENCODER_KL, SAME_NAMES
from mflux_vae.weights.files import DTYPES, read_folder, read_json, write_json, write_safetensors
from mflux_vae.weights.rules import Rule, from_mlx, load_strict, to_mlx

STEM = "diffusion_pytorch_model"
"""Name of the weights file in a folder of diffusers' layout."""


@dataclass(frozen=True)
class _Family:
    """A kind of network: how it is built from its config.json, and how its weights are named on disk."""

    build: Callable[[Mapping[str, Any]], nn.Module]
    rules: Sequence[Rule]


FAMILIES = {
    "AutoencoderKL": _Family(lambda config: AutoencoderKL(AutoencoderKLConfig.from_dict(config)), AUTOENCODER_KL),
    "PlainAutoencoder": _Family(lambda config: PlainAutoencoder(PlainConfig.from_dict(config)), SAME_NAMES),
}
"""By the `_class_name` of config.json."""


class VAE(nn.Module):
    """An image autoencoder.

    `VAE(latent_channels=4)` builds an untrained one with LeakyReLU residual blocks (64-128-256-512 channels);
    `VAE.from_pretrained` opens a trained one; `VAE(network=...)` wraps any network that has `config`, `encode`
    and `decode` as `AutoencoderKL` has.

    Args:
        latent_channels: channels of a latent of the network that is built.
        network: the network to wrap instead; `latent_channels` is then its own.
    """

    def __init__(self, latent_channels: int = 4, *, network: nn.Module | None = None):
        super().__init__()
        if network is None:
            network = PlainAutoencoder(PlainConfig(latent_channels=latent_channels))
        self.network = network

    @property
    def config(self) -> Any:
        """The network's configuration."""
        return self.network.config

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.config.latent_channels

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent in each direction."""
        return self.config.downsampling

    @property
    def scaling_factor(self) -> float:
        """Scaled latents are (latents - shift_factor) * scaling_factor."""
        return self.config.scaling_factor

    @property
    def shift_factor(self) -> float:
        """See `scaling_factor`."""
        return self.config.shift_factor or 0.0

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: mx.Dtype | None = None) -> VAE:
        """Open a folder in diffusers' layout: `config.json` and `diffusion_pytorch_model.safetensors`.

        Args:
            folder: an autoencoder's folder, or a pipeline's, which has one named `vae`.
            dtype: to compute in, if not on a CPU, which always takes float32; None for bfloat16. A network whose
                configuration says that it overflows in float16 (`force_upcast`) takes float32 instead of that.

        Raises:
            WeightsError: files are missing or broken, of an unknown kind, or do not fit the configuration.
            SettingsError: the configuration asks for what the network does not have.
        """
        folder = Path(folder)
        if (folder / "model_index.json").is_file():
            folder = folder / "vae"
        config = read_json(folder / "config.json")
        family = _family(config, folder)
        network = family.build(config)
        dtype = compute_dtype(dtype)
        if dtype == mx.float16 and getattr(network.config, "force_upcast", False):
            dtype = mx.float32
        load_strict(network, to_mlx(read_folder(folder, STEM), family.rules), where=str(folder), dtype=dtype)
        return cls(network=network)

    def save_pretrained(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write the folder that `from_pretrained` opens; an `AutoencoderKL` also opens in diffusers.

        Args:
            folder: made where it is missing.
            dtype: of the stored weights: float32, float16 or bfloat16.

        Raises:
            SettingsError: another dtype.
            WeightsError: a network of a kind that `from_pretrained` does not know.
        """
        if dtype not in DTYPES:
            raise SettingsError(f"weights are stored as {', '.join(DTYPES)}, not {dtype!r}")
        folder = Path(folder)
        config = self.config.to_dict()
        tensors = from_mlx(dict(tree_flatten(self.network.parameters())), _family(config, folder).rules)
        write_safetensors(folder / f"{STEM}.safetensors", {k: v.astype(DTYPES[dtype]) for k, v in tensors.items()})
        write_json(folder / "config.json", config)

    def encode(self, image: mx.array, *, sample: bool = False, key: mx.array | None = None) -> mx.array:
        """Image to latents, scaled for the denoiser.

        Args:
            image: (B, C, H, W) in [0, 255], uint8 or floating point; H and W multiples of `spatial_scale`.
            sample: draw from the posterior instead of taking its mode.
            key: random key for the draw; None uses MLX's global state.

        Returns:
            (B, latent_channels, H / spatial_scale, W / spatial_scale), float32.

        Raises:
            ImageError: wrong number of axes or channels, or a size that is no multiple.
        """
        posterior = self.posterior(image)
        latents = posterior.sample(key) if sample else posterior.mode()
        return self.scaled(latents).transpose(0, 3, 1, 2)

    def posterior(self, image: mx.array) -> DiagonalGaussian:
        """The distribution over unscaled latents, NHWC. Arguments and errors as in `encode`."""
        self._check(image)
        # NCHW [0, 255] -> NHWC [-1, 1]
        return self.network.encode(image.astype(mx.float32).transpose(0, 2, 3, 1) / 127.5 - 1)

    def decode(self, latent: mx.array) -> mx.array:
        """Scaled latents (B, latent_channels, h, w) to an image (B, C, H, W), float32 in [0, 255].

        Raises:
            ImageError: wrong number of axes or channels.
        """
        if latent.ndim != 4 or latent.shape[1] != self.latent_channels:
            raise ImageError(f"latents are {tuple(latent.shape)}, expected (B, {self.latent_channels}, h, w)")
        return _image(self.decode_nhwc(latent.transpose(0, 2, 3, 1)))

    def __call__(self, image: mx.array) -> tuple[mx.array, DiagonalGaussian]:
        """Reconstruction (B, C, H, W) in [0, 255] from the posterior's mode, and the posterior."""
        posterior = self.posterior(image)
        return _image(self.network.decode(posterior.mode())), posterior

    def encode_nhwc(self, pixels: mx.array) -> mx.array:
        """(B, H, W, C) in [-1, 1] -> scaled latents (B, h, w, latent), the posterior's mode: for pipelines."""
        return self.scaled(self.network.encode(pixels).mode())

    def decode_nhwc(self, latents: mx.array) -> mx.array:
        """Scaled latents (B, h, w, latent) -> (B, H, W, C), about [-1, 1], not clipped: for pipelines."""
        return self.network.decode(latents / self.scaling_factor + self.shift_factor)

    def scaled(self, latents: mx.array) -> mx.array:
        """Raw latents of the network -> what the denoiser sees: (latents - shift_factor) * scaling_factor."""
        return (latents - self.shift_factor) * self.scaling_factor

    def _check(self, image: mx.array) -> None:
        channels, factor = self.config.in_channels, self.spatial_scale
        if image.ndim != 4 or image.shape[1] != channels:
            raise ImageError(f"image is {tuple(image.shape)}, expected (B, {channels}, H, W) with values in [0, 255]")
        height, width = image.shape[2:]
        if height % factor or width % factor or not height or not width:
            raise ImageError(f"image is {height} x {width} pixels; resize or crop it to multiples of {factor}")


def _image(pixels: mx.array) -> mx.array:
    """NHWC about [-1, 1] -> NCHW float32 in [0, 255]."""
    return mx.clip((pixels.astype(mx.float32) + 1) * 127.5, 0, 255).transpose(0, 3, 1, 2)


def _family(config: Mapping[str, Any], folder: Path) -> _Family:
    name = config.get("_class_name", "AutoencoderKL")
    if name not in FAMILIES:
        raise WeightsError(f"{folder}: autoencoders of class {name!r} are not known; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]
