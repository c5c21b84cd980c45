"""Read and write image files; crop, resize and arrange images. Uses Pillow.

A *picture* is a uint8 array (H, W, 3), RGB, or (H, W, 1). Networks take (B, H, W, C) in [-1, 1].
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from mflux_vae.errors import ImageError
from mflux_vae.image_files.modes import eight_bits, to_rgb
from mflux_vae.image_files.notes import ImageNotes
from mflux_vae.image_files.reading import content_hash as content_hash
from mflux_vae.image_files.reading import image_text as image_text
from mflux_vae.image_files.reading import read_file, read_image
from mflux_vae.image_files.reading import stored_size as stored_size

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""File name extensions of images, case-insensitive."""

COMPRESSION = 4
"""zlib's level for PNG files: 40 % of the time of Pillow's default, 6, and files that are 1 to 20 % larger."""

Source: TypeAlias = "str | Path | Image.Image | np.ndarray"
"""Sources of an image."""

log = logging.getLogger("mflux_vae")


def load_images(
    sources: Source | Sequence[Source], *, channels: int = 3, notes: ImageNotes | None = None
) -> list[np.ndarray]:
    """Load images from files, Pillow images and arrays, each at its size.

    Args:
        sources: one source or several; files and Pillow images as in `load_image`. Arrays are (H, W) or (H, W, C) with
            1, 3 or 4 channels (RGBA is composited over white): uint8, bool, uint16 with 65535 as white, or other
            numbers in [0, 255], which are rounded.
        channels: 3, or 1 for brightness (0.299 R + 0.587 G + 0.114 B, rounded).
        notes: see `load_image`.

    Returns:
        uint8 (H, W, channels) each.

    Raises:
        ImageError: as `load_image`; an array of another shape, dtype or range, or not finite; other channels.
    """
    if isinstance(sources, str | Path | Image.Image) or hasattr(sources, "shape") or not isinstance(sources, Iterable):
        sources = cast("list[Source]", [sources])
    if channels not in (1, 3):
        raise ImageError(f"images have 1 or 3 channels, this network has {channels}; pass arrays instead")
    pictures, found = [], ImageNotes() if notes is None else notes
    for index, source in enumerate(sources):
        if isinstance(source, str | Path):
            image = read_file(source, found)
        elif isinstance(source, Image.Image):
            image = read_image(source, f"image {index}", found)
        else:
            image = _from_array(source, f"image {index}", found)
        pictures.append(np.array(image) if channels == 3 else np.array(image.convert("L"))[..., None])
    if notes is None:
        found.log(log)
    return pictures


def load_image(path: str | Path, *, resolution: int | None = None, notes: ImageNotes | None = None) -> np.ndarray:
    """Load an image file as RGB.

    The content decides the format: JPEG, PNG, WebP, TIFF, BMP, GIF and what else Pillow opens; HEIC with the extra
    `heif`. EXIF orientation is applied, colours are converted to sRGB by the colour profile, transparency is composited
    over white, 16 bits are reduced to 8. The first frame or page is used. Damaged metadata are ignored. Pillow warns
    above 89 million pixels and refuses twice as many (`PIL.Image.MAX_IMAGE_PIXELS`).

    Args:
        resolution: resize the short side to this many pixels and crop the centre square.
        notes: collects what was converted or ignored; None logs it.

    Returns:
        uint8 (H, W, 3), or (resolution, resolution, 3).

    Raises:
        ImageError: the file is missing or too large, or its pixels are broken, truncated, or floating-point numbers.
    """
    found = ImageNotes() if notes is None else notes
    image = read_file(path, found)
    if notes is None:
        found.log(log)
    return np.array(image if resolution is None else _covering(image, (resolution, resolution), 0.5))


def load_mask(path: str | Path, *, notes: ImageNotes) -> np.ndarray:
    """Load the grey levels of a mask; transparent is black. uint8 (H, W, 1), errors as `load_image`."""
    return np.array(read_file(path, notes, mask=True))[..., None]


def save_image(path: str | Path, picture: np.ndarray, *, text: Mapping[str, str] | None = None) -> None:
    """Write uint8 (H, W, 3), (H, W, 1) or (H, W) as PNG, atomically; `text` becomes text chunks.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    for name, value in (text or {}).items():
        info.add_itxt(name, value)
    image = to_image(picture)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # another process may write the same file
    try:
        image.save(partial, format="PNG", pnginfo=info, compress_level=COMPRESSION)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def to_image(picture: np.ndarray) -> Image.Image:
    """uint8 (H, W, 3), (H, W, 1) or (H, W) -> Pillow image."""
    return Image.fromarray(picture[..., 0] if picture.ndim == 3 and picture.shape[2] == 1 else picture)


def to_pixels(pictures: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) -> float32 in [-1, 1]."""
    return pictures.astype(np.float32) / 127.5 - 1.0


def to_pictures(pixels: np.ndarray) -> np.ndarray:
    """[-1, 1] -> uint8, rounded and clipped; NaN becomes black."""
    scaled = np.nan_to_num((np.asarray(pixels, dtype=np.float32) + 1.0) * 127.5, nan=0.0, posinf=255.0, neginf=0.0)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def resized(picture: np.ndarray, factor: float) -> np.ndarray:
    """Resize uint8 (H, W, 3) by a factor; sides are rounded, at least 1 pixel."""
    height, width = (max(1, round(side * factor)) for side in picture.shape[:2])
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def covered(picture: np.ndarray, size: tuple[int, int], *, place: float = 0.5) -> np.ndarray:
    """Crop the largest part with the aspect ratio of `size` (height, width) and resize it: (H, W, C) -> (*size, C).

    Args:
        place: position of the part along the cropped side: 0 at the left or top, 1 at the other end.
    """
    return np.array(_covering(to_image(picture), size, place)).reshape(*size, picture.shape[2])


def averaged(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Shrink by averaging: uint8 (H, W, C) -> uint8 (*size, C)."""
    image = to_image(picture).resize((size[1], size[0]), Image.Resampling.BOX)
    return np.array(image).reshape(*size, picture.shape[2])


def strip(pictures: Sequence[np.ndarray], *, gap: int = 0) -> np.ndarray:
    """Concatenate pictures of equal height and channels horizontally, with `gap` white pixels between."""
    white = np.full((pictures[0].shape[0], gap, pictures[0].shape[2]), 255, np.uint8)
    parts = [part for picture in pictures for part in (white, picture)]
    return np.concatenate(parts[1:], axis=1)


def grid(pictures: Sequence[np.ndarray], columns: int, *, gap: int = 2) -> np.ndarray:
    """Arrange pictures of one size in rows of `columns`, with `gap` white pixels between; missing ones are white.

    uint8 (H, W, C) each -> uint8 (rows * H + gaps, columns * W + gaps, C).
    """
    columns = min(columns, len(pictures))
    blank = np.full_like(pictures[0], 255)
    filled = [*pictures, *[blank] * (-len(pictures) % columns)]
    rows = [strip(filled[start : start + columns], gap=gap) for start in range(0, len(filled), columns)]
    return strip([row.transpose(1, 0, 2) for row in rows], gap=gap).transpose(1, 0, 2)


def labelled_rows(rows: Sequence[tuple[str, np.ndarray]], *, gap: int = 4) -> np.ndarray:
    """Stack strips on white, each with a label at the left.

    Args:
        rows: label and uint8 (H, W, 3); widths may differ.
        gap: white pixels around each row.
    """
    font = ImageFont.load_default(size=14)
    margin = max(round(font.getlength(label)) for label, _ in rows) + 2 * gap
    width = margin + max(picture.shape[1] for _, picture in rows) + gap
    height = gap + sum(picture.shape[0] + gap for _, picture in rows)
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    top = gap
    for label, picture in rows:
        draw.text((gap, top + picture.shape[0] // 2), label, fill="black", font=font, anchor="lm")
        canvas.paste(Image.fromarray(picture), (margin, top))
        top += picture.shape[0] + gap
    return np.array(canvas)


def _from_array(source: object, name: str, notes: ImageNotes) -> Image.Image:
    """(H, W) or (H, W, C) -> RGB."""
    try:
        array = np.asarray(source)
    except (TypeError, ValueError, RuntimeError):
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf":
        raise ImageError(f"{name} is {_kind(source)}; pass a file name, a Pillow image or an array of numbers")
    if array.ndim not in (2, 3) or not array.size or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise ImageError(f"{name} is an array {array.shape}; expected (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    if array.dtype.kind == "b":
        array = array * np.uint8(255)
    elif array.dtype == np.uint16:
        array = eight_bits(array)
    elif array.dtype != np.uint8:
        array = _rounded(array.astype(np.float64), name)
    return to_rgb(Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array), name, notes)


def _rounded(array: np.ndarray, name: str) -> np.ndarray:
    """Round numbers in [0, 255] to uint8."""
    if not np.isfinite(array).all():
        raise ImageError(f"{name} has infinite or NaN values; expected [0, 255]")
    least, most = array.min(), array.max()
    if least < 0 or most > 255:
        raise ImageError(f"{name} is in [{least:.3g}, {most:.3g}]; expected [0, 255]")
    if 0 < most <= 1:
        raise ImageError(f"{name} is in [{least:.3g}, {most:.3g}]; expected [0, 255], so multiply by 255")
    return np.rint(array).astype(np.uint8)


def _kind(source: object) -> str:
    return f"a {type(source).__name__}" if not isinstance(source, np.ndarray) else f"an array of {source.dtype}"


def _covering(image: Image.Image, size: tuple[int, int], place: float) -> Image.Image:
    """See `covered`; crops and resizes in one resampling."""
    height, width = size
    scale = min(image.height / height, image.width / width)
    part_height, part_width = min(height * scale, image.height), min(width * scale, image.width)
    top, left = (image.height - part_height) * place, (image.width - part_width) * place
    right, bottom = min(left + part_width, image.width), min(top + part_height, image.height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, right, bottom))
