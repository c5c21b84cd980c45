"""A common interface to the networks of a comparison."""

from __future__ import annotations

from math import prod
from typing import Any, Literal, Protocol, TypeAlias

import mlx.core as mx
import numpy as np

from mflux_vae.compare.measuring import from_chw, to_nchw
from mflux_vae.images import to_pictures, to_pixels
from mflux_vae.networks.laq import LatentActionQuantizer
from mflux_vae.posterior import DiagonalGaussian
from mflux_vae.pretrained import loading
from mflux_vae.tiling.plan import TilingOption
from mflux_vae.utils.arrays import check_decoded
from mflux_vae.vae import VAE

First: TypeAlias = Literal["self", "previous"]
"""First frame of a pair whose second frame is the image: the image itself, or the previous image."""


class Codec(Protocol):
    """Encodes and decodes frames, uint8 (S, S, channels).

    Attributes:
        network: the network.
        side: the only image size that it takes (pixels), or None.
        channels: image channels.
        note: remark on its measurements, or "".
    """

    network: Any
    side: int | None
    channels: int
    note: str

    def prepare(self, frame: np.ndarray, first: np.ndarray) -> Any:
        """Convert a frame and its first frame to the input of `encode`."""

    def encode(self, inputs: Any) -> Any:
        """Encode, evaluated."""

    def decode(self, inputs: Any, latents: Any) -> np.ndarray:
        """Decode to a frame."""

    def values(self, latents: Any) -> np.ndarray:
        """Latents as an array (..., C)."""

    def kl(self, latents: Any) -> float | None:
        """KL divergence from the standard normal in nats; None without variances."""

    def describe(self, latents: Any) -> dict[str, Any]:
        """Size of a latent: `numbers` (count) and `shape` (text)."""


class ImageCodec:
    """An autoencoder of images; decodes the mode of the posterior."""

    note = ""

    def __init__(self, network: Any, tiling: TilingOption = None):
        self.network: Any = network
        self.side: int | None = network.config.downsampling if network.config.vectors else None
        self.channels: int = network.config.in_channels
        self._vae, self._tiling = VAE(network=network), tiling

    def prepare(self, frame: np.ndarray, first: np.ndarray) -> mx.array:
        return to_nchw(frame)

    def encode(self, inputs: mx.array) -> tuple[DiagonalGaussian, mx.array]:
        posterior = self._vae.posterior(inputs, tiling=self._tiling)
        latents = self._vae.scaled(posterior.mode())
        mx.eval(latents, posterior.logvar)
        return posterior, latents

    def decode(self, inputs: mx.array, latents: tuple[DiagonalGaussian, mx.array]) -> np.ndarray:
        scaled = latents[1] if latents[1].ndim == 2 else latents[1].transpose(0, 3, 1, 2)
        height, width = inputs.shape[2:]
        decoded = self._vae.decode(scaled, size=(height, width), tiling=self._tiling)
        check_decoded(decoded)
        return from_chw(decoded[0])

    def values(self, latents: tuple[DiagonalGaussian, mx.array]) -> np.ndarray:
        return np.array(latents[0].mean)

    def kl(self, latents: tuple[DiagonalGaussian, mx.array]) -> float | None:
        return None if mx.isinf(latents[0].logvar).all() else float(latents[0].kl())

    def describe(self, latents: tuple[DiagonalGaussian, mx.array]) -> dict[str, Any]:
        *sides, channels = latents[1].shape[1:]
        return {"numbers": prod((channels, *sides)), "shape": " x ".join(map(str, (channels, *sides)))}


class PairCodec:
    """A latent action quantizer: encodes the change between two frames; the decoder gets the first frame."""

    def __init__(self, network: LatentActionQuantizer, first: First):
        self.network: Any = network
        self.side: int | None = network.config.image_size
        self.channels: int = network.config.channels
        which = "itself" if first == "self" else "the previous image (the first one with itself)"
        self.note = (
            f"each image is the second frame of a pair with {which}; the codes ({network.config.bits:.3g} bits)"
            " describe the change, and the decoder gets the first frame"
        )

    def prepare(self, frame: np.ndarray, first: np.ndarray) -> tuple[mx.array, mx.array]:
        before, after = (mx.array(to_pixels(each)[None]) for each in (first, frame))
        return before, after

    def encode(self, inputs: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
        difference = self.network.difference(*inputs)
        codes = self.network.quantizer.nearest(difference)
        mx.eval(difference, codes)
        return difference, codes

    def decode(self, inputs: tuple[mx.array, mx.array], latents: tuple[mx.array, mx.array]) -> np.ndarray:
        decoded = self.network.decode(inputs[0], latents[1]).astype(mx.float32)
        check_decoded(decoded)
        return to_pictures(np.array(decoded)[0])

    def values(self, latents: tuple[mx.array, mx.array]) -> np.ndarray:
        return np.array(latents[0])

    def kl(self, latents: tuple[mx.array, mx.array]) -> None:
        return None

    def describe(self, latents: tuple[mx.array, mx.array]) -> dict[str, Any]:
        count = self.network.config.code_seq_len
        return {"numbers": count, "shape": f"{count} codes of {self.network.config.codebook_size}"}


def open_codec(
    source: loading.Source,
    dtype: mx.Dtype | None = None,
    *,
    config: loading.Config | None = None,
    tiling: TilingOption = None,
    first: First = "self",
) -> Codec:
    """Open a network of any kind; arguments and errors as in `loading.open_network`, tiling as in `VAE`."""
    network: Any = loading.open_network(source, dtype, config=config, pairs=True)
    if isinstance(network, LatentActionQuantizer):
        return PairCodec(network, first)
    return ImageCodec(network, tiling)
