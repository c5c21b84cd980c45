"""A run's report.html: previews, curves, training images, settings and log."""

from __future__ import annotations

import dataclasses
import logging
import platform
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae.image_files.notes import ImageNotes
from mflux_vae.images import load_image
from mflux_vae.utils.formatting import size_text
from mflux_vae.weights.formats.files import write_text
from mflux_vae_train.dreambooth.data.class_images import find_class_images
from mflux_vae_train.dreambooth.data.dataset import InstanceImage
from mflux_vae_train.dreambooth.planning.prepare import Preparation
from mflux_vae_train.dreambooth.reporting import preview_grid
from mflux_vae_train.dreambooth.reporting.charts import charts
from mflux_vae_train.dreambooth.reporting.evaluation_section import evaluation_section
from mflux_vae_train.dreambooth.reporting.held_out import HeldOutLosses, held_out_losses
from mflux_vae_train.dreambooth.run_folder import RunFolder
from mflux_vae_train.monitoring.progress import duration
from mflux_vae_train.monitoring.report.charts import format_number
from mflux_vae_train.monitoring.report.curves import smoothed
from mflux_vae_train.monitoring.report.page import PageHeader, Section, image_element, page, table
from mflux_vae_train.settings.origins import unused_of
from mflux_vae_train.training.hooks import peak_memory, read_metrics

logger = logging.getLogger(__name__)

PREVIEW_SIDE, THUMBNAIL_SIDE = 384, 192
"""Largest side of images in the page, in pixels."""

MAX_THUMBNAILS = 24
MAX_LOG_LINES = 500

LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d),\d+ ([A-Z]+) (.*)")


class Report:
    """Writes the page as often as it is called. Errors are logged and do not end the run."""

    def __init__(self, pipeline_name: str, run: Preparation, folder: RunFolder) -> None:
        self._pipeline_name, self._run, self._folder = pipeline_name, run, folder
        self._previews: dict[tuple[Path, int], list[list[str]]] = {}  # images as HTML, by file and time
        self._thumbnails: dict[Path, str] = {}

    def write(self, state: str, *, update: int, note: str = "", expected: float = 0.0) -> None:
        """
        Args:
            state: running, finished or stopped.
            update: number of updates made.
            note: a few words about the state, such as the time left or the error.
            expected: of a running run, see `PageHeader`.
        """
        try:
            write_text(self._folder.report, self._page(state, update, note, expected))
        except Exception as error:  # a deleted image or a full disk must not end hours of training
            logger.warning("%s was not written (%s: %s)", self._folder.report, type(error).__name__, error)

    def _page(self, state: str, update: int, note: str, expected: float) -> str:
        run, folder, total = self._run, self._folder, self._run.resolved.max_train_steps
        resolved, records = run.resolved, read_metrics(folder.metrics)
        trained = "LoRA" if resolved.train_mode == "lora" else "all weights"
        header = PageHeader(
            kind=f"DreamBooth on {self._pipeline_name}",
            title=" · ".join(concept.instance_prompt for concept in resolved.subjects),
            about=f"{trained}, {len(run.dataset.images)} images, in {folder.root}",
            state=(state, note or f"after update {update} of {total}"),
            progress=update / total,
            stats=_figures(records, update, total),
            written=time.time(),
            expected=expected,
        )
        unused = [*unused_of(resolved.given), *resolved.warnings]
        sections = [
            ("previews", "Previews", self._preview_section(), "Each row starts from the same noise."),
            ("curves", "Training curves", charts(records, resolved.max_grad_norm, total), ""),
            ("data", "Training images", self._data_section(), ""),
            ("unused", "Not used, cut or changed", _list(unused), "Also what is unusual."),
            ("settings", "Settings", self._settings_section, "Bold: not the default."),
            ("log", "Log", _log_section(folder.log), ""),
        ]
        shown = [Section(name=n, title=title, body=body, note=note) for n, title, body, note in sections]
        return page(header, [*shown[:2], evaluation_section(folder.root), *shown[2:]])

    # images

    def _preview_section(self) -> str:
        """Per prompt: a row with a slider over time, then all rows below the subject."""
        columns = self._run.resolved.num_validation_images
        files = preview_grid.previews(self._folder.samples) if columns else []
        if not files:
            return ""
        sheets = [(preview_grid.label(update), self._preview_rows(path, columns)) for update, path in files]
        subject = [self._thumbnail(image) for image in self._run.dataset.images[:columns]]
        parts = []
        for index, prompt in enumerate(self._run.resolved.validation_prompt):
            rows = [(label, rows[index]) for label, rows in sheets if index < len(rows)]
            last = len(rows) - 1
            parts.append(
                f'<h3 class="prompt">{escape(prompt)}</h3><div style="--columns:{columns}">'
                f'<div class="scene" data-of="{index}">'
                f'<div class="row">{"".join(rows[last][1])}</div><div class="scrub" hidden>'
                f'<input type="range" min="0" max="{last}" value="{last}" step="1" autocomplete="off"'
                f' aria-label="update of the preview">'
                f"<output>{escape(rows[last][0])}</output></div></div>"
                f'<div class="times" data-prompt="{index}">{_row("subject", subject, css_class="time subject")}'
                f"{''.join(_row(label, row) for label, row in rows)}</div></div>"
            )
        return "".join(parts)

    def _preview_rows(self, path: Path, columns: int) -> list[list[str]]:
        """The images of a preview file as HTML: one list per prompt."""
        key = path, path.stat().st_mtime_ns  # a resumed run may write a preview again
        if key not in self._previews:
            label = preview_grid.label(int(path.stem.removeprefix("step-")))
            self._previews[key] = [
                [
                    image_element(one, largest=PREVIEW_SIDE, caption=f"{label}, {i}")
                    for i, one in enumerate(row, start=1)
                ]
                for row in preview_grid.split_preview(path, columns=columns)
            ]
        return self._previews[key]

    def _data_section(self) -> str:
        resolved, parts = self._run.resolved, []
        for index, concept in enumerate(resolved.subjects):
            prompt = concept.instance_prompt
            for of_all, what in ((self._run.dataset.images, "images"), (self._run.dataset.held_out, "held out")):
                images = [image for image in of_all if image.concept == index]
                figures = [
                    _figure(self._thumbnail(one), one.path.name, one.caption if one.caption != prompt else "")
                    for one in images[:MAX_THUMBNAILS]
                ]
                if figures:
                    more = len(images) - len(figures)
                    parts.append(_gallery(f"{prompt}: {len(images)} {what}", figures, more=more))
        for folder in self._run.class_folders:
            paths = find_class_images(folder.folder)[: resolved.num_class_images]
            figures = [_figure(self._thumbnail(path), path.name) for path in paths[:MAX_THUMBNAILS]]
            if figures:
                title = f"Class, {folder.prompt}: {len(paths)} images"
                parts.append(_gallery(title, figures, more=len(paths) - len(figures)))
        return "".join(parts)

    def _thumbnail(self, image: InstanceImage | Path) -> str:
        path = image if isinstance(image, Path) else image.path
        if path not in self._thumbnails:
            pixels = load_image(image, notes=ImageNotes()) if isinstance(image, Path) else image.read(image.square)
            self._thumbnails[path] = image_element(pixels, largest=THUMBNAIL_SIDE, caption=path.name)
        return self._thumbnails[path]

    @cached_property
    def _settings_section(self) -> str:
        settings = self._run.resolved.to_settings()
        groups: list[tuple[str, list[tuple[str, str, str, bool]]]] = []
        for field in dataclasses.fields(settings):
            if (heading := field.metadata.get("group")) or not groups:
                groups.append((heading or "settings", []))
            value = getattr(settings, field.name)
            if value is None or field.name in ("resume_from_checkpoint", "dry_run", "allow_changes"):
                continue
            explanation = f"{field.metadata['help']} ({self._run.resolved.origin(field.name)})"
            groups[-1][1].append((field.name, _value_text(value), explanation, value != field.default))
        tables = [f"<div><h3>{escape(heading)}</h3>{table(rows)}</div>" for heading, rows in groups if rows]
        command = f"mflux-train-dreambooth --config {shlex.quote(str(self._folder.settings))}"
        versions = ", ".join(f"{name} {version(name)}" for name in ("mflux-vae", "mlx"))
        device = mx.device_info().get("device_name", "")
        system = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {device}"
        return (
            f'<p>Run again: <code>{escape(command)}</code></p><p class="note">{escape(versions)}, {escape(system)}</p>'
            f'<div class="settings">{"".join(tables)}</div>'
        )


def _figures(records: Sequence[Mapping[str, Any]], update: int, total: int) -> list[tuple[str, str, str]]:
    """(name, value, remark) of the main numbers."""
    held_out = held_out_losses(records)
    records = [record for record in records if record["update"]]
    spent = sum(record["seconds"] for record in records)
    figures = [("Updates", f"{update:,}", f"of {total:,}"), ("Training time", duration(spent), "without previews")]
    if not records:
        return figures
    name = "instance_loss" if "instance_loss" in records[0] else "loss"
    loss = smoothed(np.array([record[name] for record in records]))
    start = loss[: max(1, len(loss) // 10)].mean()
    speed = sum(record.get("samples", 0) for record in records) / max(spent, 1e-9)
    return [
        *figures,
        ("Loss", format_number(loss[-1]), f"{format_number(start)} in the first tenth"),
        *([] if held_out is None else [_held_out_figure(held_out)]),
        ("Learning rate", format_number(records[-1].get("effective_rate", records[-1]["learning_rate"])), "current"),
        ("Images", format_number(speed), "per second"),
        ("Peak memory", size_text(peak_memory(records)), "allocated by MLX"),
    ]


def _held_out_figure(losses: HeldOutLosses) -> tuple[str, str, str]:
    remark = f"{format_number(losses.best[1])} at its lowest"
    if losses.untrained is not None:
        remark += f" in training, {format_number(losses.untrained)} untrained"
    return "Held-out loss", format_number([*losses.trained.values()][-1]), remark


def _list(lines: Sequence[str]) -> str:
    return f"<ul class='lines'>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _row(label: str, images: Sequence[str], *, css_class: str = "time") -> str:
    return f'<div class="{css_class}"><span>{escape(label)}</span><div class="row">{"".join(images)}</div></div>'


def _figure(image: str, name: str, caption: str = "") -> str:
    text = escape(name) + (f"<br>{escape(caption)}" if caption else "")
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def _gallery(title: str, figures: Sequence[str], *, more: int) -> str:
    note = f'<p class="note">and {more} more</p>' if more else ""
    return f'<h3>{escape(title)}</h3><div class="gallery">{"".join(figures)}</div>{note}'


def _value_text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, tuple):
        return " · ".join(str(getattr(one, "instance_prompt", one)) for one in value)
    return str(value)


def _log_section(path: Path) -> str:
    """The last lines of the log with the time of day."""
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n") if path.exists() else []
    parts = []
    for line in lines[-MAX_LOG_LINES:]:
        match = LOG_LINE.fullmatch(line)
        clock, level, text = (match[2], match[3].lower(), match[4]) if match else ("", "info", line)
        parts.append(f'<div class="{level}"><time>{clock}</time><span>{escape(text)}</span></div>')
    return f'<div class="log" tabindex="0">{"".join(parts)}</div>' if parts else ""
