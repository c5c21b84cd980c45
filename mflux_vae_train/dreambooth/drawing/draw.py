"""Draw each prompt with each adapter, scale and seed, and write the pictures and a contact sheet of them."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mflux_vae.images import load_image, save_image
from mflux_vae.runtime.device_errors import device_errors
from mflux_vae.runtime.memory_limits import limited
from mflux_vae.utils.formatting import count_text, first_few
from mflux_vae.utils.item_bar import item_bar
from mflux_vae.utils.paths import public_name
from mflux_vae_train.dreambooth.data.sampling import is_one_colour
from mflux_vae_train.dreambooth.drawing.adapted import Adapted, open_adapted
from mflux_vae_train.dreambooth.drawing.output import create_folder, pictures_folder
from mflux_vae_train.dreambooth.drawing.sheet import contact_sheet
from mflux_vae_train.dreambooth.drawing.source import Source
from mflux_vae_train.dreambooth.planning.prompt_checks import Prompt, reading_warnings, syntax_warnings
from mflux_vae_train.fingerprint import file_hash

logger = logging.getLogger(__name__)

TEXT_KEY = "mflux-dreambooth draw"
"""PNG text chunk with the settings of a picture, JSON."""

AXES = ("prompt", "seed", "checkpoint", "scale")

_CURE = "give a smaller --size, --quantize 4, or fewer --images"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A picture.

    Attributes:
        seed: a seed, and the index of the image among those of the seed.
        checkpoint: label of the adapter.
        scale: 0 for the untrained model.
    """

    prompt: str
    seed: tuple[int, int]
    checkpoint: str
    scale: float

    def drawn(self) -> Cell:
        """The cell that has the same picture: untrained models of all checkpoints are one."""
        return replace(self, checkpoint="") if self.scale == 0 else self


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to draw: all combinations.

    Attributes:
        checkpoints: labels of `Source.adapters`.
        images: number of images per seed, see `Adapted.draw`.
    """

    prompts: Sequence[str]
    checkpoints: Sequence[str]
    scales: Sequence[float]
    seeds: Sequence[int]
    images: int = 1

    @property
    def axes(self) -> dict[str, list[Any]]:
        """The different values of each of `AXES`."""
        seeds = product(dict.fromkeys(self.seeds), range(self.images))
        values: tuple[Iterable[Any], ...] = (self.prompts, seeds, self.checkpoints, self.scales)
        return {name: [*dict.fromkeys(each)] for name, each in zip(AXES, values, strict=True)}

    @property
    def varying(self) -> list[str]:
        """The axes with several values."""
        return [name for name, values in self.axes.items() if len(values) > 1]

    @property
    def cells(self) -> list[Cell]:
        """All pictures."""
        return [Cell(**dict(zip(AXES, values, strict=True))) for values in product(*self.axes.values())]


def draw(source: Source, request: Request, target: Path) -> dict[str, Any]:
    """Draw and write everything.

    Args:
        target: file for the picture; for the contact sheet if there are several, which are written beside it, see
            `output`.

    Returns:
        `sheet`: its file, None for a single picture; `pictures`: of each its `file` and settings.

    Raises:
        SettingsError, WeightsError: the model cannot be opened, or does not fit.
        RunError: a picture has NaN or infinite values.
        OSError: a file cannot be written.
    """
    different = [*dict.fromkeys(cell.drawn() for cell in request.cells)]
    several = len(different) > 1
    folder = pictures_folder(target)
    files = {cell: folder / f"{_name(cell, request)}.png" if several else target for cell in different}
    groups = [(source, different)]
    if source.untrained is not None:
        groups = [
            (source.untrained, [cell for cell in different if cell.scale == 0]),
            (source, [cell for cell in different if cell.scale != 0]),
        ]
    opened = [(open_adapted(origin), cells) for origin, cells in groups if cells]
    for adapted, _ in opened:
        _warn(adapted, request.prompts)
    _announce(opened[-1][0], request, len(files))
    create_folder(folder if several else target.parent)
    pictures, plain = [], 0
    with (
        limited(),
        device_errors(lambda: _CURE),
        item_bar(total=len(files), desc="images", unit="image", disable=None) as bar,
    ):
        while opened:
            adapted, cells = opened.pop(0)
            stated = _settings(adapted)
            for cell, image in _drawn(adapted, cells, request):
                settings = {**stated, **_settings_of(cell, adapted, request)}
                save_image(files[cell], image, text={TEXT_KEY: json.dumps(settings, ensure_ascii=False)})
                pictures.append({"file": str(files[cell]), **settings})
                plain += is_one_colour(image)
                bar.update(1)
            del adapted
            gc.collect()  # a pipeline refers to itself; the next one takes its memory
    if plain:
        logger.warning("%d of %d images are one colour: training has diverged, or the device failed", plain, len(files))
    if several:
        _write_sheet(target, request, files, pictures)
    return {"sheet": str(target) if several else None, "pictures": pictures}


def _drawn(adapted: Adapted, cells: Sequence[Cell], request: Request) -> Iterator[tuple[Cell, np.ndarray]]:
    """Draw cells, those of one adapter and scale together."""
    encoded = adapted.encode(request.prompts)
    axes = request.axes
    for checkpoint, scale in dict.fromkeys((cell.checkpoint, cell.scale) for cell in cells):
        with adapted.using(checkpoint, scale):
            for prompt, seed in product(axes["prompt"], dict.fromkeys(seed for seed, _ in axes["seed"])):
                for index, image in enumerate(adapted.draw(encoded, prompt, seed=seed, count=request.images)):
                    yield Cell(prompt=prompt, seed=(seed, index), checkpoint=checkpoint, scale=scale), image


def _announce(adapted: Adapted, request: Request, count: int) -> None:
    source, (height, width) = adapted.source, adapted.size
    labels = dict.fromkeys(
        cell.checkpoint for cell in request.cells if cell.scale and cell.checkpoint in source.adapters
    )
    used = first_few([str(source.adapters[label]) for label in labels], 4) or "without an adapter"
    text = "drawing %s with %s, %s: %d steps, guidance %g, %d x %d pixels"
    pictures = count_text(count, "picture")
    logger.info(text, pictures, source.model, used, adapted.steps, adapted.guidance, height, width)


def _warn(adapted: Adapted, prompts: Sequence[str]) -> None:
    """Warn about prompts that the model reads otherwise than they are meant."""
    found = [Prompt(where=f"prompt {number}", text=prompt) for number, prompt in enumerate(prompts, 1)]
    lines = reading_warnings(adapted.pipeline, found, adapted.source.max_sequence_length) or []
    for line in (*syntax_warnings(found), *lines):
        logger.warning("%s", line)


def _write_sheet(
    target: Path, request: Request, files: Mapping[Cell, Path], pictures: Sequence[Mapping[str, Any]]
) -> None:
    """Columns are what varies in the last of `AXES`, rows all combinations of what else varies."""
    axes, cells = request.axes, request.cells
    *above, across = request.varying
    columns = [_label(across, value, request) for value in axes[across]]
    rows = [
        ", ".join(_label(name, value, request) for name, value in zip(above, values, strict=True))
        for values in product(*(axes[name] for name in above))
    ]
    # `cells` is in the order of rows and columns: axes that do not vary have one value
    sheet = contact_sheet(
        rows, columns, lambda row, column: load_image(files[cells[row * len(columns) + column].drawn()])
    )
    shared = {name: value for name, value in pictures[0].items() if all(one.get(name) == value for one in pictures)}
    text = json.dumps({**shared, "rows": rows, "columns": columns}, ensure_ascii=False)
    save_image(target, sheet, text={TEXT_KEY: text})


def _label(axis: str, value: Any, request: Request) -> str:
    """Label of a value on the contact sheet."""
    if axis == "seed":
        parts = [f"seed {value[0]}"] if len({*request.seeds}) > 1 else []
        return ", ".join([*parts, *([f"image {value[1]}"] if request.images > 1 else [])])
    if axis == "scale":
        plain = {0: "untrained", 1: "trained" if {*request.scales} <= {0, 1} else "scale 1"}
        return plain.get(value, f"scale {value:g}")
    return f"checkpoint {value}" if value.isdecimal() and axis == "checkpoint" else str(value)


def _name(cell: Cell, request: Request) -> str:
    """Name of the file of a picture: what it does not share with all others."""
    parts = {name: _label(name, getattr(cell, name), request) for name in request.varying}
    if "prompt" in parts:
        parts["prompt"] = f"prompt {request.axes['prompt'].index(cell.prompt) + 1}"
    return "-".join(part.replace(", ", "-").replace(" ", "") for part in parts.values() if part)


def _settings(adapted: Adapted) -> dict[str, Any]:
    """What all pictures of a model share. Paths are left out: pictures are published."""
    source, (height, width) = adapted.source, adapted.size
    named = {name: getattr(source, name) for name in ("model", "revision", "variant", "vae", "prediction_type")}
    named |= {name: public_name(named[name]) for name in ("model", "vae") if named[name] is not None}
    more = {name: getattr(source, name) for name in ("quantize", "clip_skip", "max_sequence_length", "negative_prompt")}
    stated = {"version": version("mflux-vae"), **named, **more}
    stated |= {"steps": adapted.steps, "guidance": adapted.guidance, "height": height, "width": width}
    return {name: value for name, value in stated.items() if value not in (None, "")}


def _settings_of(cell: Cell, adapted: Adapted, request: Request) -> dict[str, Any]:
    seed, index = cell.seed
    stated = {"prompt": cell.prompt, "seed": seed, "image": index, "images": request.images, "scale": cell.scale}
    if cell.scale and adapted.source.adapters:
        file = adapted.source.file(cell.checkpoint)
        stated |= {"checkpoint": cell.checkpoint, "adapter": file.name, "adapter_sha256": _hash(file)}
    return stated


@cache
def _hash(file: Path) -> str:
    return file_hash(file)
