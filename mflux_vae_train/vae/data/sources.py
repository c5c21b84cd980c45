"""Sources of images: files and arrays. They implement `batches.Source`."""

from __future__ import annotations

import gzip
import logging
import math
import os
import re
import struct
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mflux_vae.errors import ImageError
from mflux_vae.image_files.notes import ImageNotes
from mflux_vae.image_folder.scan import ImageFolder, scan
from mflux_vae.images import EXTENSIONS, load_image
from mflux_vae.utils.formatting import count_text, first_names
from mflux_vae.utils.links import missing
from mflux_vae.utils.text_files import parse_json, read_text
from mflux_vae.weights.formats.safe_reading import BROKEN

logger = logging.getLogger(__name__)

MNIST_SPLITS = ("train", "t10k")
"""Prefixes of MNIST files."""

_MAX_RATIO, _ALWAYS_ALLOWED = 100, 2**26
"""A compressed file may expand to this multiple of its size, or to this many bytes; a limit against zip bombs."""

MAX_FOLDERS = 2
"""Folders whose unused entries a warning names."""

MAX_INSPECTED = 10_000
"""Images whose content is inspected when folders are listed; the extensions of further ones are trusted."""

MAX_NAMED = 5
"""Unreadable files that warnings name."""


class Paths(Sequence[Path]):
    """Paths below a folder, stored compactly as one byte string."""

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        self.root, self._text, self._ends = root, bytearray(), array("Q", [0])
        for name in names:
            self._text += os.fsencode(name)
            self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Path:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.root / os.fsdecode(bytes(self._text[self._ends[index] : self._ends[index + 1]]))


class UnreadableFile(ImageError):
    """An image file of a data set cannot be read."""


class Files:
    """Image files, read as their centre squares. A warning names each of the first `MAX_NAMED` unreadable files.

    Attributes:
        bad: indices of the unreadable files found so far.

    Raises:
        UnreadableFile: (from `item`) the file cannot be read. `batches.Subset` replaces it.
    """

    def __init__(self, paths: Sequence[Path], *, size: int, channels: int, starts: np.ndarray | None = None) -> None:
        self.paths, self.size, self.channels, self.starts = paths, size, channels, starts
        self.bad: set[int] = set()
        self._notes = ImageNotes()

    def __len__(self) -> int:
        return len(self.paths)

    def item(self, index: int) -> np.ndarray:
        path = self.paths[index]
        if index in self.bad:
            raise UnreadableFile(f"{path} cannot be read")
        try:
            picture = load_image(path, resolution=self.size, notes=self._notes)
            self._notes.log_first(logger)
            return to_channels(picture, self.channels)
        except ImageError as error:
            self.bad.add(index)
            if len(self.bad) <= MAX_NAMED:
                others = "" if len(self.bad) < MAX_NAMED else "; further unreadable files are not named"
                logger.warning("%s; another image of the same split is used in its place%s", error, others)
            raise UnreadableFile(str(error)) from error


class Arrays:
    """Images in an array, uint8 (N, H, W) or (N, H, W, C)."""

    def __init__(self, pictures: np.ndarray, *, size: int, channels: int) -> None:
        self.pictures, self.size, self.channels = pictures, size, channels
        self.starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pictures)

    def item(self, index: int) -> np.ndarray:
        picture = self.pictures[index]
        picture = to_channels(picture if picture.ndim == 3 else picture[..., None], self.channels)
        height, width = picture.shape[:2]
        if (height, width) == (self.size, self.size):
            return picture
        side = min(height, width)
        left, top = (width - side) / 2, (height - side) / 2
        image = Image.fromarray(picture[..., 0] if self.channels == 1 else picture)
        image = image.resize((self.size,) * 2, Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
        return to_channels(np.array(image), self.channels)


def folder(path: str | Path, *, size: int, channels: int) -> Files:
    """Images of a folder and its subfolders, sorted by name, without hidden ones. A warning lists what is not used.

    Raises:
        ImageError: the folder does not exist or contains no images.
    """
    root = _folder(path)
    found = _Folders(root)
    paths = Paths(root, found.images_below())
    if not len(paths):
        text = found.unused_text()
        raise ImageError(f"{path}: contains no images; allowed are {', '.join(EXTENSIONS)}{'; ' * bool(text)}{text}")
    found.warn()
    return Files(paths, size=size, channels=channels)


def frames(path: str | Path, video_list: str | Path | None = None, *, size: int, channels: int) -> Files:
    """Video frames, `<video>/<frame>.jpg`, grouped by video and sorted by name.

    Args:
        video_list: a text file with one video or frame (`<video>/<frame>.jpg`) per line, or a .json file with a list of
            names or of objects with an `id`, as in Something-Something v2. None uses all videos, sorted by name.
            Missing videos are counted in a warning.

    Raises:
        ImageError: the folder or list does not exist, or there are no frames.
    """
    root = _folder(path)
    found = _Folders(root)
    entries = _read_list(Path(video_list)) if video_list is not None else found.videos()
    videos: dict[str, list[str]] = {}  # a list of frames may return to a video
    for entry in entries:
        videos.setdefault(str(Path(entry).parent) if _is_frame(entry) else entry, []).append(entry)
    starts, absent = array("Q"), 0

    def names() -> Iterator[str]:
        nonlocal absent
        count = 0
        for entries in videos.values():
            existing = [found.frames_of(entry) for entry in entries]
            absent += existing.count([])
            if any(existing):
                starts.append(count)
            for names in existing:
                count += len(names)
                yield from names

    paths = Paths(root, names())
    if not len(paths):
        raise ImageError(
            f"{path}: contains no frames <video>/<frame>.jpg" + (f" of {video_list}" if video_list else "")
        )
    if absent:
        logger.warning("%s: %d of %d videos have no frames", path, absent, len(entries))
    found.warn()
    return Files(paths, size=size, channels=channels, starts=np.array(starts, np.int64))


def _is_frame(entry: str) -> bool:
    """Whether an entry of a list is a frame instead of a video."""
    return entry.lower().endswith(EXTENSIONS)


def mnist(path: Path) -> list[np.ndarray]:
    """Images of the training split and, if present, of the test split; of a single file, its images."""
    if path.is_file():
        return [_idx(path)]
    found = {prefix: idx_files(path, prefix) for prefix in MNIST_SPLITS}
    if not found["train"]:
        raise ImageError(f"{path}: contains no train-images-idx3-ubyte(.gz)")
    return [_idx(files[0]) for files in found.values() if files]


def npz(path: Path) -> list[np.ndarray]:
    """Arrays `x_train` and `x_test`, or the only array of images."""
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > _max_unpacked(path.stat().st_size):
                raise ImageError(f"{path}: expands to more than {_MAX_RATIO} times its size; save it uncompressed")
        with np.load(path, allow_pickle=False) as file:
            names = [name for name in ("x_train", "x_test") if name in file.files] or file.files
            found = {name: pictures for name in names if (pictures := file[name]).ndim in (3, 4)}
    except BROKEN as error:
        raise ImageError(f"{path}: cannot be read ({error}); give an .npz file with an array of images") from error
    if not found or (len(found) > 1 and [*found] != ["x_train", "x_test"]):
        raise ImageError(f"{path}: has {len(found)} arrays of images; give one, or x_train and x_test")
    for pictures in found.values():
        if pictures.dtype != np.uint8 or pictures.shape[3:] not in ((), (1,), (3,)):
            actual = f"{pictures.dtype} {pictures.shape}"
            raise ImageError(f"{path}: has {actual}; expected uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3)")
        if not pictures.size:
            raise ImageError(f"{path}: contains no images")
    return [*found.values()]


def idx_files(path: Path, prefix: str) -> list[Path]:
    """MNIST image files of a split, under the original name or with a dot, also in subfolders raw and MNIST/raw."""
    pattern = re.compile(rf"{prefix}-images[-.]idx3-ubyte(?:\.gz)?")
    return [
        directory / name
        for directory in (path, path / "raw", path / "MNIST" / "raw")
        if directory.is_dir()
        for name in sorted(os.listdir(directory))
        if pattern.fullmatch(name)
    ]


def _idx(path: Path) -> np.ndarray:
    """IDX file with images, gzipped or not -> uint8 (N, H, W)."""
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            with gzip.open(path) as file:
                limit = _max_unpacked(len(data))
                data = file.read(limit + 1)
            if len(data) > limit:
                raise ImageError(f"{path}: expands to more than {_MAX_RATIO} times its size; decompress it first")
    except (OSError, EOFError, zlib.error) as error:
        raise ImageError(f"{path}: cannot be read ({error}); download it again") from error
    if len(data) < 16 or data[:4] != b"\0\0\x08\x03":
        raise ImageError(f"{path}: is not an IDX file with images; expected bytes in three dimensions")
    shape = struct.unpack(">3I", data[4:16])
    if len(data) - 16 != math.prod(shape) or not math.prod(shape):
        raise ImageError(
            f"{path}: header says {shape[0]} images of {shape[1]} x {shape[2]} but there are {len(data) - 16} bytes;"
            " download it again"
        )
    return np.frombuffer(data, np.uint8, offset=16).reshape(shape)


def _max_unpacked(size: int) -> int:
    """Largest allowed expanded size (bytes) of a compressed file of `size` bytes."""
    return max(_MAX_RATIO * size, _ALWAYS_ALLOWED)


def _folder(path: str | Path) -> Path:
    root = Path(path).expanduser()
    if not root.is_dir():
        raise ImageError(f"{path}: {'is a file' if root.exists() else 'does not exist'}; give a folder")
    return root


class _Folders:
    """Scans folders below a root, and remembers what is not used in them."""

    def __init__(self, root: Path) -> None:
        self._root, self._count = root, 0
        self._unused: list[ImageFolder] = []

    def scan(self, inside: str, *, recursive: bool = True) -> ImageFolder:
        """A folder; the content of its files is inspected if there were at most `MAX_INSPECTED` images before."""
        found = scan(self._root / inside, recursive=recursive, trust_extensions=self._count > MAX_INSPECTED)
        self._count += len(found.images)
        if found.unused_text(texts=False):
            self._unused.append(found)
        return found

    def images_below(self, inside: str = "") -> Iterator[str]:
        """Yield images by relative path, top down."""
        found = self.scan(inside)
        yield from (os.path.join(inside, name) for name in found.images)
        for name in found.subfolders:
            yield from self.images_below(os.path.join(inside, name))

    def videos(self) -> list[str]:
        """Names of the folders in the root."""
        found = self.scan("")
        if found.images:
            count = count_text(len(found.images), "image")
            logger.warning("%s: %s beside the videos not used (%s)", self._root, count, first_names(found.images))
        return list(found.subfolders)

    def frames_of(self, entry: str) -> list[str]:
        """Existing frames of an entry of a list: of a video, or the frame itself."""
        if _is_frame(entry):
            return [entry] if (self._root / entry).is_file() else []
        return (
            [f"{entry}/{name}" for name in self.scan(entry, recursive=False).images]
            if (self._root / entry).is_dir()
            else []
        )

    def unused_text(self) -> str:
        """What is not used; empty if nothing."""
        more = len(self._unused) - MAX_FOLDERS
        text = "; ".join(f"{one.folder}: {one.unused_text(texts=False)}" for one in self._unused[:MAX_FOLDERS])
        return text + (f"; and in {more} more folders" if more > 0 else "")

    def warn(self) -> None:
        if text := self.unused_text():
            logger.warning("not used in %s", text)


def _read_list(path: Path) -> list[str]:
    """Entries of a list file."""
    try:
        text = read_text(path, ImageError)
        if path.suffix != ".json":
            return [line.strip() for line in text.split("\n") if line.strip() and not line.startswith("#")]
        return [str(entry["id"] if isinstance(entry, dict) else entry) for entry in parse_json(text)]
    except FileNotFoundError:
        raise ImageError(f"{path}: {missing(path, 'does not exist; give a list of videos')}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ImageError(f"{path}: is not a list of videos ({error!r}); give one per line, or a JSON list") from error


def to_channels(picture: np.ndarray, channels: int) -> np.ndarray:
    """uint8 (H, W), (H, W, 1) or (H, W, 3) -> (H, W, channels)."""
    picture = picture if picture.ndim == 3 else picture[..., None]
    if picture.shape[2] == channels:
        return picture
    if channels == 3:
        return np.repeat(picture, 3, axis=2)
    return np.array(Image.fromarray(picture).convert("L"))[..., None]
