"""Class images for prior preservation: existing ones, and missing ones sampled from the base pipeline."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae.errors import ImageError, InputError, RunError, SettingsError, collecting
from mflux_vae.image_files.notes import ImageNotes
from mflux_vae.image_files.reading import text_chunks
from mflux_vae.image_folder.scan import scan
from mflux_vae.images import content_hash, load_image, save_image
from mflux_vae.utils.formatting import shortened
from mflux_vae.utils.item_bar import item_bar
from mflux_vae.utils.links import missing
from mflux_vae.utils.paths import same_place
from mflux_vae.utils.prefetch import prefetch
from mflux_vae_train.checkpointing.differences import BY_FILE
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.dreambooth.config import Concept
from mflux_vae_train.dreambooth.data.encoding import SHOWN_PROMPT, images_per_batch
from mflux_vae_train.dreambooth.data.sampling import sample_images
from mflux_vae_train.pipelines.protocol import Conditioning, DiffusionPipeline
from mflux_vae_train.randomness import Stream, sample_keys

CLASS_PICTURES = "class pictures"
"""Name of the class images in the identity of a run."""

PROMPT_KEY = "mflux-train-dreambooth class prompt"
"""PNG text chunk with the prompt of a generated class image."""

OLD_PROMPT_KEY = "prompt"
"""The key of earlier versions. ComfyUI writes a text of this name, too."""

_FILE_NAME = re.compile(r"class-\d{5}\.png")


@dataclass(frozen=True, kw_only=True)
class ClassFolder:
    """Class images of one folder.

    Attributes:
        prompt: the class prompt.
        present: number of existing images.
        missing: indices of the images to generate.
        unused: what the folder holds and the run does not use; empty if nothing.
        warnings, notes: what was ignored and converted when the images were read, one line a kind.
    """

    folder: Path
    prompt: str
    present: int
    missing: Sequence[int]
    unused: str = ""
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()


def scan_class_folders(
    concepts: Sequence[Concept],
    *,
    count: int,
    processes: ProcessGroup = SINGLE,
    errors: list[InputError] | None = None,
) -> list[ClassFolder]:
    """The class images of each folder, as the first process finds them.

    Args:
        concepts: with class prompt and folder resolved.
        count: number of images per folder.
        errors: collects those of images.

    Raises:
        ImageError: an image cannot be read.
        SettingsError: a folder is a file, or is used for two class prompts.
    """

    def find() -> list[dict[str, Any]]:
        found: dict[Path, dict[str, Any]] = {}
        for concept in concepts:
            if concept.class_data_dir is None or concept.class_prompt is None:
                continue
            folder, prompt = Path(concept.class_data_dir), concept.class_prompt
            if reason := missing(folder, ""):
                raise SettingsError(f"--class_data_dir {folder} {reason}")
            if folder.exists() and not folder.is_dir():
                raise SettingsError(f"--class_data_dir {folder} is a file, not a folder")
            folder = next((other for other in found if same_place(other, folder)), folder)
            if folder in found and found[folder]["prompt"] != prompt:
                raise SettingsError(f"--class_data_dir {folder} is used for {found[folder]['prompt']!r} and {prompt!r}")
            notes = ImageNotes()
            images = check_class_images(folder, prompt, notes, errors)
            found[folder] = {
                "prompt": prompt,
                "present": len(images),
                "missing": missing_indices(images, count),
                "unused": scan(folder).unused_text() if folder.is_dir() else "",
                "warnings": notes.lines(logging.WARNING),
                "notes": notes.lines(logging.INFO),
            }
        return [{"folder": str(folder), **options} for folder, options in found.items()]

    return [ClassFolder(**{**one, "folder": Path(one["folder"])}) for one in processes.broadcast(find)]


def find_class_images(folder: Path) -> list[Path]:
    """Class images in a folder, sorted by name and not opened; none if the folder does not exist."""
    return scan(folder).paths if folder.is_dir() else []


def check_class_images(
    folder: Path, class_prompt: str, notes: ImageNotes | None = None, errors: list[InputError] | None = None
) -> list[Path]:
    """The class images in a folder. Reads each one, so that errors show before anything slow starts.

    Args:
        notes: collects what is ignored or converted.
        errors: collects those of images.

    Raises:
        ImageError: an image cannot be read.
        SettingsError: an image was generated for another class prompt.
    """
    paths, notes = find_class_images(folder), ImageNotes() if notes is None else notes

    def check(path: Path) -> None:
        with collecting(errors):
            prompt = _read_prompt(path, notes)
            if prompt not in (None, class_prompt):
                shown, wanted = (shortened(text, SHOWN_PROMPT) for text in (prompt, class_prompt))
                raise SettingsError(f"{path} was generated for {shown!r}, not {wanted!r}; use another --class_data_dir")

    for _ in prefetch(check, paths):
        pass
    return paths


def _read_prompt(path: Path, notes: ImageNotes) -> str | None:
    """The prompt that this program generated an image for; None for other images. Decodes the whole image.

    Raises:
        ImageError: it cannot be read, or this program generated it and it is one colour.
    """
    image = load_image(path, notes=notes)
    texts = text_chunks(path)
    if PROMPT_KEY in texts:
        if _is_blank(image):
            raise ImageError(f"{path} was generated and is one colour, so the device failed; delete it")
        return texts[PROMPT_KEY].text
    old = texts.get(OLD_PROMPT_KEY)
    if old is None or old.kind != b"iTXt" or len(texts) > 1 or not _FILE_NAME.fullmatch(path.name):
        return None
    return old.text


def _is_blank(image: np.ndarray) -> bool:
    """Whether an image is one grey level, as that of a network whose results are all zero or NaN."""
    return bool((image == image.flat[0]).all())


def class_files(concepts: Sequence[Concept], count: int) -> list[list[Path]]:
    """The class images that a run uses: for each concept the first `count` of its folder."""
    return [find_class_images(Path(one.class_data_dir or ""))[:count] for one in concepts]


def class_identity(files: Iterable[Sequence[Path]]) -> dict[str, Any]:
    """What identifies the class images of all concepts: a hash of their contents, and (name, hash) of each."""
    unique = list(dict.fromkeys(path for paths in files for path in paths))
    several = len({path.parent for path in unique}) > 1
    names = [f"{path.parent.name}/{path.name}" if several else path.name for path in unique]
    contents = list(prefetch(content_hash, unique))
    digest = hashlib.sha256(b"".join(map(bytes.fromhex, contents)))
    rows = [[name, content[:12]] for name, content in zip(names, contents, strict=True)]
    return {CLASS_PICTURES: digest.hexdigest()[:16], CLASS_PICTURES + BY_FILE: rows}


def missing_indices(present: Sequence[Path], count: int) -> list[int]:
    """The lowest free indices, as many as images are missing."""
    names = {path.name for path in present}
    free = [index for index in range(count) if file_name(index) not in names]
    return free[: max(count - len(present), 0)]


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
    steps: int,
    seed: int,
    batch_size: int | None = None,
    processes: ProcessGroup = SINGLE,
) -> None:
    """Sample the class images with the given indices and write each as a PNG. All processes sample.

    Image i is a function of (seed, i, count, batch_size), so a resumed run generates the same images.

    Args:
        conditioning: of the class prompt, one row.
        indices: missing elements of range(count).
        batch_size: images sampled together; None for `images_per_batch`.
    """
    missing = set(indices)
    # Rounding may depend on the batch, so batches do not depend on which images exist.
    size = batch_size or images_per_batch(resolution)
    batches = [range(i * size, min((i + 1) * size, count)) for i in sorted({index // size for index in missing})]

    def sample(batch: range) -> list[mx.array]:
        keys = sample_keys(seed, Stream.CLASS_IMAGES, 0, batch)
        names = [f"class image {index} of {shortened(class_prompt, SHOWN_PROMPT)!r}" for index in batch]
        options: dict[str, Any] = {"size": (resolution, resolution), "guidance": guidance, "steps": steps}
        images = sample_images(pipeline, conditioning, keys, names, **options)
        for name, image in zip(names, images, strict=True):
            if _is_blank(image):
                raise RunError(f"{name} is one colour, so the device failed; run the command again")
        return [mx.array(image) for image in images]

    disable = None if processes.is_main else True
    with item_bar(total=len(missing), desc="class images", unit="image", disable=disable) as bar:
        for batch, images in processes.map_in_rounds(batches, sample):
            for index, image in zip(batch, images, strict=True):
                if processes.is_main and index in missing:
                    save_image(folder / file_name(index), np.array(image), text={PROMPT_KEY: class_prompt})
            bar.update(len(missing.intersection(batch)))
