"""Several autoencoders on the same pictures: what each reconstructs, what its latents are like, how long it takes.

Pictures are squares of one size, uint8 (S, S, 3). A network that knows one size only gets them in its own, and what it
makes is brought back to S: what is lost on the way counts. One of a single channel is compared in brightness.
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
from mflux_vae.images import covered, load_images
from mflux_vae.metrics.lpips import LPIPS
from mflux_vae.pretrained.loading import parameter_count

ROUNDS = 5
"""How often each model is timed, on the first picture."""

DEAD = 0.01
"""Variance up to which a latent channel counts as unused (Burda et al. 2016, arXiv 1509.00519)."""


class LatentStatistics:
    """Of latents that arrive one after the other, by channel, in float64."""

    def __init__(self) -> None:
        self.rows = 0
        self._ends: list[tuple[float, float]] = []
        self._sums: Any = 0.0
        self._squares: Any = 0.0

    def add(self, latents: np.ndarray) -> None:
        """(..., C)."""
        rows = latents.reshape(-1, latents.shape[-1]).astype(np.float64)
        self.rows += len(rows)
        self._ends.append((float(rows.min()), float(rows.max())))
        self._sums, self._squares = self._sums + rows.sum(axis=0), self._squares + np.square(rows).sum(axis=0)

    def summary(self) -> dict[str, Any]:
        """`mean`, `std`, `min`, `max`; `channels`, and how many of them are `dead`: None where there is but one row."""
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
class Contestant:
    """A model to compare, and what was measured so far.

    Attributes:
        name: in the table.
        codec: what it is.
        latent: what a latent is made of, and the compression: numbers in an image for each in its latent.
        statistics: of latents before scaling.
        qualities: of each picture (`measuring.quality`).
        kl: of each picture, nats.
        seconds: of each encoding, and of each decoding.
    """

    name: str
    codec: Codec
    latent: dict[str, Any] = field(default_factory=dict)
    statistics: LatentStatistics = field(default_factory=LatentStatistics)
    qualities: list[dict[str, float]] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    seconds: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))

    def reconstruct(self, picture: np.ndarray, first: np.ndarray, lpips: LPIPS | None) -> np.ndarray:
        """The picture (S, S, 3) again, measured."""
        original = self._coloured(picture)
        given = self._given(picture, first)
        latents = self.codec.encode(given)
        again = covered(self.codec.decode(given, latents), picture.shape[:2])
        self.statistics.add(self.codec.values(latents))
        kl = self.codec.kl(latents)
        self.kl += [] if kl is None else [kl]
        self.qualities.append(quality(original, again, lpips))
        told, side = self.codec.told(latents), self.codec.side or picture.shape[0]
        self.latent = {**told, "compression": side**2 * self.codec.channels / told["numbers"]}
        return np.broadcast_to(again, picture.shape)

    def clock(self, picture: np.ndarray, first: np.ndarray) -> None:
        """Encode and decode for the clock."""
        given = self._given(picture, first)
        start = time.perf_counter()
        latents = self.codec.encode(given)
        middle = time.perf_counter()
        self.codec.decode(given, latents)
        self.seconds[0].append(middle - start)
        self.seconds[1].append(time.perf_counter() - middle)

    def summary(self) -> dict[str, Any]:
        """What was measured, for a table and for JSON; milliseconds are medians, measures of quality means."""
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

    def _given(self, picture: np.ndarray, first: np.ndarray) -> Any:
        side = self.codec.side or picture.shape[0]
        return self.codec.given(*(covered(self._coloured(each), (side, side)) for each in (picture, first)))

    def _coloured(self, picture: np.ndarray) -> np.ndarray:
        return load_images(picture, channels=self.codec.channels)[0]


def run(
    contestants: Sequence[Contestant], pictures: Iterable[np.ndarray], *, first: First, lpips: LPIPS | None = None
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Reconstruct pictures, and measure; at last by the clock, on the first of them, one model after the other.

    Args:
        contestants: which keep what is measured.
        pictures: uint8 (S, S, 3) each.
        first: see `First`; for networks of pairs.
        lpips: the network of the perceptual distance.

    Yields:
        each picture, and what each contestant makes of it, (S, S, 3).
    """
    beginning, before = None, None
    for picture in pictures:
        before = picture if before is None or first == "self" else before
        yield picture, [contestant.reconstruct(picture, before, lpips) for contestant in contestants]
        beginning = picture if beginning is None else beginning
        before = picture
    if beginning is None:
        return
    for turn in range(ROUNDS):
        for contestant in contestants if turn % 2 else reversed(contestants):
            contestant.clock(beginning, beginning)
