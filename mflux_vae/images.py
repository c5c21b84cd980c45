"""Picture files <-> arrays, and grids of pictures. The only file that knows Pillow.

Pictures are uint8 arrays (H, W, 3), RGB; networks take (B, H, W, 3) in [-1, 1].
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from mflux_vae.errors import ImageError

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""File names that count as pictures, in any case."""


def find_images(folder: str | Path) -> tuple[list[Path], int]:
    """The pictures of a folder, sorted by name, and the number of other files there.

    Hidden files are no pictures, whatever they are called; folders are not counted.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise ImageError(f"{folder} {what}: give a folder of pictures")
    files = sorted((path for path in folder.iterdir() if path.is_file()), key=lambda path: path.name)
    images = [path for path in files if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")]
    return images, len(files) - len(images)


def load_image(path: str | Path, *, resolution: int | None = None) -> np.ndarray:
    """One picture as RGB: upright by its EXIF orientation, transparency over white, 16-bit grey in 8 bits.

    Args:
        resolution: with it, the short side is resized to this many pixels and the centre square is kept.

    Returns:
        uint8 (H, W, 3), or (resolution, resolution, 3).

    Raises:
        ImageError: the file is missing, broken, cut short, or of a kind without a defined brightness.
    """
    try:
        with Image.open(path) as opened:
            image = _to_rgb(ImageOps.exif_transpose(opened), path)
    except FileNotFoundError:
        raise ImageError(f"{path} does not exist") from None
    except UnidentifiedImageError:
        raise ImageError(f"{path} is not a picture that can be read: remove or replace it") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path} cannot be read ({_one_line(error)}): remove or replace it") from error
    if resolution is not None:
        image = _centre_square(image, resolution)
    return np.array(image)


def save_image(path: str | Path, picture: np.ndarray, *, text: Mapping[str, str] | None = None) -> None:
    """Writes uint8 (H, W, 3) as PNG, whole or not at all; `text` becomes PNG text chunks."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    info = PngInfo()
    for name, value in (text or {}).items():
        info.add_itxt(name, value)
    partial = path.with_name(f".{path.name}.partial")
    Image.fromarray(picture).save(partial, format="PNG", pnginfo=info)
    os.replace(partial, path)


def image_text(path: str | Path) -> dict[str, str]:
    """The text chunks of a PNG file; empty for any other file."""
    try:
        with Image.open(path) as image:
            return {str(name): str(value) for name, value in getattr(image, "text", {}).items()}
    except (OSError, SyntaxError, ValueError) as error:
        raise ImageError(f"{path} cannot be read ({_one_line(error)}): remove or replace it") from error


def to_pixels(pictures: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) -> float32 in [-1, 1]."""
    return pictures.astype(np.float32) / 127.5 - 1.0


def to_pictures(pixels: np.ndarray) -> np.ndarray:
    """[-1, 1] -> uint8, rounded; values outside are clipped and NaN becomes black."""
    scaled = np.nan_to_num((np.asarray(pixels, dtype=np.float32) + 1.0) * 127.5, nan=0.0, posinf=255.0, neginf=0.0)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def resized(picture: np.ndarray, factor: float) -> np.ndarray:
    """uint8 (H, W, 3) -> both sides times `factor`, rounded, at least one pixel."""
    height, width = (max(1, round(side * factor)) for side in picture.shape[:2])
    return np.array(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))


def strip(pictures: Sequence[np.ndarray], *, gap: int = 0) -> np.ndarray:
    """Pictures of equal size side by side, with `gap` white pixels in between."""
    white = np.full((pictures[0].shape[0], gap, 3), 255, np.uint8)
    parts = [part for picture in pictures for part in (white, picture)]
    return np.concatenate(parts[1:], axis=1)


def labelled_rows(rows: Sequence[tuple[str, np.ndarray]], *, gap: int = 4) -> np.ndarray:
    """Strips below each other on white, each with its label at the left.

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


def _to_rgb(image: Image.Image, path: str | Path) -> Image.Image:
    """Any Pillow mode -> RGB."""
    if image.mode == "F":
        raise ImageError(f"{path} holds floating-point numbers without a range: save it as an 8-bit PNG")
    if image.mode.startswith("I"):
        # Pillow's own conversion would clip everything above 255 to white.
        levels = np.asarray(image).astype(np.float64) / 257.0
        return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _centre_square(image: Image.Image, resolution: int) -> Image.Image:
    """The centre square at the given size: the short side resized, then cropped, in one resampling."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS, box=box)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
