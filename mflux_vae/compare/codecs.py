"""What a comparison does with networks of different kinds: a frame to latents and back, and latents as numbers."""

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
from mflux_vae.vae import VAE

First: TypeAlias = Literal["self", "previous"]
"""The first frame of a pair whose second is the picture: itself, or the picture before it."""


class Codec(Protocol):
    """A network, and what is the same for all kinds of it. Frames are uint8 (S, S, channels).

    Attributes:
        network: encodes and decodes.
        side: the only size of images that it knows, or None.
        channels: of its images.
        note: what the reader of its measurements has to know, or "".
    """

    network: Any
    side: int | None
    channels: int
    note: str

    def given(self, frame: np.ndarray, first: np.ndarray) -> Any:
        """A frame, and the one before it, as `encode` takes them."""

    def encode(self, given: Any) -> Any:
        """Latents, computed."""

    def decode(self, given: Any, latents: Any) -> np.ndarray:
        """The frame again."""

    def values(self, latents: Any) -> np.ndarray:
        """Latents as numbers, (..., C)."""

    def kl(self, latents: Any) -> float | None:
        """Divergence from the standard normal in nats, where the network has variances."""

    def told(self, latents: Any) -> dict[str, Any]:
        """What a latent is made of: `numbers`, how many, and its `shape` as a text."""


class ImageCodec:
    """Images to a distribution over latents, whose mode is decoded."""

    note = ""

    def __init__(self, network: Any, tiling: TilingOption = None):
        self.network: Any = network
        self.side: int | None = network.config.image_size if getattr(network.config, "vectors", False) else None
        self.channels: int = network.config.in_channels
        self._vae, self._tiling = VAE(network=network), tiling

    def given(self, frame: np.ndarray, first: np.ndarray) -> mx.array:
        return to_nchw(frame)

    def encode(self, given: mx.array) -> tuple[DiagonalGaussian, mx.array]:
        posterior = self._vae.posterior(given, tiling=self._tiling)
        latents = self._vae.scaled(posterior.mode())
        mx.eval(latents, posterior.logvar)
        return posterior, latents

    def decode(self, given: mx.array, latents: tuple[DiagonalGaussian, mx.array]) -> np.ndarray:
        scaled = latents[1] if latents[1].ndim == 2 else latents[1].transpose(0, 3, 1, 2)
        height, width = given.shape[2:]
        return from_chw(self._vae.decode(scaled, size=(height, width), tiling=self._tiling)[0])

    def values(self, latents: tuple[DiagonalGaussian, mx.array]) -> np.ndarray:
        return np.array(latents[0].mean)

    def kl(self, latents: tuple[DiagonalGaussian, mx.array]) -> float | None:
        return None if mx.isinf(latents[0].logvar).all() else float(latents[0].kl())

    def told(self, latents: tuple[DiagonalGaussian, mx.array]) -> dict[str, Any]:
        *sides, channels = latents[1].shape[1:]
        return {"numbers": prod((channels, *sides)), "shape": " x ".join(map(str, (channels, *sides)))}


class PairCodec:
    """A picture as the second frame of a pair, to codes of what changes; its first frame is known to the decoder."""

    def __init__(self, network: LatentActionQuantizer, first: First):
        self.network: Any = network
        self.side: int | None = network.config.image_size
        self.channels: int = network.config.channels
        which = "itself" if first == "self" else "the picture before it (the first one with itself)"
        self.note = (
            f"each picture is the second frame of a pair with {which}; codes tell what changes,"
            f" {network.config.bits:.3g} bits, and decoding sees the whole first frame"
        )

    def given(self, frame: np.ndarray, first: np.ndarray) -> tuple[mx.array, mx.array]:
        before, after = (mx.array(to_pixels(each)[None]) for each in (first, frame))
        return before, after

    def encode(self, given: tuple[mx.array, mx.array]) -> tuple[mx.array, mx.array]:
        difference = self.network.difference(*given)
        codes = self.network.quantizer.nearest(difference)
        mx.eval(difference, codes)
        return difference, codes

    def decode(self, given: tuple[mx.array, mx.array], latents: tuple[mx.array, mx.array]) -> np.ndarray:
        return to_pictures(np.array(self.network.decode(given[0], latents[1]).astype(mx.float32))[0])

    def values(self, latents: tuple[mx.array, mx.array]) -> np.ndarray:
        return np.array(latents[0])

    def kl(self, latents: tuple[mx.array, mx.array]) -> None:
        return None

    def told(self, latents: tuple[mx.array, mx.array]) -> dict[str, Any]:
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
    """Open a network of any kind; see `loading.open_network` for what it takes and raises, and `VAE` for tiling."""
    network: Any = loading.open_network(source, dtype, config=config, pairs=True)
    if isinstance(network, LatentActionQuantizer):
        return PairCodec(network, first)
    return ImageCodec(network, tiling)
