"""Convert images with a colour profile to sRGB."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from mflux_vae.image_files.container import MAX_PROFILE

_TOLERANCE = 2
"""Levels by which a profile that counts as sRGB may differ from it."""

_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
"""Colour spaces of profiles, and the modes of their images."""

_NAME_LENGTH = 40

_NO_OPTIMIZATION = 0x0100
"""A flag of lcms2, whose optimization of grey is off by 10 levels in shadows."""


class ProfileError(ValueError):
    """A profile that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """
    Attributes:
        name: its description.
        mode: mode of the images that it describes: "RGB", "L" or "CMYK".
        transform: from `mode` to RGB in sRGB; None if the profile is that of sRGB.
    """

    name: str
    mode: str
    transform: ImageCms.ImageCmsTransform | None


@lru_cache(maxsize=8)
def read_profile(content: bytes) -> Profile:
    """Read an ICC profile.

    Raises:
        ProfileError: it is broken, of another kind, or maps grey to colours.
    """
    if not 128 < len(content) <= MAX_PROFILE:
        raise ProfileError("it is cut" if len(content) <= 128 else "it is too long")
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(content))
        mode = _SPACES.get(opened.profile.xcolor_space.strip())
        name = (opened.profile.profile_description or "").strip("\0 \n")
        if mode is None:
            raise ProfileError(f"it describes {opened.profile.xcolor_space.strip()}")
        flags: Any = _NO_OPTIMIZATION if mode == "L" else 0
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), mode, "RGB", flags=flags)
        assert isinstance(transform, ImageCms.ImageCmsTransform)
        same = mode != "CMYK" and _is_identity(transform, mode)
    except ProfileError:
        raise
    except Exception as error:  # Pillow raises many kinds
        raise ProfileError(str(error)) from error
    name = "".join(letter if letter.isprintable() else " " for letter in name)[:_NAME_LENGTH] or "an unnamed profile"
    return Profile(name=name, mode=mode, transform=None if same else transform)


def to_srgb(image: Image.Image, profile: Profile) -> Image.Image:
    """Convert the colours of an image of mode L, RGB, CMYK or I;16 (uint16) to RGB in sRGB; opacity is not kept."""
    if profile.transform is None:
        return image
    if profile.mode == "L":
        levels = _apply(profile.transform, Image.fromarray(np.arange(256, dtype=np.uint8)[None]))[0]
        grey = np.asarray(image)
        if grey.dtype == np.uint8:
            return Image.fromarray(levels[grey].astype(np.uint8))
        fine = [np.interp(grey.astype(np.float64) / 257, np.arange(256), band) for band in levels.T.astype(np.float64)]
        return Image.fromarray(np.rint(np.stack(fine, axis=-1)).astype(np.uint8))
    converted = ImageCms.applyTransform(image, profile.transform)
    assert converted is not None
    return converted


def _apply(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> np.ndarray:
    return np.asarray(transform.apply(image)).astype(np.int64)


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether a transform changes colours by up to `_TOLERANCE` levels.

    Raises:
        ProfileError: greys do not stay grey and in order, as they do with every camera, screen and working space.
    """
    ramp = np.arange(256, dtype=np.uint8)
    greys = _apply(transform, Image.fromarray(ramp[None] if mode == "L" else np.stack([ramp] * 3, axis=-1)[None]))[0]
    rising = (np.diff(greys, axis=0) >= -1).all()
    if not rising or np.ptp(greys, axis=1).max() > 24 or greys[0].max() > 48 or greys[-1].min() < 208:
        raise ProfileError("it maps grey to other colours")
    if mode == "L":
        return np.abs(greys - ramp[:, None]).max() <= _TOLERANCE
    axis = np.linspace(0, 255, 9).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(axis, axis, axis), axis=-1).reshape(1, -1, 3)
    different = np.abs(_apply(transform, Image.fromarray(colours)) - colours).max()
    return max(different, np.abs(greys - ramp[:, None]).max()) <= _TOLERANCE
