"""Read from an image's pixels which scene of the world it shows.

1. The background is the texture whose palette matches the border best; no shape reaches the border.
2. The foreground is nearer to the image's most frequent colour than to the background's palette and the outline. Near
   its centre, where a core may be, any colour belongs to it.
3. The shape is the template with the highest intersection over union with the foreground, over positions and radii
   (correlations by FFT). Below `MIN_OVERLAP` there is no shape, so that distorted shapes are not counted as right.
4. The colours of body and core are the medians over the pixels of the template's body and core.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from mflux_vae.errors import ImageError
from mflux_vae_train.tiny_world.shapes import CORE_RADIUS, DISTANCES, coordinates
from mflux_vae_train.tiny_world.textures import BACKGROUNDS, tile
from mflux_vae_train.tiny_world.world import COLOURS, OUTLINE, OUTLINE_WIDTH, SHAPES, Scene

SIDE = 64
"""Side at which images are read; larger ones are reduced first."""
BORDER = 3
"""Width in pixels of the border that is assumed to be background."""
MIN_OVERLAP = 0.8
"""Least intersection over union of foreground and template."""
MAX_COLOUR_DISTANCE = 70.0
"""Largest RGB distance between a median and a colour of the world."""
MAX_MISFIT = 45.0
"""Largest RGB distance of the border from a background's palette, and of their means."""
MIN_UNIFORM = 0.6
"""Least fraction of a region's pixels that have the region's colour."""
REACH = 8
"""Largest distance in pixels of a shape's centre from the middle of the image."""
_RADII = np.linspace(0.255, 0.385, 9)
_COLOUR_NAMES = tuple(COLOURS)
_COLOUR_VALUES = np.asarray(list(COLOURS.values()), np.float32)
_LIT_VALUES = np.stack([_COLOUR_VALUES * light for light in (0.93, 1.0, 1.07)]).clip(0, 255)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Content of an image; None for what is not of the world. `overlap` is the match of the shape."""

    shape: str | None
    colour: str | None
    core: str | None
    background: str | None
    overlap: float = 0.0

    @property
    def looks(self) -> tuple[str | None, str | None, str | None]:
        """Shape, colour and core, which are those of a subject on any background."""
        return self.shape, self.colour, self.core


def read(image: np.ndarray) -> Reading:
    """Read an image.

    Args:
        image: uint8 (H, W, 3), RGB, H == W >= 64.

    Raises:
        ImageError: another shape or type.
    """
    pixels = _shrunk(image)
    background = _background(pixels)
    shape, overlap, (x, y, radius) = _shape(_foreground(pixels, background))
    if overlap < MIN_OVERLAP:
        return Reading(shape=None, colour=None, core=None, background=background, overlap=overlap)
    u, v = coordinates(SIDE, x, y, radius)
    pixel = 1 / (SIDE * radius)
    body = DISTANCES[shape](u, v) < -(OUTLINE_WIDTH / radius + pixel)
    if shape == "moon":
        return Reading(shape=shape, colour=_colour(pixels[body]), core=None, background=background, overlap=overlap)
    from_centre = np.hypot(u, v)
    colour = _colour(pixels[body & (from_centre > CORE_RADIUS + 1.5 * pixel)])
    core = _colour(pixels[from_centre < CORE_RADIUS - 1.5 * pixel])
    return Reading(
        shape=shape,
        colour=colour,
        core=None if core == colour else core,
        background=background,
        overlap=overlap,
    )


def shows(reading: Reading, scene: Scene) -> bool:
    """Whether shape and background are the scene's, and if the scene has a colour, colour and core, too.

    For a scene without a shape, no shape must be read.
    """
    if (reading.shape, reading.background) != (scene.shape, scene.background):
        return False
    return scene.colour is None or (reading.colour, reading.core) == (scene.colour, scene.core)


def _shrunk(image: np.ndarray) -> np.ndarray:
    if (
        image.ndim != 3
        or image.shape[2] != 3
        or image.dtype != np.uint8
        or not (image.shape[0] == image.shape[1] >= SIDE)
    ):
        raise ImageError(f"the checker reads uint8 (H, H, 3) with H >= {SIDE}, not {image.dtype} {image.shape}")
    if image.shape[0] > SIDE:
        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX))
    return image.astype(np.float32)


@cache
def _palettes() -> np.ndarray:
    """Six colours of each background, (backgrounds, 6, 3) float32."""
    palettes = []
    for background in BACKGROUNDS:
        reduced = Image.fromarray(tile(background, SIDE).astype(np.uint8)).quantize(6)
        palettes.append(np.asarray(reduced.getpalette(), np.float32)[:18].reshape(6, 3))
    return np.stack(palettes)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Bodies of all shapes at all radii in the middle of the image.

    Returns:
        their conjugated spectra (shapes, radii, SIDE, SIDE // 2 + 1) and areas in pixels (shapes, radii).
    """
    masks = np.empty((len(SHAPES), len(_RADII), SIDE, SIDE), np.float32)
    for i, shape in enumerate(SHAPES):
        for j, radius in enumerate(_RADII):
            body = DISTANCES[shape](*coordinates(SIDE, 0.5, 0.5, radius)) < -OUTLINE_WIDTH / radius
            masks[i, j] = _without_specks(body)
    return np.fft.rfft2(masks).conj(), masks.sum((-1, -2))


def _distances(pixels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Squared RGB distances, (P, 3) and (..., 3) -> (..., P)."""
    squares = np.einsum("pc,pc->p", pixels, pixels) + (colours**2).sum(-1, keepdims=True)
    return squares - 2 * colours @ pixels.T


def _background(pixels: np.ndarray) -> str | None:
    palettes = _palettes()
    middle = slice(BORDER, SIDE - BORDER)
    sides = (pixels[:BORDER], pixels[-BORDER:], pixels[middle, :BORDER], pixels[middle, -BORDER:])
    border = np.concatenate([side.reshape(-1, 3) for side in sides])
    distances = _distances(border, palettes).min(axis=1)
    misfit = np.sqrt(np.clip(distances, 0, 100**2)).mean(-1)
    best = int(misfit.argmin())
    off_mean = np.linalg.norm(border.mean(0) - tile(BACKGROUNDS[best], SIDE).mean((0, 1)))
    return BACKGROUNDS[best] if misfit[best] < MAX_MISFIT and off_mean < MAX_MISFIT else None


def _foreground(pixels: np.ndarray, background: str | None) -> np.ndarray:
    """Pixels of the body's colour, and near the body's centre of any colour: bool (SIDE, SIDE).

    A pixel has a colour if it is nearer to that than to the outline, the background and their blends. The most frequent
    colour is the body's. Others count only near its centre, as a snowflake is not part of a red star.
    """
    palettes = _palettes()
    behind = palettes.reshape(-1, 3) if background is None else palettes[BACKGROUNDS.index(background)]
    outline, mean = np.asarray(OUTLINE, np.float32), behind.mean(0)
    behind = np.stack([*behind, outline, (2 * outline + mean) / 3, (outline + 2 * mean) / 3])
    flat = pixels.reshape(-1, 3)
    distances = _distances(flat, _LIT_VALUES).min(axis=0)  # (colours, pixels)
    nearest = distances.argmin(axis=0).reshape(SIDE, SIDE)
    coloured = (distances.min(axis=0) < _distances(flat, behind).min(axis=0)).reshape(SIDE, SIDE)
    body = coloured & (nearest == np.bincount(nearest[coloured], minlength=1).argmax())
    if not body.any():
        return body
    rows, columns = np.nonzero(body)
    down, right = np.ogrid[:SIDE, :SIDE]
    from_centre = np.hypot(down - rows.mean(), right - columns.mean())
    near = from_centre < CORE_RADIUS * _RADII[-1] * SIDE + 2
    return _without_specks(body | (coloured & near))


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """The mask after a majority vote in each 3 x 3 neighbourhood."""
    padded = np.pad(mask.astype(np.int8), 1)
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] >= 5


def _shape(foreground: np.ndarray) -> tuple[str, float, tuple[float, float, float]]:
    """The best template: shape, overlap with the foreground, and (x, y, radius) in units of the side."""
    spectra, areas = _templates()
    product = np.fft.rfft2(foreground.astype(np.float32)) * spectra
    reach = np.arange(-REACH, REACH + 1)
    rows = np.fft.ifft(product, axis=-2)[..., reach, :]  # only shifts within REACH are transformed back
    common = np.fft.irfft(rows, SIDE)[..., reach]
    overlap = common / (areas[..., None, None] + foreground.sum() - common)
    shape, radius, down, right = np.unravel_index(int(overlap.argmax()), overlap.shape)
    where = (0.5 + reach[right] / SIDE, 0.5 + reach[down] / SIDE, float(_RADII[radius]))
    return SHAPES[shape], float(overlap[shape, radius, down, right]), where


def _colour(region: np.ndarray) -> str | None:
    """The colour of most of a region's pixels (N, 3); None if there is no such colour."""
    median = np.median(region, axis=0)
    from_median = np.linalg.norm(_COLOUR_VALUES - median, axis=-1)
    best = int(from_median.argmin())
    uniform = (_distances(region, _COLOUR_VALUES).argmin(axis=0) == best).mean()
    if from_median[best] > MAX_COLOUR_DISTANCE or uniform < MIN_UNIFORM:
        return None
    return _COLOUR_NAMES[best]
