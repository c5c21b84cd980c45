"""Draw and measure the adapters of a run, and write the result to a folder.

Images and features are kept there by what they depend on. A repeated or interrupted evaluation draws only what is
missing. Networks that measure are loaded after the last image is drawn and the pipeline is freed.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae.errors import WeightsError
from mflux_vae.images import covered, save_image
from mflux_vae.runtime.device_errors import device_errors
from mflux_vae.runtime.memory_limits import limited
from mflux_vae.utils.item_bar import item_bar
from mflux_vae.weights.formats.files import read_safetensors, write_json, write_safetensors
from mflux_vae_train.dreambooth.data.sampling import is_one_colour
from mflux_vae_train.dreambooth.drawing.adapted import Adapted
from mflux_vae_train.dreambooth.drawing.sheet import contact_sheet
from mflux_vae_train.dreambooth.evaluation.album import Album
from mflux_vae_train.dreambooth.evaluation.chart import write_chart
from mflux_vae_train.dreambooth.evaluation.plan import Entry
from mflux_vae_train.dreambooth.evaluation.recommend import Row
from mflux_vae_train.dreambooth.evaluation.result import CHART, DOCUMENT, SHEET, Evaluation
from mflux_vae_train.evaluation.evaluator import Evaluator, Features, Subject, of_kind
from mflux_vae_train.fingerprint import file_hash

logger = logging.getLogger(__name__)

SHOWN = 4
"""Images of each kind of prompt in pictures.png."""


def evaluate(
    pipelines: list[Adapted],
    entries: Sequence[Entry],
    subject: Subject,
    evaluator: Evaluator,
    folder: Path,
    *,
    images: int = 4,
    quick: bool = False,
    model: Mapping[str, Any],
) -> Evaluation:
    """Evaluate, and write evaluation.json, fidelity.png and pictures.png to `folder`.

    Args:
        pipelines: what draws the untrained model, and what draws the others. The list is emptied when all is drawn, so
            that their memory is free.
        entries: see `plan`.
        images: number of images per prompt, see `Evaluator.prompts`.
        model: identifies the untrained model, plain values.

    Raises:
        InputError: the evaluator cannot judge this subject.
        RunError: an image has NaN or infinite values.
    """
    prompts = evaluator.prompts(subject, images=images, quick=quick)
    source = pipelines[-1].source
    settings: dict[str, Any] = {name: getattr(pipelines[-1], name) for name in ("size", "steps", "guidance")}
    settings["seed"] = source.seed
    albums = []
    for entry in entries:
        adapter = None if entry.label is None else file_hash(source.file(entry.label))
        key = {**model, **settings, "update": entry.update, "adapter": adapter, "scale": entry.scale}
        place = folder / "images" / (entry.name if entry.scale in (0, 1) else f"{entry.name} at {entry.scale:g}")
        albums.append(Album(folder=place, entry=entry, prompts=prompts, seed=source.seed, key=key))
    _draw(pipelines, albums)
    for album in albums:
        if plain := sum(map(is_one_colour, album.load())):
            text = "%s: %d of %d images are one colour: training has diverged, or the device failed"
            logger.warning(text, album.folder, plain, len(album.keys))
    evaluation = Evaluation(
        evaluator=evaluator.name,
        measures=evaluator.measures,
        settings={**settings, "prompts": len(prompts), "images": len(albums[0].keys)},
        **_measure(albums, subject, evaluator, folder / "features"),
    )
    write_json(folder / DOCUMENT, evaluation.document())
    write_chart(evaluation, folder / CHART)
    save_image(folder / SHEET, _sheet(evaluation, albums, subject))
    return evaluation


def _draw(pipelines: list[Adapted], albums: Sequence[Album]) -> None:
    """Draw the missing images, and free the pipelines."""
    missing = [album.missing() for album in albums]
    logger.info("%d images to draw for %d adapters and the untrained model", sum(missing), len(albums) - 1)
    with (
        limited(),
        device_errors("give --quantize 4 or a smaller --size; what is drawn is kept"),
        item_bar(total=sum(missing), desc="drawing", unit="image", disable=None) as bar,
    ):
        while pipelines:
            # the last pipeline draws with the adapters, and with a scale of 0 the untrained model if it is the only one
            adapted = pipelines.pop()
            part = [album for album in albums if not pipelines or not album.entry.is_base]
            if any(album.missing() for album in part):
                encoded = adapted.encode([prompt.text for prompt in albums[0].prompts])
                for album in filter(Album.missing, part):
                    album.draw(adapted, encoded, bar.update)
                del encoded
            del adapted
            gc.collect()  # a pipeline refers to itself
            mx.clear_cache()


def _measure(albums: Sequence[Album], subject: Subject, evaluator: Evaluator, folder: Path) -> dict[str, Any]:
    """Goals, and the scores of all albums; features of images that did not change are read."""
    pictures = hashlib.sha256(b"".join(np.ascontiguousarray(image).tobytes() for image in subject.images)).hexdigest()
    reference = _cached(
        folder / "instance images.safetensors", evaluator, [pictures], lambda: evaluator.reference(subject)
    )
    rows = []
    for album in item_bar(albums, desc="measuring", unit="adapter", disable=None):
        file = folder / f"{album.folder.name}.safetensors"
        features = _cached(file, evaluator, [subject.noun, *album.keys], partial(_features, evaluator, subject, album))
        scores = evaluator.scores(subject, album.prompts, features, reference)
        entry = album.entry
        rows.append(Row(name=entry.name, update=entry.update, scale=entry.scale, scores=scores))
    return {"goals": evaluator.goals(reference), "base": rows[0], "rows": rows[1:]}


def _features(evaluator: Evaluator, subject: Subject, album: Album) -> Features:
    return evaluator.features(subject, album.prompts, album.load())


def _cached(file: Path, evaluator: Evaluator, keys: Sequence[str], measured: Callable[[], Features]) -> Features:
    """Features from a file if it has them for these images, else measured and stored."""
    key = hashlib.sha256(json.dumps([evaluator.fingerprint, *keys]).encode()).hexdigest()
    try:
        tensors, metadata = read_safetensors(file)
    except WeightsError:  # missing or incomplete
        tensors, metadata = {}, {}
    if metadata.get("key") != key:
        tensors = {name: mx.array(array) for name, array in measured().items()}
        write_safetensors(file, tensors, {"key": key})
    return {name: np.array(array) for name, array in tensors.items()}


def _sheet(evaluation: Evaluation, albums: Sequence[Album], subject: Subject) -> np.ndarray:
    """Instance images, and below them the same few images of each album, which start from the same noise."""
    prompts = albums[0].prompts
    chosen = [index for kind in dict.fromkeys(one.kind for one in prompts) for index in _few(of_kind(prompts, kind))]
    texts = [prompt.text for prompt in prompts for _ in range(prompt.count)]
    found = [album.load(chosen) for album in albums]
    size = found[0][0].shape[:2]
    blank = np.full((*size, 3), 255, np.uint8)
    shown = [[*(covered(image, size) for image in subject.images), *[blank] * len(chosen)], *found]
    labels = ["instance images", *(row.label for row in (evaluation.base, *evaluation.rows))]
    return contact_sheet(labels, [texts[index] for index in chosen], lambda row, column: shown[row][column])


def _few(indices: np.ndarray) -> list[int]:
    return indices[np.linspace(0, len(indices) - 1, min(SHOWN, len(indices))).round().astype(int)].tolist()
