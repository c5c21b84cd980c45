"""A comparison as people see it: names for models, a table, a sheet of pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mflux_vae.compare.codecs import Codec
from mflux_vae.compare.labels import caption
from mflux_vae.compare.measuring import error_map
from mflux_vae.errors import SettingsError
from mflux_vae.images import labelled_rows, strip

USUAL_SIZE = 256
SMALLEST_PANEL = 160
"""Pixels; smaller pictures are enlarged on the sheet, by whole numbers."""

_TELL_NOTHING = {"best_model", "last_model", "diffusion_pytorch_model", "model", "vae"}
"""How files and folders are called whatever is in them."""

_GAP = 4


def names(sources: Sequence[str]) -> list[str]:
    """A name for each model: the end of its path, as much of it as tells it from the others."""
    paths = [Path(source) for source in sources]
    parts = [[*path.parts[:-1], path.stem if path.is_file() else path.name] for path in paths]
    parts = [whole[:-1] if len(whole) > 1 and whole[-1] in _TELL_NOTHING else whole for whole in parts]
    taken = [1] * len(parts)
    while True:
        found = ["/".join(whole[-count:]) for whole, count in zip(parts, taken, strict=True)]
        alike = [i for i, name in enumerate(found) if found.count(name) > 1 and taken[i] < len(parts[i])]
        if not alike:
            break
        for i in alike:
            taken[i] += 1
    # the same model twice
    return [
        name if found.count(name) == 1 else f"{name} ({found[: i + 1].count(name)})" for i, name in enumerate(found)
    ]


def size_of(codecs: Sequence[Codec], asked: int | None) -> int:
    """Side of the squares to compare on: as asked, or the largest that a model is for where all know one only, or 256.

    Raises:
        SettingsError: no positive number.
    """
    if asked is not None:
        if asked < 1:
            raise SettingsError(f"--size must be positive, not {asked}")
        return asked
    own = [codec.side for codec in codecs]
    return max(side for side in own if side) if own and all(own) else USUAL_SIZE


def notes(summary: Mapping[str, Any], size: int) -> list[str]:
    """What has to be known about a model's numbers, as sentences."""
    told = [summary["note"]] if summary["note"] else []
    if summary["image_size"] not in (None, size):
        told.append(f"pictures are brought to {summary['image_size']} pixels and back")
    if summary["channels"] == 1:
        told.append("it knows one channel: brightness is compared")
    return told


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """A column for each model."""
    rows = [("", [summary["name"] for summary in summaries])]
    for title, show in _ROWS.items():
        cells = [show(summary) for summary in summaries]
        if any(cell != "-" for cell in cells):
            rows.append((title, cells))
    titles = max(len(title) for title, _ in rows)
    widths = [max(len(cells[i]) for _, cells in rows) for i in range(len(summaries))]
    return "\n".join(
        "  ".join([f"{title:{titles}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))])
        for title, cells in rows
    )


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def _dead(latent: Mapping[str, Any]) -> str:
    return "-" if latent["dead"] is None else f"{latent['dead']} of {latent['channels']}"


_ROWS = {
    "kind": lambda of: of["kind"],
    "parameters": lambda of: f"{of['parameters']:,}",
    "latents": lambda of: of["latent"]["shape"],
    "compression": lambda of: f"{_number(of['latent']['compression'], 0)} : 1",
    "MSE / levels²": lambda of: _number(of["mse"], 1),
    "PSNR / dB": lambda of: _number(of["psnr"], 2),
    "SSIM": lambda of: _number(of["ssim"], 4),
    "LPIPS": lambda of: _number(of.get("lpips"), 4),
    "KL / nats": lambda of: _number(of["kl"], 1),
    "latents' mean": lambda of: _number(of["latent"]["mean"], 3),
    "latents' deviation": lambda of: _number(of["latent"]["std"], 3),
    "latents' range": lambda of: f"{of['latent']['min']:.2f} to {of['latent']['max']:.2f}",
    "dead channels": lambda of: _dead(of["latent"]),
    "encode / ms": lambda of: _number(of["encode_ms"], 1),
    "decode / ms": lambda of: _number(of["decode_ms"], 1),
}


def sheet(
    rows: Sequence[tuple[str, np.ndarray, Sequence[np.ndarray]]], summaries: Sequence[Mapping[str, Any]], amplify: float
) -> np.ndarray:
    """Pictures and what models made of them side by side, and below these where they differ.

    Args:
        rows: name, picture (S, S, 3), and each model's reconstruction of it.
        summaries: of the models, for the captions.
        amplify: the differences.
    """
    side = rows[0][1].shape[0]
    factor = max(1, math.ceil(SMALLEST_PANEL / side))
    blank = np.full((side, side, 3), 255, np.uint8)
    titles = [("pictures", ""), *((of["name"], f"{of['psnr']:.2f} dB, SSIM {of['ssim']:.3f}") for of in summaries)]
    shown = [("", strip([caption(lines, side * factor) for lines in titles], gap=_GAP))]
    for name, picture, again in rows:
        errors = [error_map(picture, one, amplify) for one in again]
        for label, panels in ((name, [picture, *again]), (f"difference x {amplify:g}", [blank, *errors])):
            enlarged = [panel.repeat(factor, axis=0).repeat(factor, axis=1) for panel in panels]
            shown.append((label, strip(enlarged, gap=_GAP)))
    return labelled_rows(shown, gap=_GAP)
