"""Approximate decoding in milliseconds: a linear projection fitted to a VAE, or a tiny autoencoder (TAESD).

The projection is one affine map from a latent (C) to detail x detail pixels, fitted by least squares to the decoder's
output. It ignores neighbouring latents: colours and shapes are right, textures are missing.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mflux_vae.errors import ImageError, SettingsError, WeightsError
from mflux_vae.utils.arrays import FILES, LATENTS, as_array
from mflux_vae.weights.formats.files import read_safetensors, write_safetensors
from mflux_vae.weights.formats.lazy_tensor import check_numbers

if TYPE_CHECKING:
    from mflux_vae.vae import VAE

log = logging.getLogger("mflux_vae")

NUM_IMAGES = 8
"""Synthetic images for fitting, of 16 x 16 latents each."""

_BATCH_SIZE = 4
_RIDGE = 1e-8


class Previewer:
    """Approximate images of a VAE's latents.

    Args:
        vae: the VAE that the latents belong to.
        tiny: a tiny autoencoder (TAESD) for the same latents; used instead of a projection.
        detail: pixels per latent in each direction, a divisor of `vae.spatial_scale`. None: 1, or
            `vae.spatial_scale` with `tiny`.
        pictures: images (B, C, H, W) in [0, 255] for fitting; None: synthetic ones, which take as long as encoding
            and decoding one image of 360 x 360 (FLUX.2: 720 x 720).
        cache: file for the projection. It is fitted again if the file is missing, broken or of another VAE.

    Raises:
        SettingsError: `detail` does not divide the scale, or `tiny` has other latents.
        ImageError: `pictures` do not fit the VAE.
    """

    def __init__(
        self,
        vae: VAE,
        tiny: VAE | None = None,
        *,
        detail: int | None = None,
        pictures: mx.array | np.ndarray | None = None,
        cache: str | Path | None = None,
    ):
        self._channels, self._scale, self._tiny = vae.latent_channels, vae.spatial_scale, tiny
        self.detail = detail if detail is not None else self._scale if tiny else 1
        if self.detail < 1 or self._scale % self.detail:
            raise SettingsError(f"detail is {detail}: it must divide {self._scale}, the scale of the VAE")
        if tiny is not None:
            if (tiny.latent_channels, tiny.spatial_scale) != (self._channels, self._scale):
                raise SettingsError(
                    f"the tiny VAE has {tiny.latent_channels} latent channels at 1/{tiny.spatial_scale} of the size, "
                    f"the VAE has {self._channels} at 1/{self._scale}"
                )
            return
        if pictures is not None:
            as_array(pictures, "pictures are", "(B, C, H, W)", FILES)
        self._projection = (
            _cached(vae, self.detail, pictures, Path(cache)) if cache else _fit(vae, self.detail, pictures)
        )

    def __call__(self, latents: mx.array) -> np.ndarray:
        """Approximate the image of scaled latents.

        Args:
            latents: (B, C, h, w), as returned by `VAE.encode` or by a denoiser at any step.

        Returns:
            (B, h * detail, w * detail, 3), uint8.

        Raises:
            ImageError: wrong number of axes or channels.
        """
        latents = as_array(latents, "latents are", f"(B, {self._channels}, h, w)", LATENTS)
        if latents.ndim != 4 or latents.shape[1] != self._channels or not latents.size:
            raise ImageError(f"latents are {tuple(latents.shape)}, expected (B, {self._channels}, h, w)")
        if self._tiny is not None:
            image = _mean_pool(self._tiny.decode(latents), self._scale // self.detail)
        else:
            image = self._projected(latents.astype(mx.float32))
        image = mx.clip(mx.round(mx.nan_to_num(image)), 0, 255).astype(mx.uint8)
        batch, channels, height, width = image.shape
        return np.array(mx.broadcast_to(image.transpose(0, 2, 3, 1), (batch, height, width, max(channels, 3))))

    def _projected(self, latents: mx.array) -> mx.array:
        """(B, C, h, w) -> (B, 3 or 1, h * detail, w * detail) around [0, 255]."""
        batch, _, height, width = latents.shape
        weight, bias = self._projection[:, :-1], self._projection[:, -1:]
        y = weight @ latents.reshape(batch, self._channels, -1) + bias
        y = y.reshape(batch, -1, self.detail, self.detail, height, width).transpose(0, 1, 4, 2, 5, 3)
        return y.reshape(batch, -1, height * self.detail, width * self.detail)


def synthetic_images(count: int, side: int, *, channels: int = 3) -> np.ndarray:
    """Draw images with the rough statistics of photographs: colour gradients at every scale, flat patches with edges.

    Returns:
        uint8 (count, channels, side, side), the same at every call.
    """
    rng = np.random.default_rng(0)
    place = np.linspace(0, 1, side)
    pictures = np.empty((count, side, side, 3))
    for picture in pictures:
        picture[...] = rng.uniform(40, 215) + rng.normal(0, 30, 3)
        for cells in (1, 2, 4, 8, 16, 32):
            rows = np.stack(
                [np.interp(place, np.linspace(0, 1, cells + 1), unit) for unit in np.eye(cells + 1)], axis=1
            )
            # brightness varies more than colour
            noise = rng.normal(0, 1, (cells + 1, cells + 1, 1)) + rng.normal(0, 0.5, (cells + 1, cells + 1, 3))
            picture += 60 / cells**0.7 * np.einsum("yi,xj,ijc->yxc", rows, rows, noise, optimize=True)
        for _ in range(rng.integers(2, 7)):
            (top, left), (height, width) = rng.integers(0, side, 2), rng.integers(side // 16 + 1, side // 2 + 2, 2)
            patch = picture[top : top + height, left : left + width]
            patch[...] = 0.2 * patch + 0.8 * rng.uniform(0, 255, 3)
    pictures = np.clip(np.rint(pictures), 0, 255).astype(np.uint8).transpose(0, 3, 1, 2)
    return pictures if channels == 3 else pictures.mean(axis=1, keepdims=True).repeat(channels, axis=1).astype(np.uint8)


def _fit(vae: VAE, detail: int, pictures: mx.array | np.ndarray | None) -> mx.array:
    """Fit latents to averaged decoded pixels by least squares, with bias: (channels * detail^2, C + 1)."""
    if pictures is None:
        pictures = synthetic_images(NUM_IMAGES, 16 * vae.spatial_scale, channels=vae.config.in_channels)
    products, targets = np.zeros((1, 1)), np.zeros((1, 1))
    for start in range(0, len(pictures), _BATCH_SIZE):
        latents = vae.encode(mx.array(pictures[start : start + _BATCH_SIZE]))
        image = _mean_pool(vae.decode(latents), vae.spatial_scale // detail)
        x, y = (np.array(values, np.float64) for values in (latents, image))
        batch, channels, height, width = x.shape
        x = np.concatenate([x, np.ones((batch, 1, height, width))], axis=1).transpose(0, 2, 3, 1)
        y = y.reshape(batch, -1, height, detail, width, detail).transpose(0, 2, 4, 1, 3, 5)
        x, y = x.reshape(-1, channels + 1), y.reshape(batch * height * width, -1)
        products, targets = products + x.T @ x, targets + x.T @ y
    # Regularise, so that constant channels get no weight.
    products = products + _RIDGE * np.trace(products) / len(products) * np.eye(len(products))
    # MLX keeps the strides of NumPy's arrays; a projection from the cache is contiguous.
    return mx.contiguous(mx.array(np.linalg.solve(products, targets).T.astype(np.float32)))


def _cached(vae: VAE, detail: int, pictures: mx.array | np.ndarray | None, path: Path) -> mx.array:
    """`_fit`, cached in a file for the same VAE, detail and images."""
    metadata = {"preview": _fingerprint(vae, detail, pictures)}
    if path.exists():
        try:
            tensors, found = read_safetensors(path)
            if found.get("preview") == metadata["preview"]:
                check_numbers(tensors, str(path), "projections")
                return tensors["projection"]
        except (WeightsError, KeyError) as error:
            log.info("%s: fitting the projection again (%s)", path, error)
    projection = _fit(vae, detail, pictures)
    write_safetensors(path, {"projection": projection}, metadata)
    return projection


def _fingerprint(vae: VAE, detail: int, pictures: mx.array | np.ndarray | None) -> str:
    """Hash of configuration, weights, detail and images."""
    digest = hashlib.sha256(json.dumps([vae.config.to_dict(), detail], sort_keys=True, default=str).encode())
    for name, weight in sorted(dict(tree_flatten(vae.network.parameters())).items()):
        digest.update(name.encode() + np.array(weight.reshape(-1)[:64].astype(mx.float32)).tobytes())
    if pictures is not None:
        digest.update(np.array(pictures).tobytes())
    return digest.hexdigest()


def _mean_pool(image: mx.array, factor: int) -> mx.array:
    """Average squares of `factor` pixels: (B, C, H, W) -> (B, C, H / factor, W / factor)."""
    batch, channels, height, width = image.shape
    return image.reshape(batch, channels, height // factor, factor, width // factor, factor).mean(axis=(3, 5))
