"""Training images: open data sets, split off held-out images, augment and batch.

    open_data         folder, MNIST files, video frames, synthetic digits -> sources
    Source            image by index: uint8 (H, W, C), all of one size, read on access
    split             training images and held-out images
    Batches           update -> uint8 (B, H, W, C), shuffled anew in every epoch

All randomness is a function of (seed, epoch, index). Sources of files keep only their names, about 40 bytes per file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from mflux_vae.errors import ImageError, SettingsError
from mflux_vae.utils.links import missing
from mflux_vae.utils.prefetch import prefetch
from mflux_vae_train.randomness import Stream, rng
from mflux_vae_train.vae.data import registry, sources
from mflux_vae_train.vae.data.digits import Digits

DIGITS = "digits"
"""Name of the data set of synthetic digits."""

KINDS = (DIGITS, "folder", "frames", "mnist", "npz", "registered")

_MAX_BAD_IN_A_ROW = 100
"""Consecutive unreadable files that are replaced before it is an error."""

_MAX_CACHED_BYTES = 256 * 2**20
_READ_SIZE = 16


class Source(Protocol):
    """Images by index. `item` may be called from several threads.

    Attributes:
        size: height and width.
        channels: 1 or 3.
        starts: first indices of groups that must not be split, such as the frames of a video, ascending from 0; or
        None.
    """

    size: int
    channels: int
    starts: np.ndarray | None

    def __len__(self) -> int: ...

    def item(self, index: int) -> np.ndarray:
        """uint8 (size, size, channels)."""


def open_data(
    data: str | Path,
    *,
    size: int,
    channels: int,
    kind: str | None = None,
    video_list: str | Path | None = None,
    seed: int = 0,
    count: int = 20000,
) -> tuple[Source, Source | None]:
    """Open training images and, if the data has one, the test split.

    Args:
        data: one of
            - "digits": synthetic digits;
            - a folder of images (recursive), or of MNIST files (IDX, gzipped or not);
            - a folder of video frames, `<video>/<frame>.jpg`, as in Something-Something v2 (`kind` "frames");
            - an IDX file, or an .npz file with `x_train` and optionally `x_test`, or with one array of images;
            - the name of a registered data set (see `registry`).
        size, channels: of the returned images: the centre square, resized; 1 channel means greyscale.
        kind: one of `KINDS`; None detects it; a folder with a `video_list` contains frames.
        video_list: see `sources.frames`.
        seed, count: seed and number of generated images (digits, registered).

    Raises:
        ImageError: the data do not exist or cannot be read.
        SettingsError: unknown kind, or a video list for another kind than frames.
    """
    path = Path(data).expanduser()
    kind = kind or _kind(data, path, video_list)
    if kind not in KINDS:
        raise SettingsError(f"--data_kind is {kind!r}; allowed are {', '.join(KINDS)}")
    if video_list is not None and kind != "frames":
        raise SettingsError(f"--data_list: only for frames, not for data of kind {kind}; leave it out")
    test: Source | None = None
    if kind == DIGITS:
        train: Source = Digits(count, seed=seed, size=size, channels=channels)
    elif kind == "registered":
        train = registry.open_registered(str(data), size=size, channels=channels, seed=seed, count=count)
    elif kind == "frames":
        train = sources.frames(path, video_list, size=size, channels=channels)
    elif kind == "folder":
        train = sources.folder(path, size=size, channels=channels)
    else:
        found = sources.npz(path) if kind == "npz" else sources.mnist(path)
        train, *others = (sources.Arrays(pictures, size=size, channels=channels) for pictures in found)
        test = others[0] if others else None
    return _cached(train), None if test is None else _cached(test)


def split(source: Source, share: float, seed: int) -> tuple[Subset, Subset]:
    """Training images and a random held-out fraction, at least one image each. Groups are not split.

    Raises:
        ImageError: fewer than two images or groups.
    """
    count = len(source)
    starts = np.arange(count) if source.starts is None else source.starts
    if len(starts) < 2:
        raise ImageError("data: a single image or video cannot be split; give at least two")
    shuffled = rng(seed, Stream.HELD_OUT).permutation(len(starts))
    lengths = np.diff(np.append(starts, count))[shuffled]
    # the number of groups that comes closest to the fraction
    taken = int(np.abs(np.cumsum(lengths) - share * count).argmin()) + 1
    taken = min(max(taken, 1), len(starts) - 1)
    held = np.zeros(len(starts), bool)
    held[shuffled[:taken]] = True
    mask = np.repeat(held, np.diff(np.append(starts, count)))
    return Subset(source, np.flatnonzero(~mask)), Subset(source, np.flatnonzero(mask))


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random augmentation of training images.

    Attributes:
        flip: flip horizontally with probability 0.5.
        shift: largest shift in each direction (pixels); edge pixels are repeated.
    """

    flip: bool = False
    shift: int = 0

    def __call__(self, image: np.ndarray, *, seed: int, epoch: int, index: int) -> np.ndarray:
        """uint8 (H, W, C) -> the same shape; a function of all arguments."""
        if not self.flip and not self.shift:
            return image
        draw = rng(seed, Stream.AUGMENT, epoch, index)
        flipped, down, right = bool(draw.integers(2)), *draw.integers(-self.shift, self.shift + 1, 2)
        if self.flip and flipped:
            image = image[:, ::-1]
        height, width = image.shape[:2]
        rows = np.clip(np.arange(height) - down, 0, height - 1)
        columns = np.clip(np.arange(width) - right, 0, width - 1)
        return image[rows][:, columns]


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Indices 0 to count - 1, shuffled for an epoch."""
    return rng(seed, Stream.DATA_ORDER, epoch).permutation(count)


class Batches:
    """Update -> its images, uint8 (B, H, W, C); images of the next updates are prefetched.

    Every epoch has another order. Batches continue across epoch boundaries, so all have the same size. A batch is a
    function of the update.

    Args:
        batch: images per update, over all processes.
        rows: rows of each batch that this process reads; None for all.

    Raises:
        SettingsError: `rows` is empty.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch: int,
        seed: int,
        augmentation: Augmentation = Augmentation(),
        rows: Sequence[int] | None = None,
    ) -> None:
        self.rows = range(batch) if rows is None else rows
        if not self.rows:
            raise SettingsError(f"rows: none of the {batch} images of a batch; give at least one")
        self.source, self.batch, self.seed, self.augmentation = source, batch, seed, augmentation
        self._prefetched: Iterator[list[np.ndarray]] | None = None
        self._next = -1

    def positions(self, update: int) -> list[tuple[int, int]]:
        """(epoch, index in the source) of each image."""
        count = len(self.source)
        positions = (divmod(update * self.batch + row, count) for row in self.rows)
        return [(epoch, int(epoch_order(self.seed, epoch, count)[position])) for epoch, position in positions]

    def __call__(self, update: int) -> np.ndarray:
        if self._prefetched is None or update != self._next:
            self.close()
            pieces = -(-len(self.rows) // _READ_SIZE)
            self._prefetched = prefetch(self._read, self._pieces(update), limit=2 * pieces)
            self._next = update
        self._next += 1
        images: list[np.ndarray] = []
        while len(images) < len(self.rows):
            images += next(self._prefetched)
        return np.stack(images)

    def close(self) -> None:
        """Stop prefetching."""
        if self._prefetched is not None:
            self._prefetched.close()  # type: ignore[attr-defined]
            self._prefetched = None

    def _pieces(self, update: int) -> Iterator[list[tuple[int, int]]]:
        while True:
            positions = self.positions(update)
            yield from (positions[start : start + _READ_SIZE] for start in range(0, len(positions), _READ_SIZE))
            update += 1

    def _read(self, positions: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        return [
            self.augmentation(self.source.item(index), seed=self.seed, epoch=epoch, index=index)
            for epoch, index in positions
        ]


def prefetch_batches(source: Source, pieces: Sequence[range]) -> Iterator[np.ndarray]:
    """Yield the images (B, H, W, C) of each range of indices, prefetching the next one."""
    yield from prefetch(lambda piece: np.stack([source.item(index) for index in piece]), pieces, limit=2)


class Cached:
    """A source that keeps images in memory once they were read. See `Source`."""

    def __init__(self, source: Source) -> None:
        self.source, self.size, self.channels, self.starts = source, source.size, source.channels, source.starts
        self._images = np.empty((len(source), source.size, source.size, source.channels), np.uint8)
        self._loaded = np.zeros(len(source), bool)

    def __len__(self) -> int:
        return len(self.source)

    def item(self, index: int) -> np.ndarray:
        if not self._loaded[index]:
            self._images[index] = self.source.item(index)
            self._loaded[index] = True
        return self._images[index]


class Subset:
    """Images of another source, selected by index. See `Source`.

    An unreadable file is replaced by the next readable image of the subset, so that no held-out image is trained on.

    Raises:
        ImageError: (from `item`) 100 consecutive files cannot be read.
    """

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices, self.size, self.channels = source, indices, source.size, source.channels
        self.starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def item(self, index: int) -> np.ndarray:
        error: sources.UnreadableFile | None = None
        for step in range(min(_MAX_BAD_IN_A_ROW, len(self))):
            try:
                return self.source.item(int(self.indices[(index + step) % len(self)]))
            except sources.UnreadableFile as unreadable:
                error = error or unreadable
        raise ImageError(f"{error}; nor can the following files of the data set be read; check the data") from error


def _cached(source: Source) -> Source:
    """Cache a source that fits into memory, unless it is an array of the right size."""
    if isinstance(source, sources.Arrays) and source.pictures.shape[1:3] == (source.size,) * 2:
        return source
    return Cached(source) if len(source) * source.size**2 * source.channels <= _MAX_CACHED_BYTES else source


def _kind(data: str | Path, path: Path, video_list: str | Path | None) -> str:
    if data == DIGITS:
        return DIGITS
    if str(data) in (names := registry.registered_names()):
        return "registered"
    if path.is_dir():
        if video_list is not None:
            return "frames"
        return "mnist" if any(sources.idx_files(path, prefix) for prefix in sources.MNIST_SPLITS) else "folder"
    if not path.exists():
        known = ", ".join((DIGITS, *names))
        what = f"does not exist; give a folder, an MNIST file, an .npz file, or a name ({known})"
        raise ImageError(f"{path}: {missing(path, what)}")
    return "npz" if path.suffix == ".npz" else "mnist"
