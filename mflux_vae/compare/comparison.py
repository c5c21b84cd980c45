"""Compare autoencoders on the same images: reconstructions, statistics of latents, times.

Images are squares uint8 (S, S, 3). A network with a fixed size gets them resized, and its reconstructions are resized
back to S; the loss of resizing counts. A network with one channel is compared in brightness.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from mflux_vae.compare.codecs import Codec, First
from mflux_vae.compare.measuring import mean_of, quality
from mflux_vae.errors import RunError
from mflux_vae.images import covered, load_images
from mflux_vae.metrics.lpips import LPIPS
from mflux_vae.pretrained.loading import parameter_count

ROUNDS = 5
"""Repetitions of timing, on the first image."""

DEAD = 0.01
"""A latent channel with at most this variance is dead (Burda et al. 2016, arXiv 1509.00519)."""


class LatentStatistics:
    """Running statistics per channel in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self._ends: list[tuple[float, float]] = []
        self._sums: Any = 0.0
        self._squares: Any = 0.0

    def add(self, latents: np.ndarray) -> None:
        """Add latents (..., C)."""
        rows = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
        self.rows += len(rows)
        self._ends.append((float(rows.min()), float(rows.max())))
        self._sums, self._squares = self._sums + rows.sum(axis=0), self._squares + np.square(rows).sum(axis=0)

    def summary(self) -> dict[str, Any]:
        """`mean`, `std`, `min`, `max`, `channels` and `dead` channels (None with a single row)."""
        means, squares = self._sums / self.rows, self._squares / self.rows
        variances = np.maximum(squares - np.square(means), 0)
        return {
            "mean": float(means.mean()),
            "std": float(max(squares.mean() - means.mean() ** 2, 0) ** 0.5),
            "min": min(least for least, _ in self._ends),
            "max": max(most for _, most in self._ends),
            "channels": len(means),
            "dead": int((variances <= DEAD).sum()) if self.rows > 1 else None,
        }


@dataclass(eq=False)
class Candidate:
    """A model to compare, with its measurements.

    Attributes:
        name: shown in the table.
        codec: the model.
        latent: size of a latent, and `compression`: image values per latent value.
        statistics: statistics of unscaled latents.
        qualities: `measuring.quality` of each image.
        kl: KL of each image (nats).
        seconds: seconds of each encode, and of each decode.
    """

    name: str
    codec: Codec
    latent: dict[str, Any] = field(default_factory=dict)
    statistics: LatentStatistics = field(default_factory=LatentStatistics)
    qualities: list[dict[str, float]] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def reconstruct(self, picture: np.ndarray, first: np.ndarray, lpips: LPIPS | None) -> np.ndarray:
        """Reconstruct an image (S, S, 3) and measure it."""
        original = self._convert_channels(picture)
        inputs = self._prepare(picture, first)
        latents = self.codec.encode(inputs)
        try:
            decoded = self.codec.decode(inputs, latents)
        except RunError as error:
            raise type(error)(f"{self.name}: {error}") from error
        again = covered(decoded, picture.shape[:2])
        self.statistics.add(self.codec.values(latents))
        kl = self.codec.kl(latents)
        self.kl += [] if kl is None else [kl]
        self.qualities.append(quality(original, again, lpips))
        latent, side = self.codec.describe(latents), self.codec.side or picture.shape[0]
        self.latent = {**latent, "compression": side**2 * self.codec.channels / latent["numbers"]}
        return np.broadcast_to(again, picture.shape)

    def clock(self, picture: np.ndarray, first: np.ndarray) -> None:
        """Time one encode and one decode."""
        inputs = self._prepare(picture, first)
        start = time.perf_counter()
        latents = self.codec.encode(inputs)
        middle = time.perf_counter()
        self.codec.decode(inputs, latents)
        self.seconds[0].append(middle - start)
        self.seconds[1].append(time.perf_counter() - middle)

    def summary(self) -> dict[str, Any]:
        """Measurements for the table and JSON: median milliseconds, mean qualities."""
        names = self.qualities[0]
        encode, decode = (1000 * median(seconds) for seconds in self.seconds)
        return {
            "name": self.name,
            "kind": type(self.codec.network).__name__,
            "parameters": parameter_count(self.codec.network),
            "image_size": self.codec.side,
            "channels": self.codec.channels,
            "latent": {**self.latent, **self.statistics.summary()},
            "kl": mean_of(self.kl) if self.kl else None,
            **{name: mean_of([each[name] for each in self.qualities]) for name in names},
            "encode_ms": encode,
            "decode_ms": decode,
            "note": self.codec.note,
        }

    def _prepare(self, picture: np.ndarray, first: np.ndarray) -> Any:
        side = self.codec.side or picture.shape[0]
        return self.codec.prepare(*(covered(self._convert_channels(each), (side, side)) for each in (picture, first)))

    def _convert_channels(self, picture: np.ndarray) -> np.ndarray:
        return load_images(picture, channels=self.codec.channels)[0]


def run(
    candidates: Sequence[Candidate], pictures: Iterable[np.ndarray], *, first: First, lpips: LPIPS | None = None
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Reconstruct and measure images; finally time the models on the first image, alternating.

    Args:
        candidates: keep the measurements.
        pictures: uint8 (S, S, 3) each.
        first: see `First`.
        lpips: network for LPIPS.

    Yields:
        each image and its reconstructions, (S, S, 3).
    """
    beginning, before = None, None
    for picture in pictures:
        before = picture if before is None or first == "self" else before
        yield picture, [candidate.reconstruct(picture, before, lpips) for candidate in candidates]
        beginning = picture if beginning is None else beginning
        before = picture
    if beginning is None:
        return
    for turn in range(ROUNDS):
        for candidate in candidates if turn % 2 else reversed(candidates):
            candidate.clock(beginning, beginning)
