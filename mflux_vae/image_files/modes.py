"""Pillow images of any mode -> RGB in sRGB, or grey levels of a mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from mflux_vae.errors import ImageError
from mflux_vae.image_files import notes as kinds
from mflux_vae.image_files.colour import ProfileError, read_profile, to_srgb
from mflux_vae.image_files.notes import ImageNotes

_GREY = ("1", "L", "LA", "La")


def eight_bits(levels: np.ndarray) -> np.ndarray:
    """[0, 65535] -> uint8, rounded."""
    return np.clip(np.rint(levels.astype(np.float64) / 257.0), 0, 255).astype(np.uint8)


def to_rgb(image: Image.Image, name: str | Path, notes: ImageNotes, *, profile: bytes | None = None) -> Image.Image:
    """Convert an image to RGB in sRGB, transparency over white.

    Args:
        name: for errors and notes.
        profile: its ICC profile; None for sRGB. A profile that cannot be used is noted.

    Raises:
        ImageError: floating-point numbers, or a mode that Pillow does not convert.
    """
    colours, opacity = _separated(image, name)
    if colours.mode == "I" and (np.asarray(colours) != np.clip(np.asarray(colours), 0, 65535)).any():
        notes.add(kinds.CLIPPED, name)
    if profile is not None:
        colours = _in_srgb(colours, profile, name, notes)
    elif colours.mode == "CMYK":
        notes.add(kinds.INKS, name)
    rgb = _plain(colours).convert("RGB")
    if opacity is None:
        return rgb
    if opacity.getextrema()[0] != 255:
        notes.add(kinds.TRANSPARENT, name)
    return _over(rgb, opacity, "white")


def to_levels(image: Image.Image, name: str | Path) -> Image.Image:
    """Convert a mask to grey levels (L), transparency as black. Its colour profile does not matter."""
    colours, opacity = _separated(image, name)
    rgb = _plain(colours).convert("RGB")
    return (rgb if opacity is None else _over(rgb, opacity, "black")).convert("L")


def _separated(image: Image.Image, name: str | Path) -> tuple[Image.Image, Image.Image | None]:
    """Colours of mode L, RGB, CMYK, LAB or I..., and opacity (L) or None."""
    if image.mode == "F":
        raise ImageError(f"{name} has floating-point values of unknown range; save it as an 8-bit PNG")
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):
        if not isinstance(transparent, int):
            return image, None
        return image, Image.fromarray(np.where(np.asarray(image) == transparent, 0, 255).astype(np.uint8))
    if not {"A", "a"} & {*image.getbands()} and transparent is None:
        plain = image.mode in ("L", "RGB", "CMYK", "LAB")
        return image if plain else image.convert("L" if image.mode in _GREY else "RGB"), None
    if image.mode == "La":  # not converted to RGBA at once
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    colours = rgba.getchannel("R") if image.mode in _GREY else rgba.convert("RGB")
    return colours, rgba.getchannel("A")


def _plain(image: Image.Image) -> Image.Image:
    """16 bits -> 8 bits; Pillow's conversion would clip everything above 255 to white."""
    return Image.fromarray(eight_bits(np.asarray(image))) if image.mode.startswith("I") else image


def _in_srgb(image: Image.Image, profile: bytes, name: str | Path, notes: ImageNotes) -> Image.Image:
    """Convert by a profile; unchanged if that is sRGB or cannot be used."""
    try:
        opened = read_profile(profile)
        if opened.mode == "RGB" and image.mode not in ("CMYK", "LAB"):
            image = _plain(image).convert("RGB")
        elif opened.mode == "L" and image.mode.startswith("I"):
            image = Image.fromarray(np.clip(np.asarray(image), 0, 65535).astype(np.uint16))
        elif opened.mode != image.mode:
            raise ProfileError(f"it describes {opened.mode}, the image is {image.mode}")
        converted = to_srgb(image, opened)
    except ProfileError as error:
        notes.add(kinds.BROKEN_PROFILE, name, str(error))
        return image
    if opened.transform is not None:
        notes.add(kinds.CONVERTED, name, opened.name)
    return converted


def _over(rgb: Image.Image, opacity: Image.Image, background: str) -> Image.Image:
    rgba = rgb.copy()
    rgba.putalpha(opacity)
    return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")
