"""Images to latents and back, for image-diffusion pipelines in MLX.

The names below are imported when they are first asked for, so that a command line answers at once.
"""

import sys
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.version_info < (3, 10):  # noqa: UP036  (a checkout that pip did not install)
    print(f"mflux-vae: error: needs Python 3.10 or newer, this is {sys.version.split()[0]}", file=sys.stderr)
    raise SystemExit(2)

from mflux_vae.errors import BackendError, ImageError, InputError, MfluxVaeError, SettingsError, WeightsError

with suppress(BackendError):  # raised again by whatever computes
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
    import_module(f"{__name__}.runtime.device")  # a clear error where MLX cannot be imported
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
