"""Latents to a small picture in milliseconds: a linear projection computed for the VAE at hand, or TAESD's weights.

The projection is the least-squares answer to "which colours does the decoder give this latent?", one affine map for
all places: latents (C) -> detail x detail pixels. It sees no neighbours, so colours and shapes are right and
textures are not.
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
from mflux_vae.weights.formats.files import read_safetensors, write_safetensors

if TYPE_CHECKING:
    from mflux_vae.vae import VAE

log = logging.getLogger("mflux_vae")

PICTURES = 8
"""Made for a projection when none are given, of 16 x 16 latents each."""

_AT_ONCE = 4
_RIDGE = 1e-8


class Previewer:
    """Small pictures of a VAE's latents.

    Args:
        vae: whose latents they are.
        tiny: a VAE of TAESD's kind for the same latents, which then decodes them.
        detail: pixels per latent in each direction, a divisor of `vae.spatial_scale`; None for 1, or for all with
            `tiny`.
        pictures: (B, C, H, W) in [0, 255], to compute the projection from; None for synthetic ones. The VAE encodes
            and decodes them once: as many pixels as a picture of 360 x 360 has (720 x 720 for FLUX.2).
        cache: file to keep the projection in; computed anew where it is another VAE's, missing or broken.

    Raises:
        SettingsError: `detail` does not divide the scale, or `tiny` is for other latents.
        ImageError: `pictures` are not for this VAE.
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
            raise SettingsError(f"a preview's detail must divide {self._scale}, the VAE's scale, not be {detail}")
        if tiny is not None:
            if (tiny.latent_channels, tiny.spatial_scale) != (self._channels, self._scale):
                raise SettingsError(
                    f"the tiny VAE is for {tiny.latent_channels} channels at 1/{tiny.spatial_scale} of the size, "
                    f"and the latents have {self._channels} at 1/{self._scale}"
                )
            return
        self._projection = (
            _cached(vae, self.detail, pictures, Path(cache)) if cache else _fit(vae, self.detail, pictures)
        )

    def __call__(self, latents: mx.array) -> np.ndarray:
        """What scaled latents look like.

        Args:
            latents: (B, C, h, w), as `VAE.encode` returns them, or a denoiser on its way.

        Returns:
            (B, h * detail, w * detail, 3), uint8.

        Raises:
            ImageError: wrong number of axes or channels.
        """
        if latents.ndim != 4 or latents.shape[1] != self._channels or not latents.size:
            raise ImageError(f"latents are {tuple(latents.shape)}, expected (B, {self._channels}, h, w)")
        if self._tiny is not None:
            image = _averaged(self._tiny.decode(latents), self._scale // self.detail)
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


def synthetic_pictures(count: int, side: int, *, channels: int = 3) -> np.ndarray:
    """Pictures with the broad statistics of photographs: soft colours at every scale, flat patches with edges.

    Returns:
        (count, channels, side, side) uint8; the same at every call.
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
    """Least squares from latents to the averages of what they decode to, with bias. (channels * detail^2, C + 1)."""
    if pictures is None:
        pictures = synthetic_pictures(PICTURES, 16 * vae.spatial_scale, channels=vae.config.in_channels)
    products, targets = np.zeros((1, 1)), np.zeros((1, 1))
    for start in range(0, len(pictures), _AT_ONCE):
        latents = vae.encode(mx.array(pictures[start : start + _AT_ONCE]))
        image = _averaged(vae.decode(latents), vae.spatial_scale // detail)
        x, y = (np.array(values, np.float64) for values in (latents, image))
        batch, channels, height, width = x.shape
        x = np.concatenate([x, np.ones((batch, 1, height, width))], axis=1).transpose(0, 2, 3, 1)
        y = y.reshape(batch, -1, height, detail, width, detail).transpose(0, 2, 4, 1, 3, 5)
        x, y = x.reshape(-1, channels + 1), y.reshape(batch * height * width, -1)
        products, targets = products + x.T @ x, targets + x.T @ y
    # a channel that never varied has no say
    products = products + _RIDGE * np.trace(products) / len(products) * np.eye(len(products))
    # copied: MLX keeps the strides of NumPy's arrays, and a projection from the cache is contiguous
    return mx.contiguous(mx.array(np.linalg.solve(products, targets).T.astype(np.float32)))


def _cached(vae: VAE, detail: int, pictures: mx.array | np.ndarray | None, path: Path) -> mx.array:
    """`_fit`, from a file where it has it for the same VAE, detail and pictures."""
    wanted = {"preview": _fingerprint(vae, detail, pictures)}
    if path.exists():
        try:
            tensors, metadata = read_safetensors(path)
            if metadata.get("preview") == wanted["preview"]:
                return tensors["projection"]
        except (WeightsError, KeyError) as error:
            log.info("%s is computed anew (%s)", path, error)
    projection = _fit(vae, detail, pictures)
    write_safetensors(path, {"projection": projection}, wanted)
    return projection


def _fingerprint(vae: VAE, detail: int, pictures: mx.array | np.ndarray | None) -> str:
    """Changes with configuration, training, detail and pictures."""
    told = hashlib.sha256(json.dumps([vae.config.to_dict(), detail], sort_keys=True, default=str).encode())
    for name, weight in sorted(dict(tree_flatten(vae.network.parameters())).items()):
        told.update(name.encode() + np.array(weight.reshape(-1)[:64].astype(mx.float32)).tobytes())
    if pictures is not None:
        told.update(np.array(pictures).tobytes())
    return told.hexdigest()


def _averaged(image: mx.array, factor: int) -> mx.array:
    """Means over squares of `factor` pixels. (B, C, H, W) -> (B, C, H / factor, W / factor)."""
    batch, channels, height, width = image.shape
    return image.reshape(batch, channels, height // factor, factor, width // factor, factor).mean(axis=(3, 5))
