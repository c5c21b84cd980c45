"""Pictures to train autoencoders on: which there are, which are held out, and in which order they come.

    open_data         a folder, MNIST's files, frames of videos, digits drawn here -> sources
    Source            picture number i: uint8 (H, W, C), all of one size; read when it is asked for
    split             which are held out
    Batches           update -> uint8 (B, H, W, C), in an order that is shuffled anew for every epoch

Whatever is random is a function of (seed, epoch, index). Of a million files the names are kept, some 40 bytes each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from mflux_vae.errors import ImageError, SettingsError
from mflux_vae.utils.prefetch import prefetch
from mflux_vae_train.randomness import Stream, rng
from mflux_vae_train.vae.data import registry, sources
from mflux_vae_train.vae.data.digits import Digits

DIGITS = "digits"
"""Name of the data set that is drawn here."""

KINDS = (DIGITS, "folder", "frames", "mnist", "npz", "registered")

_KEPT_BYTES = 256 * 2**20
_READ_AT_ONCE = 16


class Source(Protocol):
    """Pictures by number. `item` may be called from several threads.

    Attributes:
        size: height and width.
        channels: 1 or 3.
        starts: first numbers of groups that belong together, such as the frames of a video, ascending from 0; or None.
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
    listed: str | Path | None = None,
    seed: int = 0,
    count: int = 20000,
) -> tuple[Source, Source | None]:
    """Pictures to train on, and those of the test split where the data has one.

    Args:
        data: one of
            - "digits", which are drawn here;
            - a folder of images, also in folders below it, or one with the files of MNIST (IDX, gzipped or not);
            - the frames of Something-Something v2, `<video>/<frame>.jpg` (`kind` "frames");
            - a file in IDX, or an .npz with `x_train` and perhaps `x_test`, or with one array of pictures;
            - the name of a data set that a package registers (see `registered`).
        size, channels: of the pictures that are given out: the centre square, resized; 1 channel is brightness.
        kind: one of `KINDS`; None to see, and to take a folder for one of frames where there is a list.
        listed: of frames: see `sources.frames`.
        seed, count: of pictures that are drawn, as digits are.

    Raises:
        ImageError: nothing there, or not readable.
        SettingsError: another kind, or a list for what has none.
    """
    path = Path(data).expanduser()
    kind = kind or _kind(data, path, listed)
    if kind not in KINDS:
        raise SettingsError(f"kind of data is {', '.join(KINDS)}, not {kind!r}")
    if listed is not None and kind != "frames":
        raise SettingsError(f"a list is for frames of videos, not for data of kind {kind}")
    test: Source | None = None
    if kind == DIGITS:
        train: Source = Digits(count, seed=seed, size=size, channels=channels)
    elif kind == "registered":
        train = registry.open_registered(str(data), size=size, channels=channels, seed=seed, count=count)
    elif kind == "frames":
        train = sources.frames(path, listed, size=size, channels=channels)
    elif kind == "folder":
        train = sources.folder(path, size=size, channels=channels)
    else:
        found = sources.npz(path) if kind == "npz" else sources.mnist(path)
        train, *others = (sources.Arrays(pictures, size=size, channels=channels) for pictures in found)
        test = others[0] if others else None
    return _kept(train), None if test is None else _kept(test)


def split(source: Source, share: float, seed: int) -> tuple[Subset, Subset]:
    """Pictures to train on and a held-out share, drawn by chance, at least one each; groups are not torn apart.

    Raises:
        ImageError: less than two pictures or groups.
    """
    count = len(source)
    starts = np.arange(count) if source.starts is None else source.starts
    if len(starts) < 2:
        raise ImageError("of one picture, or one video, none can be held out: give more")
    order = rng(seed, Stream.HELD_OUT).permutation(len(starts))
    lengths = np.diff(np.append(starts, count))[order]
    # as many groups as come closest to the share
    taken = int(np.abs(np.cumsum(lengths) - share * count).argmin()) + 1
    taken = min(max(taken, 1), len(starts) - 1)
    held = np.zeros(len(starts), bool)
    held[order[:taken]] = True
    each = np.repeat(held, np.diff(np.append(starts, count)))
    return Subset(source, np.flatnonzero(~each)), Subset(source, np.flatnonzero(each))


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What happens to a picture before it is trained on.

    Attributes:
        flip: half of them are mirrored.
        shift: they move by up to so many pixels in each direction; edges are repeated.
    """

    flip: bool = False
    shift: int = 0

    def __call__(self, picture: np.ndarray, *, seed: int, epoch: int, index: int) -> np.ndarray:
        """uint8 (H, W, C) -> the same shape: a function of the picture and the three numbers."""
        if not self.flip and not self.shift:
            return picture
        draw = rng(seed, Stream.AUGMENT, epoch, index)
        mirrored, down, right = bool(draw.integers(2)), *draw.integers(-self.shift, self.shift + 1, 2)
        if self.flip and mirrored:
            picture = picture[:, ::-1]
        height, width = picture.shape[:2]
        rows = np.clip(np.arange(height) - down, 0, height - 1)
        columns = np.clip(np.arange(width) - right, 0, width - 1)
        return picture[rows][:, columns]


@lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The numbers below `count`, shuffled for an epoch."""
    return rng(seed, Stream.DATA_ORDER, epoch).permutation(count)


class Batches:
    """Update -> its pictures, uint8 (B, H, W, C), while those of the next updates are read.

    Every epoch has all pictures in an order of its own; batches run on from one epoch into the next, so that all are
    of one size. What a batch holds depends on the update alone, whichever was asked for before.

    Args:
        batch: pictures of an update, over all processes.
        places: only these of each batch, for one of several processes; None for all.

    Raises:
        SettingsError: a batch of nothing.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch: int,
        seed: int,
        augmentation: Augmentation = Augmentation(),
        places: Sequence[int] | None = None,
    ) -> None:
        self.places = range(batch) if places is None else places
        if not self.places:
            raise SettingsError(f"a batch of {batch} pictures, and none of them is wanted")
        self.source, self.batch, self.seed, self.augmentation = source, batch, seed, augmentation
        self._coming: Iterator[list[np.ndarray]] | None = None
        self._next = -1

    def positions(self, update: int) -> list[tuple[int, int]]:
        """(epoch, number of the picture in the source) of each picture that is wanted."""
        count = len(self.source)
        places = [divmod(update * self.batch + place, count) for place in self.places]
        return [(epoch, int(order(self.seed, epoch, count)[place])) for epoch, place in places]

    def __call__(self, update: int) -> np.ndarray:
        if self._coming is None or update != self._next:
            self.close()
            pieces = -(-len(self.places) // _READ_AT_ONCE)
            self._coming = prefetch(self._read, self._pieces(update), limit=2 * pieces)
            self._next = update
        self._next += 1
        pictures: list[np.ndarray] = []
        while len(pictures) < len(self.places):
            pictures += next(self._coming)
        return np.stack(pictures)

    def close(self) -> None:
        """End reading ahead."""
        if self._coming is not None:
            self._coming.close()  # type: ignore[attr-defined]
            self._coming = None

    def _pieces(self, update: int) -> Iterator[list[tuple[int, int]]]:
        while True:
            positions = self.positions(update)
            yield from (positions[start : start + _READ_AT_ONCE] for start in range(0, len(positions), _READ_AT_ONCE))
            update += 1

    def _read(self, positions: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        return [
            self.augmentation(self.source.item(index), seed=self.seed, epoch=epoch, index=index)
            for epoch, index in positions
        ]


def in_order(source: Source, pieces: Sequence[range]) -> Iterator[np.ndarray]:
    """Pictures by their numbers, (B, H, W, C) for each piece: for validation. The next ones are read meanwhile."""
    yield from prefetch(lambda piece: np.stack([source.item(index) for index in piece]), pieces, limit=2)


class Kept:
    """Another source whose pictures are kept once they were read. See `Source`."""

    def __init__(self, source: Source) -> None:
        self.source, self.size, self.channels, self.starts = source, source.size, source.channels, source.starts
        self._pictures = np.empty((len(source), source.size, source.size, source.channels), np.uint8)
        self._there = np.zeros(len(source), bool)

    def __len__(self) -> int:
        return len(self.source)

    def item(self, index: int) -> np.ndarray:
        if not self._there[index]:
            self._pictures[index] = self.source.item(index)
            self._there[index] = True
        return self._pictures[index]


class Subset:
    """Some pictures of another source, by their numbers there. See `Source`."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices, self.size, self.channels = source, indices, source.size, source.channels
        self.starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def item(self, index: int) -> np.ndarray:
        return self.source.item(int(self.indices[index]))


def _kept(source: Source) -> Source:
    """With its pictures kept where all of them take little memory; arrays of the right size are in memory already."""
    if isinstance(source, sources.Arrays) and source.pictures.shape[1:3] == (source.size,) * 2:
        return source
    return Kept(source) if len(source) * source.size**2 * source.channels <= _KEPT_BYTES else source


def _kind(data: str | Path, path: Path, listed: str | Path | None) -> str:
    if data == DIGITS:
        return DIGITS
    if str(data) in (names := registry.names()):
        return "registered"
    if path.is_dir():
        if listed is not None:
            return "frames"
        return "mnist" if any(sources.idx_files(path, prefix) for prefix in sources.MNIST_SPLITS) else "folder"
    if not path.exists():
        known = ", ".join((DIGITS, *names))
        raise ImageError(f"{path} does not exist: give a folder, a file of MNIST, an .npz, or a name ({known})")
    return "npz" if path.suffix == ".npz" else "mnist"
