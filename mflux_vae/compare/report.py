"""Present a comparison: model names, table, contact sheet."""

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

DEFAULT_SIZE = 256
MIN_PANEL = 160
"""Pixels; smaller images are enlarged by whole factors."""

_GENERIC_NAMES = {"best_model", "last_model", "diffusion_pytorch_model", "model", "vae"}
"""File and folder names that do not identify a model."""

_GAP = 4


def names(sources: Sequence[str]) -> list[str]:
    """Name each model by the shortest unique end of its path."""
    paths = [Path(source) for source in sources]
    parts = [[*path.parts[:-1], path.stem if path.is_file() else path.name] for path in paths]
    parts = [whole[:-1] if len(whole) > 1 and whole[-1] in _GENERIC_NAMES else whole for whole in parts]
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


def size_of(codecs: Sequence[Codec], requested: int | None) -> int:
    """Side of the squares to compare on: as requested, or the largest fixed size if all models have one, else 256.

    Raises:
        SettingsError: not positive.
    """
    if requested is not None:
        if requested < 1:
            raise SettingsError(f"--size must be positive, not {requested}")
        return requested
    sides = [codec.side for codec in codecs]
    return max(side for side in sides if side) if sides and all(sides) else DEFAULT_SIZE


def notes(summary: Mapping[str, Any], size: int) -> list[str]:
    """Remarks on the numbers of a model."""
    remarks = [summary["note"]] if summary["note"] else []
    if summary["image_size"] not in (None, size):
        remarks.append(f"images are resized to {summary['image_size']} pixels and back")
    if summary["channels"] == 1:
        remarks.append("it has one channel: brightness is compared")
    return remarks


def table(summaries: Sequence[Mapping[str, Any]]) -> str:
    """Format a table with a column per model."""
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
    "kind": lambda row: row["kind"],
    "parameters": lambda row: f"{row['parameters']:,}",
    "latents": lambda row: row["latent"]["shape"],
    "compression": lambda row: f"{_number(row['latent']['compression'], 0)} : 1",
    "MSE / levels²": lambda row: _number(row["mse"], 1),
    "PSNR / dB": lambda row: _number(row["psnr"], 2),
    "SSIM": lambda row: _number(row["ssim"], 4),
    "LPIPS": lambda row: _number(row.get("lpips"), 4),
    "KL / nats": lambda row: _number(row["kl"], 1),
    "latent mean": lambda row: _number(row["latent"]["mean"], 3),
    "latent std": lambda row: _number(row["latent"]["std"], 3),
    "latent range": lambda row: f"{row['latent']['min']:.2f} to {row['latent']['max']:.2f}",
    "dead channels": lambda row: _dead(row["latent"]),
    "encode / ms": lambda row: _number(row["encode_ms"], 1),
    "decode / ms": lambda row: _number(row["decode_ms"], 1),
}


def sheet(
    rows: Sequence[tuple[str, np.ndarray, Sequence[np.ndarray]]], summaries: Sequence[Mapping[str, Any]], amplify: float
) -> np.ndarray:
    """Contact sheet: images and reconstructions side by side, differences below.

    Args:
        rows: name, image (S, S, 3), reconstructions.
        summaries: `Candidate.summary` of each model, for the labels.
        amplify: factor of the differences.
    """
    side = rows[0][1].shape[0]
    factor = max(1, math.ceil(MIN_PANEL / side))
    blank = np.full((side, side, 3), 255, np.uint8)
    titles = [("images", ""), *((of["name"], f"{of['psnr']:.2f} dB, SSIM {of['ssim']:.3f}") for of in summaries)]
    shown = [("", strip([caption(lines, side * factor) for lines in titles], gap=_GAP))]
    for name, picture, again in rows:
        errors = [error_map(picture, one, amplify) for one in again]
        for label, panels in ((name, [picture, *again]), (f"difference x {amplify:g}", [blank, *errors])):
            enlarged = [panel.repeat(factor, axis=0).repeat(factor, axis=1) for panel in panels]
            shown.append((label, strip(enlarged, gap=_GAP)))
    return labelled_rows(shown, gap=_GAP)
