"""The public names: adding one is a decision, removing one breaks somebody."""

from __future__ import annotations

import mflux_vae


def test_exported_names() -> None:
    assert mflux_vae.__all__ == sorted(mflux_vae.__all__, key=lambda name: (not name.isupper(), name))
    assert mflux_vae.__all__ == [
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
    for name in mflux_vae.__all__:
        assert getattr(mflux_vae, name).__doc__
