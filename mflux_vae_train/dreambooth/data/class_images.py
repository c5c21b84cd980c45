"""Class pictures for prior preservation: those that are there, the missing ones from the base pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mflux_vae.errors import SettingsError
from mflux_vae.images import find_images, image_text, load_image, save_image, to_pictures
from mflux_vae.utils.prefetch import ahead
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.dreambooth.config import Concept
from mflux_vae_train.dreambooth.data.encoding import images_per_batch
from mflux_vae_train.pipelines.protocol import Conditioning, DiffusionPipeline
from mflux_vae_train.randomness import Stream, sample_keys

PROMPT_KEY = "prompt"
"""PNG text chunk that says what a generated class picture was asked to show."""


@dataclass(frozen=True, kw_only=True)
class ClassFolder:
    """Images of one class.

    Attributes:
        prompt: of the class.
        present: how many are there.
        missing: numbers of those that are to be generated.
    """

    folder: Path
    prompt: str
    present: int
    missing: Sequence[int]


def scan_class_folders(
    concepts: Sequence[Concept], *, wanted: int, processes: ProcessGroup = SINGLE
) -> list[ClassFolder]:
    """What there is of class pictures, folder by folder; of several processes, where the first one runs.

    Args:
        concepts: with nothing left open.
        wanted: so many in each folder.

    Raises:
        ImageError: one of them cannot be read.
        SettingsError: a folder is a file, or holds, or would, pictures of two classes.
    """
    found: Any = processes.broadcast(
        lambda: [
            [str(one.folder), one.prompt, one.present, list(one.missing)] for one in _class_folders(concepts, wanted)
        ]
    )
    return [ClassFolder(folder=Path(f), prompt=p, present=n, missing=missing) for f, p, n, missing in found]


def _class_folders(concepts: Sequence[Concept], wanted: int) -> list[ClassFolder]:
    found: dict[Path, ClassFolder] = {}
    for one in concepts:
        if one.class_data_dir is None or one.class_prompt is None:
            continue
        folder, prompt = Path(one.class_data_dir), one.class_prompt
        if folder.exists() and not folder.is_dir():
            raise SettingsError(f"--class_data_dir {folder} is a file, not a folder")
        if folder in found and found[folder].prompt != prompt:
            raise SettingsError(f"--class_data_dir {folder} is given for {found[folder].prompt!r} and for {prompt!r}")
        present = check_class_images(folder, prompt)
        missing = missing_indices(present, wanted)
        found[folder] = ClassFolder(folder=folder, prompt=prompt, present=len(present), missing=missing)
    return list(found.values())


def find_class_images(folder: Path) -> list[Path]:
    """Class pictures that are there, sorted by name; none where there is no folder. They are not looked at."""
    return find_images(folder)[0] if folder.is_dir() else []


def check_class_images(folder: Path, class_prompt: str) -> list[Path]:
    """As `class_images`, and each is read, as a mistake must show before anything long begins.

    Raises:
        ImageError: one of them cannot be read.
        SettingsError: one of them was generated for another class prompt.
    """
    paths = find_class_images(folder)
    for path, made_for in zip(paths, ahead(_made_for, paths), strict=True):
        if made_for not in (None, class_prompt):
            raise SettingsError(
                f"{path} was generated for {made_for!r}, not {class_prompt!r}: give another --class_data_dir"
            )
    return paths


def _made_for(path: Path) -> str | None:
    """The prompt that a class picture was generated for, as far as it says so; the whole file is read."""
    load_image(path)
    return image_text(path).get(PROMPT_KEY)


def missing_indices(present: Sequence[Path], wanted: int) -> list[int]:
    """Numbers of the class pictures still to be generated, the lowest free ones."""
    taken = {path.name for path in present}
    free = [index for index in range(wanted) if file_name(index) not in taken]
    return free[: max(wanted - len(present), 0)]


def file_name(index: int) -> str:
    return f"class-{index:05d}.png"


def generate_class_images(
    pipeline: DiffusionPipeline,
    conditioning: Conditioning,
    indices: Sequence[int],
    folder: Path,
    *,
    count: int,
    class_prompt: str,
    resolution: int,
    guidance: float,
    seed: int,
    at_once: int | None = None,
    processes: ProcessGroup = SINGLE,
) -> None:
    """Samples the class pictures with the given numbers and writes each as a PNG; several processes share them out.

    Picture i is a function of (seed, i, count, at_once): an interrupted run goes on with the same pictures.

    Args:
        conditioning: one row, the class prompt's.
        indices: which of range(count) are missing.
        at_once: pictures drawn together; None for as many as memory surely allows.
    """
    wanted = set(indices)
    # The groups are fixed, so that no picture depends, by a rounding, on which ones were there already.
    size = at_once or images_per_batch(resolution)
    groups = [
        range(group * size, min((group + 1) * size, count)) for group in sorted({index // size for index in wanted})
    ]

    def drawn(members: range) -> list[mx.array]:
        keys = sample_keys(seed, Stream.CLASS_IMAGES, 0, members)
        pictures = sample_images(pipeline, conditioning, keys, resolution=resolution, guidance=guidance)
        return [mx.array(picture) for picture in pictures]

    shown = None if processes.is_main else True
    with tqdm(total=len(wanted), desc="class pictures", unit="picture", disable=shown) as bar:
        for members, pictures in processes.map_in_rounds(groups, drawn):
            for index, picture in zip(members, pictures, strict=True):
                if processes.is_main and index in wanted:
                    save_image(folder / file_name(index), np.array(picture), text={PROMPT_KEY: class_prompt})
                    bar.update()


def sample_images(
    pipeline: DiffusionPipeline,
    conditioning: Conditioning,
    keys: mx.array,
    *,
    resolution: int,
    guidance: float,
) -> list[np.ndarray]:
    """Square pictures (uint8) of one prompt, one per key, with the pipeline's own number of steps."""
    rows = {name: mx.repeat(array, keys.shape[0], axis=0) for name, array in conditioning.items()}
    pixels = pipeline.sample(
        rows, size=(resolution, resolution), steps=pipeline.recommended.steps, guidance=guidance, key=keys
    )
    # whatever dtype a host's pipeline draws in: numpy knows no bfloat16
    return list(to_pictures(np.array(pixels.astype(mx.float32))))
