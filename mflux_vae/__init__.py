"""Images to latents and back, for image-diffusion pipelines in MLX."""

from mflux_vae import runtime as runtime  # first: it opens a fast BLAS
from mflux_vae.errors import ImageError, InputError, MfluxVaeError, SettingsError, WeightsError
from mflux_vae.networks.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mflux_vae.networks.plain import PlainAutoencoder, PlainConfig
from mflux_vae.posterior import DiagonalGaussian
from mflux_vae.vae import VAE

__all__ = [
    "VAE",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "DiagonalGaussian",
    "ImageError",
    "InputError",
    "MfluxVaeError",
    "PlainAutoencoder",
    "PlainConfig",
    "SettingsError",
    "WeightsError",
]
