"""`VAE`: images to latents and back. NCHW in [0, 255] outside, NHWC in [-1, 1] inside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mflux_vae import images
from mflux_vae.call_log import evaluated, log, logged, shape
from mflux_vae.errors import ImageError, SettingsError
from mflux_vae.integrations.mflux import MfluxVAE
from mflux_vae.networks.plain import PlainAutoencoder, PlainConfig
from mflux_vae.networks.protocol import AutoencoderConfig, missing_members
from mflux_vae.posterior import DiagonalGaussian
from mflux_vae.pretrained import loading
from mflux_vae.runtime.device import eval_each, is_cpu
from mflux_vae.runtime.threads import exclusive, thread_safe
from mflux_vae.tiling import plan as tiling_plan
from mflux_vae.tiling import tiles as pieces
from mflux_vae.tiling.plan import TilingOption
from mflux_vae.utils.arrays import FILES, LATENTS, as_array


class VAE(nn.Module):
    """An image autoencoder.

    `VAE(latent_channels=4)` builds an untrained one with LeakyReLU residual blocks (64-128-256-512 channels),
    `VAE.from_pretrained` opens a trained one, and `VAE(network=...)` wraps any `networks.protocol.Autoencoder`.

    Sizes need not be multiples of `spatial_scale`: edge pixels are repeated at the right and bottom up to the next
    multiple. `__call__` crops the reconstruction to the size of its image, `decode` to `size`.

    `tiling` of every method: None processes a call in pieces only if it would not fit into memory (`peak_bytes`);
    False never; True and "exact" always, with the untiled result; "blend" in overlapping tiles that are blended; a
    `Tiling` gives more control.

    Vector latents (`FlatAutoencoder`) are (B, latent_channels) everywhere. Such a network takes images of one size,
    `spatial_scale`: smaller ones are padded and cropped, larger ones are refused, and it is never tiled.

    Any thread may use a VAE, and several may at once: their calls run one after the other and return arrays that every
    thread may use. Evaluate weights that you change or pass as `network` before another thread uses them.

    Args:
        latent_channels: latent channels of the network that is built.
        network: network to wrap instead; `latent_channels` is ignored.

    Raises:
        SettingsError: `network` lacks members of `networks.protocol.Autoencoder`.
    """

    def __init__(self, latent_channels: int = 4, *, network: nn.Module | None = None):
        super().__init__()
        if network is None:
            network = PlainAutoencoder(PlainConfig(latent_channels=latent_channels))
            mx.eval(network.parameters())
        elif missing := missing_members(network):
            lacks = ", ".join(missing)
            raise SettingsError(f"{type(network).__name__} lacks {lacks}; see mflux_vae.networks.protocol")
        self.network = network

    def __repr__(self) -> str:
        count = sum(weight.size for weight in _weights(self.network)) / 1e6
        kind, dtype = type(self.network).__name__, str(self.dtype).removeprefix("mlx.core.")
        latents = f"{self.latent_channels} latent channels"
        latents += "" if self._vectors else f" at 1/{self.spatial_scale} of the size"
        return f"VAE({kind}, {latents}, {count:.1f} million parameters in {dtype})"

    @property
    def config(self) -> AutoencoderConfig:
        """The network's configuration."""
        return self.network.config

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that `encode` returns."""
        return self.config.scaled_channels

    @property
    def spatial_scale(self) -> int:
        """Pixels per latent in each direction."""
        return self.config.scaled_downsampling

    @property
    def scaling_factor(self) -> float:
        """Scaled latents are (latents - shift_factor) * scaling_factor, unless per-channel statistics scale them."""
        return self.config.scaling_factor

    @property
    def shift_factor(self) -> float:
        """See `scaling_factor`."""
        return self.config.shift_factor or 0.0

    @property
    def _vectors(self) -> bool:
        """Whether latents are vectors."""
        return self.config.vectors

    @property
    def _latent_axes(self) -> str:
        """Axes of the latents of one image, for messages."""
        return f"{self.latent_channels}" + ("" if self._vectors else ", h, w")

    @property
    def dtype(self) -> mx.Dtype:
        """dtype of the weights."""
        return next((weight.dtype for weight in _weights(self.network)), mx.float32)

    @property
    def _input_dtype(self) -> mx.Dtype:
        """dtype of activations: that of the weights on a CPU, else float32 (see `networks.layers.layer_input`)."""
        return self.dtype if is_cpu() else mx.float32

    @classmethod
    def from_pretrained(
        cls, source: str | Path, dtype: mx.Dtype | None = None, *, config: loading.Config | None = None
    ) -> VAE:
        """Open a trained autoencoder: a folder, a pipeline folder, a file, a preset or a hub id.

        Arguments and errors as in `loading.open_network`.
        """
        vae = cls(network=loading.open_network(source, dtype, config=config))
        with exclusive():
            eval_each(vae.network.parameters())
        count = sum(weight.size for weight in _weights(vae.network))
        kind, precision = type(vae.network).__name__, str(vae.dtype).removeprefix("mlx.core.")
        log.info("%s: %s with %.1f million parameters in %s", source, kind, count / 1e6, precision)
        return vae

    def save_pretrained(self, folder: str | Path, dtype: str = "float32") -> None:
        """Write a folder for `from_pretrained`; diffusers opens it if it has such a network.

        Args:
            folder: created if missing.
            dtype: float32, float16 or bfloat16.

        Raises:
            SettingsError: another dtype.
            WeightsError: `from_pretrained` does not know this kind of network.
        """
        loading.save_network(self.network, folder, dtype)

    @thread_safe
    def encode(
        self,
        image: mx.array | np.ndarray,
        *,
        sample: bool = False,
        key: mx.array | None = None,
        tiling: TilingOption = None,
    ) -> mx.array:
        """Encode images to latents, scaled for the denoiser.

        Args:
            image: (B, C, H, W) in [0, 255], uint8 or floating point, MLX or NumPy, any size (see the class).
            sample: draw from the posterior instead of using its mode.
            key: random key for the draw; None uses MLX's global state.
            tiling: see the class.

        Returns:
            (B, latent_channels, ceil(H / spatial_scale), ceil(W / spatial_scale)), float32.

        Raises:
            ImageError: wrong number of axes or channels, no pixels, or floating-point values that are infinite, NaN, or
                in [-1, 1] with negative ones.
        """
        posterior = self.posterior(image, tiling=tiling)
        raw = posterior.sample(key) if sample else posterior.mode()
        scaled = self.scaled(raw)
        latents = scaled if self._vectors else scaled.transpose(0, 3, 1, 2)
        log.debug("raw latents %s -> latents %s", shape(raw), shape(latents))
        return latents

    @thread_safe
    def posterior(self, image: mx.array | np.ndarray, *, tiling: TilingOption = None) -> DiagonalGaussian:
        """Encode to the posterior over unscaled latents, NHWC. Arguments and errors as in `encode`."""
        image = as_array(image, "image is", f"(B, {self.config.in_channels}, H, W)", FILES)
        self._check(image)
        # NCHW [0, 255] -> NHWC [-1, 1]
        pixels = padded(image.astype(mx.float32).transpose(0, 2, 3, 1) / 127.5 - 1, self.spatial_scale)
        log.debug("image %s -> pixels %s", shape(image), shape(pixels))
        return self._encode(pixels, tiling)

    @thread_safe
    def decode(
        self, latent: mx.array | np.ndarray, *, size: tuple[int, int] | None = None, tiling: TilingOption = None
    ) -> mx.array:
        """Decode scaled latents to images.

        Args:
            latent: (B, latent_channels, h, w).
            size: (height, width) to crop to, at the right and bottom; None: spatial_scale * (h, w).
            tiling: see the class.

        Returns:
            (B, C, H, W), float32 in [0, 255].

        Raises:
            ImageError: wrong number of axes or channels, no floats, or an impossible size.
        """
        expected = f"(B, {self._latent_axes})"
        axes, latent = 2 if self._vectors else 4, as_array(latent, "latents are", expected, LATENTS)
        if latent.ndim != axes or latent.shape[1] != self.latent_channels or not latent.size:
            raise _misshapen("latents are", latent, expected, (axes, 0, self.latent_channels))
        if not mx.issubdtype(latent.dtype, mx.floating):
            raise ImageError(f"latents are {str(latent.dtype).removeprefix('mlx.core.')}; expected floats")
        high, wide = latent.shape[2:] or (1, 1)
        full = high * self.spatial_scale, wide * self.spatial_scale
        size = size or full
        if any(not most - self.spatial_scale < side <= most for side, most in zip(size, full, strict=True)):
            raise ImageError(f"latents of {full[0]} x {full[1]} pixels cannot be an image of {size[0]} x {size[1]}")
        raw = self.network.from_scaled(latent if self._vectors else latent.transpose(0, 2, 3, 1))
        log.debug("latents %s -> raw latents %s", shape(latent), shape(raw))
        return _image(self._decode(raw, tiling), size)

    def encode_images(
        self,
        pictures: images.Source | Sequence[images.Source],
        *,
        sample: bool = False,
        key: mx.array | None = None,
        tiling: TilingOption = None,
    ) -> list[mx.array]:
        """Encode images of any sizes, one after the other.

        Args:
            pictures: files, Pillow images or arrays: see `images.load_images`.
            sample, key, tiling: as in `encode`; draws of the images are independent.

        Returns:
            scaled latents (latent_channels, h, w), one per image.

        Raises:
            ImageError: an image cannot be read.
        """
        loaded = images.load_images(pictures, channels=self.config.in_channels)
        keys = [None] * len(loaded) if key is None else list(mx.random.split(key, len(loaded)))

        @thread_safe
        def encoded(picture: np.ndarray, key: mx.array | None) -> mx.array:
            return self.encode(mx.array(picture.transpose(2, 0, 1)[None]), sample=sample, key=key, tiling=tiling)[0]

        return [encoded(*each) for each in zip(loaded, keys, strict=True)]

    def decode_images(
        self,
        latents: Sequence[mx.array],
        sizes: Sequence[tuple[int, int]] | None = None,
        *,
        tiling: TilingOption = None,
    ) -> list[images.Image.Image]:
        """Decode scaled latents to Pillow images, one after the other.

        Args:
            latents: (latent_channels, h, w) each.
            sizes: (height, width) of each, as in `decode`.
            tiling: see the class.

        Raises:
            ImageError: as `decode`, or numbers of sizes and latents differ.
        """
        decoded, axes, channels = [], 2 if self._vectors else 4, self.latent_channels
        expected = f"(B, {self._latent_axes}) or a list of ({self._latent_axes})"
        if isinstance(latents, mx.array | np.ndarray) and latents.ndim != axes:
            latents = as_array(latents, "latents are", expected, LATENTS)
            raise _misshapen("latents are", latents, expected, (axes, 0, channels))
        if isinstance(latents, str | bytes) or not isinstance(latents, Iterable):
            as_array(latents, "latents are", expected, LATENTS)
        if sizes is not None and len(sizes) != len(latents):
            raise ImageError(f"{len(sizes)} sizes for {len(latents)} latents")
        for index, each in enumerate(latents):
            each = as_array(each, "latents are", f"({self._latent_axes})", LATENTS)
            if each.ndim != axes - 1 or each.shape[0] != channels or not each.size:
                raise ImageError(f"latents of image {index} are {tuple(each.shape)}; expected {expected}")
            image = self.decode(each[None], size=sizes[index] if sizes else None, tiling=tiling)[0].transpose(1, 2, 0)
            if mx.any(mx.isnan(image)):
                log.warning("image %d has NaN values, drawn black: latents or weights are not finite", index)
            decoded.append(images.to_image(np.array(mx.round(mx.nan_to_num(image)).astype(mx.uint8))))
        return decoded

    @thread_safe
    def __call__(
        self, image: mx.array | np.ndarray, *, tiling: TilingOption = None
    ) -> tuple[mx.array, DiagonalGaussian]:
        """Reconstruction (B, C, H, W) in [0, 255] from the posterior's mode, and the posterior."""
        image = as_array(image, "image is", f"(B, {self.config.in_channels}, H, W)", FILES)
        posterior = self.posterior(image, tiling=tiling)
        return _image(self._decode(posterior.mode(), tiling), image.shape[2:]), posterior

    @thread_safe
    def encode_nhwc(self, pixels: mx.array, *, tiling: TilingOption = None) -> mx.array:
        """(B, H, W, C) in [-1, 1] -> scaled latents (B, h, w, latent_channels), the mode; for MLX pipelines."""
        expected = f"(B, H, W, {self.config.in_channels})"
        pixels = as_array(pixels, "image is", expected, FILES)
        if pixels.ndim != 4 or pixels.shape[3] != self.config.in_channels or not pixels.size:
            expected += " with values in [-1, 1]"
            raise _misshapen("image is", pixels, expected, (4, -1, self.config.in_channels))
        return self.scaled(self._encode(padded(pixels, self.spatial_scale), tiling).mode())

    @thread_safe
    def decode_nhwc(self, latents: mx.array, *, tiling: TilingOption = None) -> mx.array:
        """Scaled latents (B, h, w, latent_channels) -> (B, H, W, C), about [-1, 1], not clipped; for MLX pipelines."""
        expected = f"(B, {'' if self._vectors else 'h, w, '}{self.latent_channels})"
        latents = as_array(latents, "latents are", expected, LATENTS)
        axes = 2 if self._vectors else 4
        if latents.ndim != axes or latents.shape[-1] != self.latent_channels or not latents.size:
            raise _misshapen("latents are", latents, expected, (axes, -1, self.latent_channels))
        return self._decode(self.network.from_scaled(latents), tiling)

    def scaled(self, latents: mx.array) -> mx.array:
        """Scale raw latents (NHWC) for the denoiser, usually (raw - shift_factor) * scaling_factor."""
        return self.network.to_scaled(latents)

    def as_mflux(self, *, tiling: TilingOption = None) -> MfluxVAE:
        """Adapter that replaces `flux.vae` of mflux, sharing this network."""
        return MfluxVAE(self, tiling)

    def peak_bytes(
        self, what: Literal["encode", "decode"], height: int, width: int, *, batch: int = 1, tiling: TilingOption = None
    ) -> int:
        """Estimate the peak memory (bytes) of a call, without the weights.

        Args:
            what: "encode" or "decode".
            height, width, batch: size of the image (pixels) and number of images.
            tiling: see the class.
        """
        height, width = (side + -side % self.spatial_scale for side in (height, width))
        plan = tiling_plan.plan(self.network, what, batch, height, width, tiling)
        return tiling_plan.peak_bytes(self.network, what, batch, height, width, plan)

    def _encode(self, pixels: mx.array, tiling: TilingOption) -> DiagonalGaussian:
        """NHWC in [-1, 1], padded -> posterior over raw latents."""
        batch, height, width, _ = pixels.shape
        plan = tiling_plan.plan(self.network, "encode", batch, height, width, tiling)
        return logged("encode", pixels.astype(self._input_dtype), lambda x: pieces.encode(self.network, x, plan))

    def _decode(self, latents: mx.array, tiling: TilingOption) -> mx.array:
        """Raw latents -> NHWC, about [-1, 1]."""
        sides = latents.shape[1:-1] or (1, 1)
        batch, height, width = latents.shape[0], *(side * self.config.downsampling for side in sides)
        plan = tiling_plan.plan(self.network, "decode", batch, height, width, tiling)
        return logged("decode", latents.astype(self._input_dtype), lambda z: pieces.decode(self.network, z, plan))

    def _check(self, image: mx.array) -> None:
        channels = self.config.in_channels
        if image.ndim != 4 or image.shape[1] != channels or not image.size:
            raise _misshapen("image is", image, f"(B, {channels}, H, W) with values in [0, 255]", (4, 0, channels))
        height, width = image.shape[2:]
        if self._vectors and max(height, width) > (side := self.spatial_scale):  # checked before padding
            raise ImageError(f"this autoencoder takes images of {side} x {side}, not {height} x {width}; resize them")
        if mx.issubdtype(image.dtype, mx.floating):
            _check_range(image)


def _misshapen(what: str, array: mx.array, expected: str, batch: tuple[int, int, int]) -> ImageError:
    """Error about a shape, with advice if only the batch axis is missing.

    Args:
        what: subject and verb.
        batch: number of axes of a batch, channel axis of one sample, number of channels.
    """
    axes, axis, channels = batch
    single = array.size and array.ndim == axes - 1 and array.shape[axis] == channels
    hint = f"; add a batch axis: {what.split()[0]}[None]" if single else ""
    return ImageError(f"{what} {tuple(array.shape)}; expected {expected}{hint}")


def _weights(network: nn.Module) -> list[mx.array]:
    return list(dict(tree_flatten(network.parameters())).values())


def padded(pixels: mx.array, factor: int) -> mx.array:
    """Repeat the last row and column of (B, H, W, C) until both sides are multiples of `factor`."""
    bottom, right = (-side % factor for side in pixels.shape[1:3])
    if not bottom and not right:
        return pixels
    return mx.pad(pixels, [(0, 0), (0, bottom), (0, right), (0, 0)], mode="edge")


def _image(pixels: mx.array, size: tuple[int, ...]) -> mx.array:
    """NHWC about [-1, 1] -> NCHW float32 in [0, 255], cropped to height and width."""
    pixels = pixels[:, : size[0], : size[1]]
    image = mx.clip((pixels.astype(mx.float32) + 1) * 127.5, 0, 255).transpose(0, 3, 1, 2)
    log.debug("pixels %s -> image %s", shape(pixels), shape(image))
    return image


def _check_range(image: mx.array) -> None:
    """Refuse images in [-1, 1] or with infinite or NaN values; warn once about images in [0, 1]."""
    global _warned
    ends = mx.stack([image.min(), image.max()]).astype(mx.float32)
    if not evaluated(ends):  # traced by mx.compile: no values
        return
    least, most = cast("list[float]", ends.tolist())
    if not math.isfinite(most - least):
        raise ImageError("image has infinite or NaN values; expected [0, 255]")
    if -1 <= least < 0 and most <= 1:
        raise ImageError(f"image is in [{least:.3g}, {most:.3g}]; expected [0, 255]: pass (image + 1) * 127.5")
    if least >= 0 and 0 < most <= 1 and not _warned:
        _warned = True
        log.warning(
            "image is in [%.3g, %.3g], almost black in [0, 255]; multiply by 255 if it is in [0, 1]", least, most
        )


_warned = False
