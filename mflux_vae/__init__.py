"""Images to latents and back, for image-diffusion pipelines in MLX.

The names below are imported when they are first asked for, so that a command line answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mflux_vae.errors import ImageError, InputError, MfluxVaeError, SettingsError, WeightsError
from mflux_vae.runtime import device  # noqa: F401  (finds a BLAS before MLX is first used)

if TYPE_CHECKING:
    from mflux_vae.networks.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
    from mflux_vae.networks.flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config
    from mflux_vae.networks.plain import PlainAutoencoder, PlainConfig
    from mflux_vae.networks.tiny import AutoencoderTiny, AutoencoderTinyConfig
    from mflux_vae.posterior import DiagonalGaussian
    from mflux_vae.previews import Previewer
    from mflux_vae.tiling.tiles import Tiling
    from mflux_vae.vae import VAE

__all__ = [
    "VAE",
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "AutoencoderKLFlux2",
    "AutoencoderKLFlux2Config",
    "AutoencoderTiny",
    "AutoencoderTinyConfig",
    "DiagonalGaussian",
    "ImageError",
    "InputError",
    "MfluxVaeError",
    "PlainAutoencoder",
    "PlainConfig",
    "Previewer",
    "SettingsError",
    "Tiling",
    "WeightsError",
]

_HOMES = {
    "VAE": "vae",
    "AutoencoderKL": "networks.autoencoder_kl",
    "AutoencoderKLConfig": "networks.autoencoder_kl",
    "AutoencoderKLFlux2": "networks.flux2",
    "AutoencoderKLFlux2Config": "networks.flux2",
    "AutoencoderTiny": "networks.tiny",
    "AutoencoderTinyConfig": "networks.tiny",
    "DiagonalGaussian": "posterior",
    "PlainAutoencoder": "networks.plain",
    "PlainConfig": "networks.plain",
    "Previewer": "previews",
    "Tiling": "tiling.tiles",
}
"""Where the names live that are imported late."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
