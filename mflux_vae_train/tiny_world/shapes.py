"""The shapes of the world, as signed distance functions.

Each function takes coordinates (u, v) in units of the shape's radius, with the origin at its centre and v upwards, and
returns the signed distance to the outline, negative inside. Distances are exact only near the outline; some corners are
mitred. Star and heart follow Inigo Quilez, "2D distance functions" (https://iquilezles.org/articles/distfunctions2d/).

At equal radius all shapes look about equally large, and all but the moon are solid within `CORE_RADIUS` of the centre.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]

CORE_RADIUS = 0.32
"""Radius of an individual's core, in units of the shape's radius."""


def circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.hypot(u, v) - 0.92


def square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - 0.82


def triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    v = v + 0.2  # the centroid lies low in the bounding box
    return np.maximum(-v, 0.8660254 * np.abs(u) + 0.5 * v) - 0.6


def star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    tip, waist = 1.12, 0.5
    cos, sin = 0.80901699, 0.58778525
    x, y = np.abs(u), v + 0.03
    fold = 2 * np.maximum(cos * x - sin * y, 0)
    x, y = x - fold * cos, y + fold * sin
    fold = 2 * np.maximum(-cos * x - sin * y, 0)
    x, y = np.abs(x + fold * cos), y + fold * sin - tip
    edge_x, edge_y = waist * sin, waist * cos - 1
    along = np.clip((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2), 0, tip)
    return np.hypot(x - edge_x * along, y - edge_y * along) * np.sign(y * edge_x - x * edge_y)


def heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    scale = 1.62
    x, y = np.abs(u) / scale, v / scale + 0.58
    lobe = np.hypot(x - 0.25, y - 0.75) - 0.35355339
    onto = 0.5 * np.maximum(x + y, 0)
    body = np.sqrt(np.minimum(x**2 + (y - 1) ** 2, (x - onto) ** 2 + (y - onto) ** 2)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, body) * scale


def cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    x, y = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(x, y) - 0.98, np.minimum(x, y) - 0.4)


def diamond(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    width, height = 0.82, 1.12
    return (np.abs(u) / width + np.abs(v) / height - 1) * (width * height / np.hypot(width, height))


def moon(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u = u - 0.12
    return np.maximum(np.hypot(u, v) - 1.0, 0.8 - np.hypot(u - 0.55, v - 0.12))


DISTANCES: dict[str, Distance] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "heart": heart,
    "cross": cross,
    "diamond": diamond,
    "moon": moon,
}


def coordinates(size: int, x: float, y: float, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres of a `size` x `size` image in units of a shape: (u, v) of shapes (1, size) and (size, 1).

    `x`, `y` (downwards) and `radius` are in units of the image's side.
    """
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    return ((centres - x) / radius)[None, :], ((y - centres) / radius)[:, None]


def coverage(distance: np.ndarray, pixel: float) -> np.ndarray:
    """Fraction of each pixel inside, from its signed distance and the pixel's width in the same units."""
    return np.clip(0.5 - distance / pixel, 0, 1)
