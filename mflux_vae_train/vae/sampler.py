"""Images from the latent space of a trained autoencoder: samples, grids, traversals, interpolations."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae.errors import ImageError, SettingsError
from mflux_vae.image_files.notes import ImageNotes
from mflux_vae.images import grid, labelled_rows, load_image, save_image, strip, to_pictures, to_pixels
from mflux_vae.pretrained import loading
from mflux_vae.utils.arrays import check_decoded
from mflux_vae_train.randomness import Stream, sample_keys
from mflux_vae_train.vae.build import has_vector_latents, latent_shape

MODEL_KEY = "mflux-vae model"
"""PNG text chunk with the file of the model whose images are shown."""

_BATCH = 64
_MIN_DISPLAY_SIZE = 64
"""Smallest side of a displayed image (pixels); smaller ones are enlarged."""


class VAESampler:
    """Decode points of a latent space. Images are float32 (N, H, W, C) in [0, 1].

    Args:
        model: a network, or a file that `loading.open_network` reads, such as best_model.safetensors of a run.
        image_size: size (pixels) of images from spatial latents; None uses the size in the network's configuration.
        seed: random latent number i is a function of (seed, i).

    Attributes:
        model: the network in evaluation mode.
        latent_shape: shape of one latent.

    Raises:
        WeightsError, SettingsError: see `loading.open_network`; or the network does not support the image size.
    """

    def __init__(self, model: str | Path | Any, *, image_size: int | None = None, seed: int = 0) -> None:
        self.model = loading.open_network(model, mx.float32) if isinstance(model, str | Path) else model.eval()
        self._text = {MODEL_KEY: model_text(model)} if isinstance(model, str | Path) else {}
        config, self.seed = self.model.config, seed
        native = config.image_size if has_vector_latents(self.model) else getattr(config, "sample_size", 64)
        size = native if image_size is None else image_size
        if (has_vector_latents(self.model) and size != native) or size % config.downsampling or size < 1:
            allowed = native if has_vector_latents(self.model) else f"a multiple of {config.downsampling}"
            raise SettingsError(f"--image_size is {size}; {allowed} is allowed for this autoencoder")
        self.image_size = size
        self.latent_shape = latent_shape(self.model, size)

    @property
    def latent_dim(self) -> int:
        """Length of a latent vector, or channels of a spatial latent."""
        return self.latent_shape[-1]

    def check(
        self, *, latent_dims: int | None = None, max_filters: int | None = None, nimg_channels: int | None = None
    ) -> None:
        """Compare the network with expected values; None matches anything.

        Raises:
            SettingsError: latents, widths or channels differ.
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
        actual = {"latent_dims": self.latent_dim, "max_filters": max(widths), "nimg_channels": config.out_channels}
        expected = {"latent_dims": latent_dims, "max_filters": max_filters, "nimg_channels": nimg_channels}
        if wrong := [
            f"--{name} is {value}; the model has {actual[name]}"
            for name, value in expected.items()
            if value not in (None, actual[name])
        ]:
            raise SettingsError("; ".join(wrong))

    def encode(self, files: Sequence[str | Path]) -> mx.array:
        """Posterior means of the centre squares of image files. (N, *latent_shape)."""
        notes = ImageNotes()
        pixels = to_pixels(np.stack([load_image(file, resolution=self.image_size, notes=notes) for file in files]))
        notes.log(logging.getLogger(__name__))
        if self.model.config.in_channels == 1:
            pixels = pixels @ np.array([[0.299], [0.587], [0.114]], np.float32)
        mean: mx.array = self.model.encode(mx.array(pixels)).mean
        return mean

    def draw(self, count: int, first: int = 0) -> mx.array:
        """Latents number first, first + 1, ... from the standard normal prior. (count, *latent_shape)."""
        keys = sample_keys(self.seed, Stream.EVALUATION, 1, range(first, first + count))
        return mx.vmap(lambda key: mx.random.normal(self.latent_shape, key=key))(keys)

    def decode(self, latents: mx.array) -> np.ndarray:
        """(N, *latent_shape) -> (N, H, W, C) in [0, 1].

        Raises:
            ImageError: latents of another shape.
            RunError: an image has NaN or infinite values.
        """
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise ImageError(
                f"latents have shape {tuple(latents.shape)}; expected (N, {', '.join(map(str, self.latent_shape))})"
            )
        parts = [self.model.decode(latents[start : start + _BATCH]) for start in range(0, len(latents), _BATCH)]
        for part in parts:
            check_decoded(part)
        pixels = np.concatenate([np.array(part.astype(mx.float32)) for part in parts])
        return np.clip(pixels * 0.5 + 0.5, 0, 1)

    def sample_random(self, num_samples: int = 16) -> np.ndarray:
        """Images of random latents from the prior."""
        return self.decode(self.draw(num_samples))

    def generate_latent_grid(
        self,
        num_samples: int = 10,
        latent_range: tuple[float, float] = (-3.0, 3.0),
        *,
        dims: tuple[int, int] | None = None,
        base: mx.array | None = None,
    ) -> np.ndarray:
        """Images of a plane: dimension dims[0] varies over the rows, dims[1] over the columns.

        Args:
            dims: None uses the two `strongest_dims`.
            base: values of the other dimensions, (1, D); None for 0.

        Returns:
            num_samples^2 images in row-major order.
        """
        values = np.linspace(*latent_range, num_samples, dtype=np.float32)
        points = np.repeat(self._base_latent(base), num_samples**2, axis=0)
        for dim, column in zip(
            dims or self.strongest_dims(2), (np.repeat(values, num_samples), np.tile(values, num_samples)), strict=True
        ):
            points[:, self._check_dim(dim)] = column
        return self.decode(mx.array(points))

    def traverse_latent(
        self,
        dim: int,
        num_samples: int = 10,
        latent_range: tuple[float, float] = (-3.0, 3.0),
        *,
        base: mx.array | None = None,
    ) -> np.ndarray:
        """Vary one dimension over the range; the others stay at `base` (1, D), or 0."""
        points = np.repeat(self._base_latent(base), num_samples, axis=0)
        points[:, self._check_dim(dim)] = np.linspace(*latent_range, num_samples, dtype=np.float32)
        return self.decode(mx.array(points))

    def strongest_dims(self, count: int) -> list[int]:
        """The `count` dimensions with the largest effect on the image, strongest first.

        The effect is the mean squared change of the image when a dimension goes from 0 to 2 and the others are 0.
        """
        points = np.concatenate([self._base_latent(None), 2 * np.eye(self.latent_dim, dtype=np.float32)])
        center, *moved = self.decode(mx.array(points))
        changes = [np.square(image - center).mean() for image in moved]
        return [int(dim) for dim in np.argsort(changes)[::-1][:count]]

    def interpolate_latent(
        self, z1: mx.array, z2: mx.array, num_steps: int = 10, *, spherical: bool = False
    ) -> np.ndarray:
        """Images from z1 to z2, (1, *latent_shape) each, ends included; see `interpolate`."""
        return self.decode(interpolate(z1, z2, num_steps, spherical=spherical))

    def save_samples(self, samples: np.ndarray, path: str | Path, columns: int | None = None) -> None:
        """Write images (N, H, W, C) in [0, 1] as a grid with `columns` columns (default: square) to one PNG file."""
        sheet = grid(list(to_pictures(samples * 2 - 1)), columns or int(np.ceil(len(samples) ** 0.5)))
        save_image(path, sheet, text=self._text)

    def save_latent_grid(self, samples: np.ndarray, path: str | Path) -> None:
        """Write images of `generate_latent_grid`."""
        self.save_samples(samples, path)

    def save_interpolation(self, samples: np.ndarray, path: str | Path) -> None:
        """Write images of `interpolate_latent` or `traverse_latent` side by side."""
        self.save_samples(samples, path, columns=len(samples))

    def save_traversals(self, samples: Mapping[int, np.ndarray], path: str | Path) -> None:
        """Write images of `traverse_latent` for several dimensions: labelled rows, small images enlarged."""
        rows = []
        for dim, images in samples.items():
            factor = max(1, _MIN_DISPLAY_SIZE // images.shape[2])
            pictures = to_pictures(images * 2 - 1).repeat(factor, axis=1).repeat(factor, axis=2)
            row = strip(list(pictures), gap=2)
            rows.append((f"dim {dim}", np.broadcast_to(row, (*row.shape[:2], 3))))
        save_image(path, labelled_rows(rows), text=self._text)

    def _base_latent(self, base: mx.array | None) -> np.ndarray:
        if not has_vector_latents(self.model):
            raise SettingsError(
                "this autoencoder has spatial latents; single dimensions can be varied only in vector latents"
            )
        return np.zeros((1, self.latent_dim), np.float32) if base is None else np.array(base, np.float32).reshape(1, -1)

    def _check_dim(self, dim: int) -> int:
        if not 0 <= dim < self.latent_dim:
            raise SettingsError(f"latent dimension {dim} does not exist; 0 to {self.latent_dim - 1} are allowed")
        return dim


def model_text(model: str | Path) -> str:
    """The model as it is recorded in images: the whole path of a file or folder, or the name of a preset."""
    path = Path(model).expanduser()
    return str(path.resolve() if path.exists() else model)


def interpolate(z1: mx.array, z2: mx.array, num_steps: int, *, spherical: bool = False) -> mx.array:
    """Points between two latents, ends included. (1, ...) twice -> (num_steps, ...).

    Args:
        spherical: along the great circle, which preserves the norm (White 2016, arXiv:1609.04468), instead of the
            straight line. Parallel latents are always interpolated linearly.

    Raises:
        SettingsError: wrong shapes, or fewer than 2 steps.
    """
    if z1.shape != z2.shape or z1.shape[0] != 1 or num_steps < 2:
        raise SettingsError(
            f"interpolation of {tuple(z1.shape)} and {tuple(z2.shape)} in {num_steps} steps: give two latents (1, ...)"
            " of equal shape and at least 2 steps"
        )
    t = mx.linspace(0, 1, num_steps).reshape(-1, *[1] * (z1.ndim - 1))
    if not spherical:
        return (1 - t) * z1 + t * z2
    lengths = mx.sqrt(mx.square(z1).sum()), mx.sqrt(mx.square(z2).sum())
    angle = mx.arccos(mx.clip((z1 * z2).sum() / mx.maximum(lengths[0] * lengths[1], 1e-12), -1, 1))
    if not 1e-4 < float(angle) < np.pi - 1e-4:
        return interpolate(z1, z2, num_steps)
    return (mx.sin((1 - t) * angle) * z1 + mx.sin(t * angle) * z2) / mx.sin(angle)
