"""A run's report.html: what it draws, its curves, the pictures it learns from, its settings, what it said."""

from __future__ import annotations

import dataclasses
import logging
import platform
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae.images import load_image
from mflux_vae.weights.formats.files import write_text
from mflux_vae_train.dreambooth.data.class_images import find_class_images
from mflux_vae_train.dreambooth.planning.prepare import Preparation
from mflux_vae_train.dreambooth.reporting import preview_grid
from mflux_vae_train.dreambooth.reporting.charts import charts
from mflux_vae_train.dreambooth.run_folder import RunFolder
from mflux_vae_train.monitoring.progress import duration
from mflux_vae_train.monitoring.report.charts import number
from mflux_vae_train.monitoring.report.curves import smoothed
from mflux_vae_train.monitoring.report.page import PageHeader, Section, page, picture, table
from mflux_vae_train.training.hooks import read_metrics

logger = logging.getLogger(__name__)

PREVIEW_SIDE, THUMBNAIL_SIDE = 384, 192
"""Largest side of the pictures in the page, in pixels."""

MOST_THUMBNAILS = 24
MOST_LINES = 500

LOG_LINE = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d),\d+ ([A-Z]+) (.*)")


class Report:
    """Writes the page, as often as it is told to; whatever goes wrong is said and does not end the run."""

    def __init__(self, pipeline_name: str, run: Preparation, folder: RunFolder) -> None:
        self._pipeline_name, self._run, self._folder = pipeline_name, run, folder
        self._made: dict[tuple[Path, int], list[list[str]]] = {}  # pictures that are in the page already

    def write(self, state: str, *, updates: int, said: str = "") -> None:
        """As of now.

        Args:
            state: running, finished or stopped.
            updates: made so far.
            said: a few words on the state, such as the time left, or why the run stopped.
        """
        try:
            write_text(self._folder.report, self._page(state, updates, said))
        except Exception as error:  # pictures that vanished, a full disk: hours of training must not be lost
            logger.warning("%s was not written (%s: %s)", self._folder.report, type(error).__name__, error)

    def _page(self, state: str, updates: int, said: str) -> str:
        settings, total = self._run.choices.settings, self._run.choices.plan.updates
        records = read_metrics(self._folder.metrics)
        prompts = " · ".join(concept.instance_prompt for concept in self._run.choices.concepts)
        learnt = "a LoRA" if settings.train_mode == "lora" else "all weights"
        when = time.strftime("%Y-%m-%d %H:%M")
        head = PageHeader(
            kind=f"DreamBooth on {self._pipeline_name}",
            title=prompts,
            about=f"{learnt}, {len(self._run.pictures.images)} pictures, in {self._folder.root} · written {when}",
            state=(state, said or f"after update {updates} of {total}"),
            share=updates / total,
            figures=self._figures(records, updates, total),
        )
        return page(
            head,
            [
                Section(
                    name="pictures",
                    title="What it draws",
                    body=self._previews(),
                    note="The same noise in every row: what changes is what was learnt.",
                ),
                Section(name="curves", title="How it learns", body=charts(records, settings.max_grad_norm, total)),
                Section(name="data", title="What it learns from", body=self._data()),
                Section(
                    name="settings", title="Settings", body=self._settings(), note="Bold is what differs from default."
                ),
                Section(name="log", title="What was said", body=_log(self._folder.log)),
            ],
        )

    def _figures(self, records: Sequence[Mapping[str, Any]], updates: int, total: int) -> list[tuple[str, str, str]]:
        spent = sum(record["seconds"] for record in records)
        figures = [("Updates", f"{updates:,}", f"of {total:,}"), ("Training time", duration(spent), "without previews")]
        if not records:
            return figures
        name = "instance_loss" if "instance_loss" in records[0] else "loss"
        loss = smoothed(np.array([record[name] for record in records]))
        tenth = loss[: max(1, len(loss) // 10)].mean()
        speed = sum(record.get("samples", 0) for record in records) / max(spent, 1e-9)
        return [
            *figures,
            ("Loss", number(loss[-1]), f"{number(tenth)} in the first tenth"),
            ("Learning rate", number(records[-1].get("effective_rate", records[-1]["learning_rate"])), "now"),
            ("Pictures", number(speed), "per second"),
            ("Memory", f"{max(record.get('memory_gb', 0.0) for record in records):.2f} GB", "at most"),
        ]

    # pictures

    def _previews(self) -> str:
        """For each prompt one row with a slider over time, and below it all rows, after what is to be learnt."""
        columns = self._run.choices.settings.num_validation_images
        found = preview_grid.previews(self._folder.samples) if columns else []
        if not found:
            return ""
        sheets = [(preview_grid.label(update), self._rows(path, columns)) for update, path in found]
        learnt = [self._thumbnail(one.path, one.square) for one in self._run.pictures.images[:columns]]
        parts = []
        for index, prompt in enumerate(self._run.choices.validation_prompt):
            rows = [(label, rows[index]) for label, rows in sheets if index < len(rows)]
            last = len(rows) - 1
            parts.append(
                f'<h3 class="prompt">{escape(prompt)}</h3><div style="--columns:{columns}">'
                f'<div class="scene" data-of="{index}">'
                f'<div class="row">{"".join(rows[last][1])}</div><div class="scrub" hidden>'
                f'<input type="range" min="0" max="{last}" value="{last}" step="1" aria-label="time of the preview">'
                f"<output>{escape(rows[last][0])}</output></div></div>"
                f'<div class="times" data-prompt="{index}">{_time("subject", learnt, kind="time subject")}'
                f"{''.join(_time(label, row) for label, row in rows)}</div></div>"
            )
        return "".join(parts)

    def _rows(self, path: Path, columns: int) -> list[list[str]]:
        """The pictures of a preview, a list for each prompt."""
        stamp = path, path.stat().st_mtime_ns  # a preview that is made again after a resume is another
        if stamp not in self._made:
            label = preview_grid.label(int(path.stem.removeprefix("step-")))
            self._made[stamp] = [
                [
                    picture(pixels, largest=PREVIEW_SIDE, caption=f"{label}, {place + 1}")
                    for place, pixels in enumerate(row)
                ]
                for row in preview_grid.split_preview(path, columns=columns)
            ]
        return self._made[stamp]

    def _data(self) -> str:
        choices, parts = self._run.choices, []
        for index, concept in enumerate(choices.concepts):
            own = [one for one in self._run.pictures.images if one.concept == index]
            shown = [
                (
                    one.path.name,
                    one.caption if one.caption != concept.instance_prompt else "",
                    self._thumbnail(one.path, one.square),
                )
                for one in own[:MOST_THUMBNAILS]
            ]
            parts.append(_gallery(f"{concept.instance_prompt}: {len(own)} pictures", shown, rest=len(own) - len(shown)))
        for one in self._run.class_folders:
            paths = find_class_images(one.folder)[: choices.settings.num_class_images]
            shown = [(path.name, "", self._thumbnail(path)) for path in paths[:MOST_THUMBNAILS]]
            if shown:
                parts.append(
                    _gallery(f"Class, {one.prompt}: {len(paths)} pictures", shown, rest=len(paths) - len(shown))
                )
        return "".join(parts)

    def _thumbnail(self, path: Path, pixels: np.ndarray | None = None) -> str:
        if (path, 0) not in self._made:
            shown = load_image(path) if pixels is None else pixels
            self._made[path, 0] = [[picture(shown, largest=THUMBNAIL_SIDE, caption=path.name)]]
        return self._made[path, 0][0][0]

    # words

    def _settings(self) -> str:
        settings = self._run.choices.settings
        groups: list[tuple[str, list[tuple[str, str, str, bool]]]] = []
        for field in dataclasses.fields(settings):
            if (heading := field.metadata.get("group")) or not groups:
                groups.append((heading or "settings", []))
            value = getattr(settings, field.name)
            if value is None or field.name in ("resume_from_checkpoint", "dry_run", "allow_changes"):
                continue
            groups[-1][1].append((field.name, _told(value), field.metadata["help"], value != field.default))
        parts = [f"<div><h3>{escape(heading)}</h3>{table(rows)}</div>" for heading, rows in groups if rows]
        again = f"mflux-train-dreambooth --config {shlex.quote(str(self._folder.settings))}"
        made_by = ", ".join(f"{name} {version(name)}" for name in ("mflux-vae", "mlx"))
        device = mx.device_info().get("device_name", "")
        where = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}, {device}"
        return (
            f'<p>Again: <code>{escape(again)}</code></p><p class="note">{escape(made_by)}, {escape(where)}</p>'
            f'<div class="settings">{"".join(parts)}</div>'
        )


def _time(label: str, pictures: Sequence[str], *, kind: str = "time") -> str:
    return f'<div class="{kind}"><span>{escape(label)}</span><div class="row">{"".join(pictures)}</div></div>'


def _gallery(title: str, shown: Sequence[tuple[str, str, str]], *, rest: int) -> str:
    """(file's name, its own prompt, picture) each, and how many more there are."""
    figures = "".join(
        f"<figure>{made}<figcaption>{escape(name)}{f'<br>{escape(caption)}' if caption else ''}</figcaption></figure>"
        for name, caption, made in shown
    )
    more = f'<p class="note">and {rest} more</p>' if rest else ""
    return f'<h3>{escape(title)}</h3><div class="gallery">{figures}</div>{more}'


def _told(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, tuple):
        return " · ".join(str(getattr(one, "instance_prompt", one)) for one in value)
    return str(value)


def _log(path: Path) -> str:
    """The last lines of the log, each with the time of day."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    parts = []
    for line in lines[-MOST_LINES:]:
        found = LOG_LINE.fullmatch(line)
        when, level, words = (found[2], found[3].lower(), found[4]) if found else ("", "info", line)
        parts.append(f'<div class="{level}"><time>{when}</time><span>{escape(words)}</span></div>')
    return f'<div class="log" tabindex="0">{"".join(parts)}</div>' if parts else ""
