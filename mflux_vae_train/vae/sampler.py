"""Images from the latent space of a trained autoencoder: samples, planes, single units, the way between two points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae.errors import ImageError, SettingsError
from mflux_vae.images import grid, labelled_rows, load_image, save_image, strip, to_pictures, to_pixels
from mflux_vae.pretrained import loading
from mflux_vae_train.randomness import Stream, sample_keys
from mflux_vae_train.vae.build import is_flat, latent_shape

_AT_ONCE = 64
_SEEN_WELL = 64
"""Pixels a side."""


class VAESampler:
    """Decodes points of a latent space. Images are float32 (N, H, W, C) in [0, 1].

    Args:
        model: what `loading.open_network` opens, such as a run's best_model.safetensors; or a network.
        image_size: of images from spatial latents; None for the size that the network was made for. Vectors have one.
        seed: random draws are functions of it and of their number.

    Attributes:
        model: the network, in evaluation.
        latent_shape: of one latent.

    Raises:
        WeightsError, SettingsError: see `loading.open_network`; an image size that the network does not have.
    """

    def __init__(self, model: str | Path | Any, *, image_size: int | None = None, seed: int = 0) -> None:
        self.model = loading.open_network(model, mx.float32) if isinstance(model, str | Path) else model.eval()
        config, self.seed = self.model.config, seed
        own = config.image_size if is_flat(self.model) else getattr(config, "sample_size", 64)
        size = own if image_size is None else image_size
        if (is_flat(self.model) and size != own) or size % config.downsampling or size < 1:
            allowed = own if is_flat(self.model) else f"a multiple of {config.downsampling}"
            raise SettingsError(f"images of {size} pixels: this autoencoder's have {allowed}")
        self.image_size = size
        self.latent_shape = latent_shape(self.model, size)

    @property
    def latent_dim(self) -> int:
        """Length of a latent vector, or a spatial latent's channels."""
        return self.latent_shape[-1]

    def check(
        self, *, latent_dims: int | None = None, max_filters: int | None = None, nimg_channels: int | None = None
    ) -> None:
        """Refuses another network than the one that is expected; None expects nothing.

        Raises:
            SettingsError: it has other latents, widths or channels.
        """
        config: Any = self.model.config
        widths = next(
            (
                value
                for name in ("hidden_dims", "block_out_channels", "channels")
                if (value := getattr(config, name, None))
            ),
            (0,),
        )
        own = {"latent_dims": self.latent_dim, "max_filters": max(widths), "nimg_channels": config.out_channels}
        given = {"latent_dims": latent_dims, "max_filters": max_filters, "nimg_channels": nimg_channels}
        if wrong := [
            f"--{name} is {value}, the model's {own[name]}"
            for name, value in given.items()
            if value not in (None, own[name])
        ]:
            raise SettingsError("; ".join(wrong))

    def encode(self, files: Sequence[str | Path]) -> mx.array:
        """Posterior means of picture files, their centre squares. (N, *latent_shape)."""
        pictures = [load_image(file, resolution=self.image_size) for file in files]
        pixels = to_pixels(np.stack(pictures))
        if self.model.config.in_channels == 1:
            pixels = pixels @ np.array([[0.299], [0.587], [0.114]], np.float32)
        mean: mx.array = self.model.encode(mx.array(pixels)).mean
        return mean

    def draw(self, count: int, first: int = 0) -> mx.array:
        """Latents from the prior, the standard normal; number i is a function of (seed, i). (count, *latent_shape)."""
        keys = sample_keys(self.seed, Stream.EVALUATION, 1, range(first, first + count))
        return mx.vmap(lambda key: mx.random.normal(self.latent_shape, key=key))(keys)

    def decode(self, latents: mx.array) -> np.ndarray:
        """(N, *latent_shape) -> (N, H, W, C) in [0, 1]."""
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise ImageError(
                f"latents are {tuple(latents.shape)}, expected (N, {', '.join(map(str, self.latent_shape))})"
            )
        parts = [self.model.decode(latents[start : start + _AT_ONCE]) for start in range(0, len(latents), _AT_ONCE)]
        pixels = np.concatenate([np.array(part.astype(mx.float32)) for part in parts])
        return np.clip(pixels * 0.5 + 0.5, 0, 1)

    def sample_random(self, num_samples: int = 16) -> np.ndarray:
        """Images of latents from the prior."""
        return self.decode(self.draw(num_samples))

    def generate_latent_grid(
        self,
        num_samples: int = 10,
        latent_range: tuple[float, float] = (-3.0, 3.0),
        *,
        dims: tuple[int, int] | None = None,
        base: mx.array | None = None,
    ) -> np.ndarray:
        """A plane: unit dims[0] grows from row to row and dims[1] from left to right, others stay.

        Args:
            dims: None for the two `strongest`.
            base: (1, D), where the others are; None for 0.

        Returns:
            num_samples^2 images, row by row.
        """
        values = np.linspace(*latent_range, num_samples, dtype=np.float32)
        points = np.repeat(self._base(base), num_samples**2, axis=0)
        for dim, column in zip(
            dims or self.strongest(2), (np.repeat(values, num_samples), np.tile(values, num_samples)), strict=True
        ):
            points[:, self._unit(dim)] = column
        return self.decode(mx.array(points))

    def traverse_latent(
        self,
        dim: int,
        num_samples: int = 10,
        latent_range: tuple[float, float] = (-3.0, 3.0),
        *,
        base: mx.array | None = None,
    ) -> np.ndarray:
        """What one unit controls: it goes through the range while the others stay at `base` (1, D), or 0."""
        points = np.repeat(self._base(base), num_samples, axis=0)
        points[:, self._unit(dim)] = np.linspace(*latent_range, num_samples, dtype=np.float32)
        return self.decode(mx.array(points))

    def strongest(self, count: int) -> list[int]:
        """The units that images depend on most: a posterior leaves many of them at the prior, and they do nothing.

        Each is moved from 0 to 2 while the others stay at 0; what counts is how much the image changes.
        """
        points = np.concatenate([self._base(None), 2 * np.eye(self.latent_dim, dtype=np.float32)])
        middle, *moved = self.decode(mx.array(points))
        changes = [np.square(image - middle).mean() for image in moved]
        return [int(unit) for unit in np.argsort(changes)[::-1][:count]]

    def interpolate_latent(
        self, z1: mx.array, z2: mx.array, num_steps: int = 10, *, spherical: bool = False
    ) -> np.ndarray:
        """The way from z1 to z2, (1, *latent_shape) each, ends included; see `interpolated`."""
        return self.decode(interpolated(z1, z2, num_steps, spherical=spherical))

    def save_samples(self, samples: np.ndarray, path: str | Path, columns: int | None = None) -> None:
        """Writes images (N, H, W, C) in [0, 1] as one PNG, in a square or in rows of `columns`."""
        save_image(path, grid(list(to_pictures(samples * 2 - 1)), columns or int(np.ceil(len(samples) ** 0.5))))

    def save_latent_grid(self, samples: np.ndarray, path: str | Path) -> None:
        """Writes what `generate_latent_grid` gave."""
        self.save_samples(samples, path)

    def save_interpolation(self, samples: np.ndarray, path: str | Path) -> None:
        """Writes what `interpolate_latent` or `traverse_latent` gave, side by side."""
        self.save_samples(samples, path, columns=len(samples))

    def save_traversals(self, samples: Mapping[int, np.ndarray], path: str | Path) -> None:
        """Writes what `traverse_latent` gave for several units: numbered rows, small images enlarged."""
        rows = []
        for unit, images in samples.items():
            times = max(1, _SEEN_WELL // images.shape[2])
            pictures = to_pictures(images * 2 - 1).repeat(times, axis=1).repeat(times, axis=2)
            row = strip(list(pictures), gap=2)
            rows.append((f"unit {unit}", np.broadcast_to(row, (*row.shape[:2], 3))))
        save_image(path, labelled_rows(rows))

    def _base(self, base: mx.array | None) -> np.ndarray:
        if not is_flat(self.model):
            raise SettingsError("single units can be changed where latents are vectors; this autoencoder's are spatial")
        return np.zeros((1, self.latent_dim), np.float32) if base is None else np.array(base, np.float32).reshape(1, -1)

    def _unit(self, dim: int) -> int:
        if not 0 <= dim < self.latent_dim:
            raise SettingsError(f"there is no latent unit {dim}; there are 0 to {self.latent_dim - 1}")
        return dim


def interpolated(z1: mx.array, z2: mx.array, num_steps: int, *, spherical: bool = False) -> mx.array:
    """Points between two latents, ends included. (1, ...) twice -> (num_steps, ...).

    Args:
        spherical: on the great circle, which keeps the length that normal latents have (White 2016, arXiv:1609.04468),
            in place of the straight line. Of parallel latents there is only the line.
    """
    if z1.shape != z2.shape or z1.shape[0] != 1 or num_steps < 2:
        raise SettingsError(
            f"from {tuple(z1.shape)} to {tuple(z2.shape)} in {num_steps} steps: give (1, ...) twice, 2 steps"
        )
    t = mx.linspace(0, 1, num_steps).reshape(-1, *[1] * (z1.ndim - 1))
    if not spherical:
        return (1 - t) * z1 + t * z2
    lengths = mx.sqrt(mx.square(z1).sum()), mx.sqrt(mx.square(z2).sum())
    angle = mx.arccos(mx.clip((z1 * z2).sum() / mx.maximum(lengths[0] * lengths[1], 1e-12), -1, 1))
    if not 1e-4 < float(angle) < np.pi - 1e-4:
        return interpolated(z1, z2, num_steps)
    return (mx.sin((1 - t) * angle) * z1 + mx.sin(t * angle) * z2) / mx.sin(angle)
