"""Findings as text and as JSON."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mflux_vae.utils.formatting import count_text, short_name, shortened
from mflux_vae.utils.paths import printable
from mflux_vae_train.dreambooth.inspection.findings import Findings, ImageFinding

ROWS = 40
"""Images in the table, those with remarks first."""

_NAME, _CAPTION = 28, 48


def text(findings: Findings, assumed: Sequence[str]) -> Iterator[str]:
    """Yield lines, errors first.

    Args:
        assumed: see `settings.assumptions`.
    """
    for error in findings.errors:
        yield f"error: {error}"
    resolution = findings.dataset.resolution
    lines = findings.dataset.summary(findings.settings.subjects)
    yield from (line for line in lines if not line.startswith("shapes: "))  # `_crops` has more of them
    yield from assumed
    for one in findings.settings.subjects:
        given = f"class prompt {one.class_prompt!r}" if one.class_prompt else "no prior preservation"
        yield f"prompt {one.instance_prompt!r}, {given}"
    for folder in findings.class_folders:
        yield f"class images in {folder.folder}: {folder.present} present, {len(folder.missing)} to generate"
    if findings.images:
        sizes = sorted((one.image.size for one in findings.images), key=lambda size: size[0] * size[1])
        yield (
            f"sizes: {_size(sizes[0])} to {_size(sizes[-1])}, trained at"
            f" {'about ' if len(_shapes(findings)) > 1 else ''}{resolution}x{resolution}"
        )
        yield from _crops(findings)
        yield ""
        yield from _table(findings.images, captions=_are_different(findings))
    if findings.warnings:
        yield ""
    for line in findings.warnings:
        yield f"warning: {line}"


def as_json(findings: Findings, assumed: Sequence[str], sheet: Path | None) -> dict[str, Any]:
    """The same and more: captions, and all files that are not used."""
    return {
        "errors": [str(error) for error in findings.errors],
        "warnings": list(findings.warnings),
        "notes": [*assumed, *findings.dataset.notes],
        "resolution": findings.dataset.resolution,
        "subjects": [
            {"folder": one.instance_data_dir, "prompt": one.instance_prompt, "class_prompt": one.class_prompt}
            for one in findings.settings.subjects
        ],
        "images": [_row(one) for one in findings.images],
        "duplicates": [list(pair) for pair in findings.duplicates],
        "unused": {
            str(folder.folder): {
                f"{reason.noun} {reason.tail}".strip(): list(map(printable, names))
                for reason, names in folder.unused.items()
            }
            for folder in findings.dataset.folders
        },
        "class_images": [
            {"folder": str(one.folder), "present": one.present, "missing": len(one.missing)}
            for one in findings.class_folders
        ],
        "sheet": None if sheet is None else str(sheet),
    }


def _row(finding: ImageFinding) -> dict[str, Any]:
    image = finding.image
    return {
        "file": printable(image.path),
        "size": list(image.size),
        "trained_size": list(finding.crop.shape),
        "crops": len(image.crops),
        "kept": round(finding.kept, 4),
        "enlarged": round(finding.enlarged, 4),
        "caption": image.caption,
        "mask": None if image.mask is None else {"file": printable(image.mask), "weight": finding.mask},
        "remarks": list(finding.remarks),
    }


def _shapes(findings: Findings) -> Counter[tuple[int, int]]:
    return Counter(one.crop.shape for one in findings.images)


def _crops(findings: Findings) -> Iterator[str]:
    """What crops keep: one line, or a line for each shape."""
    groups: dict[tuple[int, int], list[ImageFinding]] = defaultdict(list)
    for one in findings.images:
        groups[one.crop.shape].append(one)
    for shape, images in sorted(groups.items()):
        least = min(images, key=lambda one: one.kept)
        count = "" if len(groups) == 1 else f"{_size(shape):>9} {count_text(len(images), 'image')}: "
        each = "each crop" if any(len(one.image.crops) > 1 for one in images) else "the crop"
        mean = sum(one.kept for one in images) / len(images)
        keeps = f"{mean:.0%} of an image on average, least {least.kept:.0%}"
        yield f"{count}{each} keeps {keeps} ({short_name(least.name)})"


def _are_different(findings: Findings) -> bool:
    return len({one.image.caption for one in findings.images}) > len(findings.settings.subjects)


def _table(images: Sequence[ImageFinding], *, captions: bool) -> Iterator[str]:
    rows = list(images)
    if len(rows) > ROWS:
        rows = sorted(rows, key=lambda one: not one.remarks)[:ROWS]
    width = min(_NAME, max(len(one.name) for one in rows))
    for one in rows:
        cells = [
            f"{shortened(short_name(one.name), width):{width}}",
            f"{_size(one.image.size):>9}",
            f"{one.kept:>4.0%}",
        ]
        if captions:
            cells.append(f"{shortened(repr(one.image.caption), _CAPTION):{_CAPTION}}")
        yield "  ".join(
            [*cells, "; ".join([*([] if one.mask is None else [f"mask {one.mask:.0%}"]), *one.remarks])]
        ).rstrip()
    if len(images) > len(rows):
        yield f"and {count_text(len(images) - len(rows), 'image')} more (--json lists all)"


def _size(size: tuple[int, int]) -> str:
    """Width x height."""
    return f"{size[1]}x{size[0]}"
