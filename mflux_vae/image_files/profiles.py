"""ICC profiles of spaces that an image names without embedding one."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

D65 = (0.3127, 0.3290)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
_REC_2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046))

SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
"""g, a, b, c, d: (a x + b)^g from d on, c x below."""

_REC_709_CURVE = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)

_D50 = np.array([0.9642, 1.0, 0.8249])
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])

_CODED_PRIMARIES = {1: SRGB, 9: _REC_2020, 12: DISPLAY_P3}
_CODED_CURVES = {
    **dict.fromkeys((1, 6, 14, 15), _REC_709_CURVE),
    4: (2.2,),
    8: (1.0,),
    13: SRGB_CURVE,
}
"""Numbers of ITU-T H.273. HDR curves (16, 18) have no counterpart in sRGB."""

_SRGB_EXPONENTS = (0.44, 0.465)
"""gAMA of files in sRGB, usually 0.45455."""

_EXPONENTS = (0.2, 2.0)


@lru_cache
def matrix_profile(
    name: str,
    primaries: Sequence[tuple[float, float]],
    curve: Sequence[float],
    *,
    white: tuple[float, float] = D65,
) -> bytes:
    """An ICC 4 display profile.

    Args:
        primaries, white: chromaticities x, y.
        curve: exponent of the decoding function, or the five numbers of `SRGB_CURVE`.
    """
    colorants = np.array([_xyz(*point) for point in primaries]).T
    target = _xyz(*white)
    colorants = colorants * np.linalg.solve(colorants, target)
    cones = np.diag(_BRADFORD @ _D50 / (_BRADFORD @ target))
    colorants = np.linalg.solve(_BRADFORD, cones @ _BRADFORD) @ colorants
    shape = struct.pack(">4s4xHH", b"para", 3 if len(curve) == 5 else 0, 0) + _fixed(curve)
    text = name.encode("utf-16-be")
    named = struct.pack(">4s4xII4sII", b"mluc", 1, 12, b"enUS", len(text), 28) + text
    tags = {b"desc": named, b"cprt": named, b"wtpt": b"XYZ \0\0\0\0" + _fixed(_D50)}
    for letter, colorant in zip((b"r", b"g", b"b"), colorants.T, strict=True):
        tags[letter + b"XYZ"] = b"XYZ \0\0\0\0" + _fixed(colorant)
        tags[letter + b"TRC"] = shape
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        table += struct.pack(">4sII", tag, start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(
        ">I4xI4s4s4s12x4s28x", start + len(body), 0x04000000, b"mntr", b"RGB ", b"XYZ ", b"acsp"
    ) + _fixed(_D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def adobe_rgb() -> bytes:
    """Adobe RGB (1998)."""
    return matrix_profile("Adobe RGB (1998)", ADOBE_RGB, (563 / 256,))


def coded(primaries: int, curve: int) -> bytes | None:
    """The profile of two numbers of ITU-T H.273, as a PNG's cICP chunk has them; None if it has no counterpart."""
    if primaries not in _CODED_PRIMARIES or curve not in _CODED_CURVES:
        return None
    name = {12: "Display P3", 9: "Rec. 2020"}.get(primaries, "Rec. 709")
    return matrix_profile(name, _CODED_PRIMARIES[primaries], _CODED_CURVES[curve])


def stated(exponent: float | None, points: Sequence[float] | None) -> bytes | None:
    """The profile of a PNG's gAMA and cHRM chunks; None if they state no plausible one.

    Args:
        exponent: of the encoding function.
        points: x and y of white, red, green and blue.
    """
    curve: Sequence[float] = SRGB_CURVE
    if exponent is not None and not _SRGB_EXPONENTS[0] <= exponent <= _SRGB_EXPONENTS[1]:
        if not _EXPONENTS[0] <= exponent <= _EXPONENTS[1]:
            return None
        curve = (1 / exponent,)
    if points is None:
        return matrix_profile("gamma", SRGB, curve)
    if not all(0 <= value <= 1 for value in points) or min(points[1::2]) <= 0:
        return None
    white, *primaries = zip(points[::2], points[1::2], strict=True)
    try:
        return matrix_profile("primaries", tuple(primaries), curve, white=white)
    except np.linalg.LinAlgError:
        return None


def _xyz(x: float, y: float) -> np.ndarray:
    return np.array([x / y, 1.0, (1 - x - y) / y])


def _fixed(values: Sequence[float] | np.ndarray) -> bytes:
    """Numbers with 16 bits before and after the point."""
    return b"".join(struct.pack(">i", round(max(-32768.0, min(32767.0, float(value))) * 65536)) for value in values)
