"""The instance pictures of a run, with the prompt, the mask and the views of each. Nothing is encoded here."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from mflux_vae.errors import ImageError
from mflux_vae.images import EXTENSIONS, covered, find_images, load_image, load_images
from mflux_vae.utils.formatting import count_text
from mflux_vae.utils.prefetch import ahead
from mflux_vae_train.dreambooth.config import Concept, DreamBoothSettings
from mflux_vae_train.dreambooth.data.captions import captions
from mflux_vae_train.dreambooth.data.crops import Crop, Shape, nearest, shapes, views

MASK = re.compile(r"(?P<name>.+)-mask\.png", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class InstanceImage:
    """One picture to learn from.

    Attributes:
        content: hash of the file's bytes, in hexadecimal.
        concept: number of the concept that it shows.
        caption: its prompt.
        mask: file that says which places of it count, None for all alike.
        views: by place, and there mirrored or not: what its samples are drawn from. Of no place its mask is all black.
        square: its centre, uint8 (resolution, resolution, 3): for people to look at.
    """

    path: Path
    content: str
    concept: int
    caption: str
    mask: Path | None
    views: Sequence[Sequence[Crop]]
    square: np.ndarray

    @property
    def shape(self) -> Shape:
        """Height and width that it is trained in."""
        return self.views[0][0].shape


@dataclass(frozen=True, kw_only=True)
class InstanceDataset:
    """The instance pictures of all concepts.

    Attributes:
        instances: concept by concept, sorted by name.
        skipped: files in the folders that are neither pictures nor of use to one.
        unused_masks: masks that were not asked for.
    """

    images: Sequence[InstanceImage]
    skipped: int
    unused_masks: int

    @property
    def paths(self) -> list[Path]:
        return [instance.path for instance in self.images]

    @property
    def arrays(self) -> list[np.ndarray]:
        """What the pictures show, in squares, for people to look at."""
        return [instance.square for instance in self.images]

    @cached_property
    def fingerprint(self) -> str:
        """Equal for equal pictures, prompts and masks, whatever the files are called."""
        digest = hashlib.sha256()
        for one in self.images:
            mask = file_hash(one.mask) if one.mask is not None else ""
            digest.update(repr((one.content, one.concept, one.caption, mask)).encode())
        return digest.hexdigest()[:16]

    def summary(self, concepts: Sequence[Concept]) -> list[str]:
        """Lines for the start of a run."""
        counts = Counter(instance.concept for instance in self.images)
        skipped = f", {count_text(self.skipped, 'other file')} skipped" if self.skipped else ""
        lines = [
            f"{count_text(counts[number], 'instance picture')} in {concept.instance_data_dir}"
            + (skipped if number == len(concepts) - 1 else "")
            for number, concept in enumerate(concepts)
        ]
        if own := sum(one.caption != concepts[one.concept].instance_prompt for one in self.images):
            lines.append(f"{own} of {len(self.images)} pictures have prompts of their own")
        if len(by_shape := Counter(instance.shape for instance in self.images)) > 1:
            lines.append(
                "shapes: " + ", ".join(f"{height}x{width} {n}" for (height, width), n in sorted(by_shape.items()))
            )
        if masked := sum(one.mask is not None for one in self.images):
            lines.append(f"{masked} of {len(self.images)} pictures have a mask")
        if self.unused_masks:
            lines.append(f"{self.unused_masks} masks are not used: --masked_loss does")
        return lines


def file_hash(path: Path) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_dataset(settings: DreamBoothSettings, *, resolution: int, multiple: int = 1) -> InstanceDataset:
    """Reads every instance picture: upright, RGB.

    Args:
        resolution: side of a square training picture.
        multiple: sides of training pictures are multiples of this many pixels.

    Raises:
        ImageError: no such folder, no picture in it, a picture or mask that cannot be read (named), a mask of another
            shape than its picture or black in all that is taken of it, or ``--masked_loss`` without any mask.
        SettingsError: prompts or shapes cannot be read.
    """
    among = shapes(settings, resolution=resolution, multiple=multiple)
    crops = 1 if settings.center_crop else settings.num_crops
    images: list[InstanceImage] = []
    skipped = unused = 0
    for number, concept in enumerate(settings.subjects):
        folder = Path(concept.instance_data_dir)
        paths, masks, others = _sorted_out(folder)
        used = masks if settings.masked_loss else {}
        skipped, unused = skipped + others, unused + len(masks) - len(used)
        prompts = captions(folder, paths, prompt=concept.instance_prompt, column=settings.caption_column)
        see: dict[str, Any] = {"among": among, "crops": crops, "mirror": settings.random_flip}
        read = ahead(partial(_read, masks=used, resolution=resolution, **see), paths)
        for path, prompt, (content, seen, square) in zip(paths, prompts, read, strict=True):
            images.append(
                InstanceImage(
                    path=path,
                    content=content,
                    concept=number,
                    caption=prompt,
                    mask=used.get(path),
                    views=seen,
                    square=square,
                )
            )
    if settings.masked_loss and not any(one.mask for one in images):
        raise ImageError(f"--masked_loss: no picture NAME.jpg has a NAME-mask.png beside it in {folder}")
    return InstanceDataset(images=images, skipped=skipped, unused_masks=unused)


def _sorted_out(folder: Path) -> tuple[list[Path], dict[Path, Path], int]:
    """The pictures of a folder, masks by picture, and the number of files that are of no use."""
    found, skipped = find_images(folder)
    by_stem = {path.stem: path for path in found}
    masks = {}
    for path in found:
        match = MASK.fullmatch(path.name)
        if match and match["name"] in by_stem:
            masks[by_stem[match["name"]]] = path
    pictures = [path for path in found if path not in masks.values()]
    if not pictures:
        others = f" among its {skipped} files" if skipped else ""
        raise ImageError(f"{folder} holds no picture{others}: {', '.join(EXTENSIONS)} count")
    beside = sum(path.with_suffix(".txt").is_file() for path in pictures) + (folder / "metadata.jsonl").is_file()
    return pictures, masks, skipped - beside


def _read(
    path: Path, *, masks: dict[Path, Path], resolution: int, among: Sequence[Shape], crops: int, mirror: bool
) -> tuple[str, Sequence[Sequence[Crop]], np.ndarray]:
    """Content of a picture, its views, and its centre square. Where its mask is black nothing is to be seen."""
    picture = load_image(path)
    height, width = size = picture.shape[:2]
    seen = views(size, nearest(size, among), crops=crops, mirror=mirror)
    if path in masks:
        mask = load_mask(masks[path])
        if abs(mask.shape[0] * width - mask.shape[1] * height) > max(height, width):
            raise ImageError(f"{masks[path]} is {mask.shape[1]}x{mask.shape[0]}, of another shape than {path.name}")
        seen = [place for place in seen if place[0].of(mask).any()]
        if not seen:
            where = "all over" if not mask.any() else "where the picture is cut"
            raise ImageError(f"{masks[path]} is black {where}: nothing of {path.name} would count")
    return file_hash(path), seen, covered(picture, (resolution, resolution))


def load_mask(path: Path) -> np.ndarray:
    """Grey levels of a mask: uint8 (H, W, 1)."""
    return load_images(path, channels=1)[0]
