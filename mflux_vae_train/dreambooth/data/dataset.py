"""The instance images of a run, each with its prompt, mask and crops. Nothing is encoded here."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mflux_vae.errors import ImageError, InputError, SettingsError, collecting
from mflux_vae.image_files.notes import ENLARGED, UNIFORM_MASK, ImageNotes
from mflux_vae.image_folder.reasons import EMPTY_SUBFOLDER, FAULTY
from mflux_vae.image_folder.scan import ImageFolder, no_images, scan
from mflux_vae.images import content_hash, image_text, load_image, load_mask
from mflux_vae.utils.formatting import count_text, first_names
from mflux_vae.utils.prefetch import prefetch
from mflux_vae_train.dreambooth.config import Concept, DreamBoothSettings
from mflux_vae_train.dreambooth.data.captions import captions
from mflux_vae_train.dreambooth.data.crops import Crop, Shape, bucket_shapes, crops, nearest_shape
from mflux_vae_train.dreambooth.data.near_copies import near_copies, thumbnail
from mflux_vae_train.dreambooth.data.placeholders import adapt_captions

MAX_PIXEL_BYTES = 2**28
"""Memory for decoded crops between the scan and the encoding. Crops beyond it are read from their files again."""

KEPT_SQUARES = 24
"""Images of each concept whose squares stay in memory for previews and report."""

REPEATS_FLAG = "--repeats"
"""Equivalent of the number in the name of a folder in kohya's layout."""


@dataclass(frozen=True, kw_only=True)
class InstanceImage:
    """
    Attributes:
        path: the image file.
        content: SHA-256 of the file, in hexadecimal.
        size: height and width of the image.
        concept: index of the concept that the image shows.
        caption: its prompt.
        mask: file with the loss weight of each position; None if all weigh the same.
        crops: see `crops.crops`. Crops whose mask is entirely black are dropped.
        square: the centre of the image, for previews and report.
        thumbnail: of this square, see `near_copies`.
        pixels: crops in memory, uint8 (*shape, 3), before mirroring. `read` reads others from the file.
    """

    path: Path
    content: str
    size: Shape
    concept: int
    caption: str
    mask: Path | None
    crops: Sequence[Sequence[Crop]]
    square: Crop
    thumbnail: np.ndarray
    pixels: dict[Crop, np.ndarray]

    def read(self, crop: Crop) -> np.ndarray:
        """uint8 (*crop.shape, 3)."""
        pixels = self.pixels.get(crop.unmirrored)
        return crop.apply(load_image(self.path, notes=ImageNotes())) if pixels is None else crop.mirror(pixels)

    @property
    def shape(self) -> Shape:
        """Height and width of the training images."""
        return self.crops[0][0].shape


@dataclass(frozen=True, kw_only=True)
class InstanceDataset:
    """The instance images of all concepts.

    Attributes:
        images: in the order of the concepts, then sorted by name.
        held_out: images that are not trained, in the same order; each has one crop.
        resolution: side of a square training image in pixels.
        samples_per_epoch: number of images, repeats included.
        folders: those of the images, in order.
        skipped: number of files in the folders that are not used, those with an error included.
        unused_masks: number of masks that are ignored without ``--masked_loss``.
        warnings: what the folders hold and the run does not use, captions that cannot work, and what was ignored when
            images were read; one line a kind.
        notes: what was converted when images were read; one line a kind.
    """

    images: Sequence[InstanceImage]
    held_out: Sequence[InstanceImage] = ()
    resolution: int
    samples_per_epoch: int
    folders: Sequence[ImageFolder] = ()
    skipped: int
    unused_masks: int
    warnings: Sequence[str] = ()
    notes: Sequence[str] = ()

    def release(self) -> None:
        """Free the pixels in memory, except the squares of the first images of each concept."""
        for images in (self.images, self.held_out):
            counts: Counter[int] = Counter()
            for image in images:
                counts[image.concept] += 1
                kept = {image.square} if counts[image.concept] <= KEPT_SQUARES else set()
                for crop in image.pixels.keys() - kept:
                    del image.pixels[crop]

    @property
    def all_images(self) -> Sequence[InstanceImage]:
        """Trained and held-out images."""
        return [*self.images, *self.held_out]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of images, prompts and masks. File names do not matter."""
        return _fingerprint(self.images)

    @cached_property
    def held_out_fingerprint(self) -> str:
        """The same of the held-out images."""
        return _fingerprint(self.held_out)

    @cached_property
    def near_copies(self) -> list[tuple[InstanceImage, InstanceImage]]:
        """Pairs of images that show the same, encoded again, resized, cropped a little or mirrored."""
        pairs = near_copies([one.thumbnail for one in self.images])
        found = [(self.images[first], self.images[second]) for first, second in pairs]
        return [pair for pair in found if pair[0].content != pair[1].content]

    def repetition_warnings(self) -> list[str]:
        """Lines about the only image of a subject, and about images with the same content or nearly so."""
        lines = []
        trained = {one.content for one in self.images}
        if seen := [one.path.name for one in self.held_out if one.content in trained]:
            lines.append(
                f"{count_text(len(seen), 'held-out image')} also trained ({first_names(seen)}): the loss on them does"
                " not show whether the run learns others"
            )
        same: dict[str, list[Path]] = defaultdict(list)
        subjects: dict[int, list[Path]] = defaultdict(list)
        for one in self.images:
            same[one.content].append(one.path)
            subjects[one.concept].append(one.path)
        if single := [paths[0].name for paths in subjects.values() if len(paths) == 1]:
            lines.append(
                f"a single image of the subject ({first_names(single)}): the run learns that image; add others"
            )
        several = len(subjects) > 1
        if twice := [
            first_names([f"{path.parent.name}/{path.name}" if several else path.name for path in paths])
            for paths in same.values()
            if len(paths) > 1
        ]:
            more = f"; and {len(twice) - 1} more" if len(twice) > 1 else ""
            lines.append(f"the same image twice: {twice[0]}{more}; copies weigh more than the other images")
        if near := [f"{one.path.name} and {other.path.name}" for one, other in self.near_copies]:
            lines.append(
                f"nearly the same image: {first_names(near)}; keep one of each, or it weighs more than the others"
            )
        return lines

    def summary(self, concepts: Sequence[Concept]) -> list[str]:
        """Lines for the start of a run."""
        counts, held_out = (Counter(image.concept for image in one) for one in (self.images, self.held_out))
        lines = [
            f"{count_text(counts[index], 'instance image')} in {concept.instance_data_dir}"
            + (f", {held_out[index]} held out" if held_out[index] else "")
            + (f" in {concept.validation_data_dir}" if concept.validation_data_dir else "")
            for index, concept in enumerate(concepts)
        ]
        empty = sum(len(folder.unused.get(EMPTY_SUBFOLDER, ())) for folder in self.folders)
        counts_by_noun = {"other file": self.skipped, "subfolder": empty}
        if skipped := [count_text(count, noun) for noun, count in counts_by_noun.items() if count]:
            lines[-1] += f", {' and '.join(skipped)} skipped"
        if captioned := sum(image.caption != concepts[image.concept].instance_prompt for image in self.images):
            lines.append(f"{captioned} of {len(self.images)} images have another prompt than --instance_prompt")
        if len(shapes := Counter(image.shape for image in self.images)) > 1:
            lines.append(
                "shapes: " + ", ".join(f"{height}x{width} {n}" for (height, width), n in sorted(shapes.items()))
            )
        if masked := sum(image.mask is not None for image in self.images):
            lines.append(f"{masked} of {len(self.images)} images have a mask")
        return [*lines, *self.notes]


def load_dataset(
    settings: DreamBoothSettings, *, resolution: int, multiple: int = 1, errors: list[InputError] | None = None
) -> InstanceDataset:
    """Read every instance image: decode and hash each file once, and keep the crops that fit into `MAX_PIXEL_BYTES`.

    Args:
        resolution: side of a square training image in pixels.
        multiple: sides of training images are multiples of this many pixels.
        errors: collects those of single files, which are left out, and of captions and missing masks.

    Raises:
        ImageError: a folder is missing or has no image; an image or mask cannot be read; a mask has another aspect
            ratio than its image, or is black in every crop; ``--masked_loss`` is set and there is no mask.
        SettingsError: captions or bucket shapes cannot be read, or ``--validation_share`` of a single image.
    """
    shapes = bucket_shapes(settings, resolution=resolution, multiple=multiple)
    count = 1 if settings.center_crop else settings.num_crops
    entries: list[_Entry] = []
    unused_masks = 0
    folders: list[ImageFolder] = []
    lines_of: list[list[str]] = []
    for concept, held_out, place in _places(settings):
        folder = _scan(place)
        folders.append(folder)
        masks = {image: folder.folder / name for image, name in folder.masks.items()}
        if not settings.masked_loss:
            unused_masks, masks = unused_masks + len({*masks.values()}), {}
        texts, lines = _texts(folder, settings, concept, errors)
        lines_of.append(lines)
        entries += [
            _Entry(concept, held_out, folder.folder / name, texts[name], masks.get(name)) for name in folder.images
        ]

    square, used, notes = Crop(shape=(resolution, resolution)), 0, ImageNotes()

    def load(entry: _Entry) -> InstanceImage | None:
        with collecting(errors):
            return read(entry)
        return None

    def read(entry: _Entry) -> InstanceImage:
        concept, _, path, caption, mask = entry
        image = load_image(path, notes=notes)
        size = image.shape[0], image.shape[1]
        rows = crops(size, nearest_shape(size, shapes), count=count, mirror=settings.random_flip)
        shape = rows[0][0].shape
        if shape[0] > size[0] or shape[1] > size[1]:
            notes.add(ENLARGED, path)
        plain = [square, *(row[0] for row in rows)] if used < MAX_PIXEL_BYTES else []
        pixels = {crop: crop.apply(image) for crop in dict.fromkeys(plain)}
        return InstanceImage(
            path=path,
            content=content_hash(path),
            size=size,
            concept=concept,
            caption=caption,
            mask=mask,
            crops=rows if mask is None else _visible(rows, mask, path, size, notes),
            square=square,
            thumbnail=thumbnail(pixels[square] if plain else square.apply(image)),
            pixels=pixels,
        )

    if settings.masked_loss and not any(one.mask for one in entries if not one.held_out):
        place = settings.subjects[-1].instance_data_dir
        with collecting(errors):
            raise ImageError(f"--masked_loss: no image NAME.jpg in {place} has a mask NAME-mask.png")
    images = []
    faulty: dict[Path, list[str]] = defaultdict(list)
    for entry, image in zip(entries, prefetch(load, entries), strict=True):
        if image is None:
            faulty[entry.path.parent].append(entry.path.name)
            continue
        used += sum(pixels.nbytes for pixels in image.pixels.values())
        if used > MAX_PIXEL_BYTES:
            image.pixels.clear()
        images.append(image)
    for index, (concept, *_) in enumerate(_places(settings)):
        if names := faulty.get(folders[index].folder):
            folders[index] = _without(folders[index], names)
            _, lines_of[index] = _texts(folders[index], settings, concept, errors=[])  # without errors a second time
    warnings = [line for lines in lines_of for line in lines]
    aside = {one.path for one in entries if one.held_out}
    if settings.validation_share is not None:
        with collecting(errors):
            aside, lines = _hold_out(images, settings.validation_share)
            warnings += lines
    trained = [image for image in images if image.path not in aside]
    return InstanceDataset(
        images=trained,
        held_out=[_central(image) for image in images if image.path in aside],
        resolution=resolution,
        samples_per_epoch=sum(settings.subjects[image.concept].repeats or 1 for image in trained),
        folders=folders,
        skipped=sum(folder.unused_files for folder in folders),
        unused_masks=unused_masks,
        warnings=(*warnings, *notes.lines(logging.WARNING)),
        notes=notes.lines(logging.INFO),
    )


class _Entry(NamedTuple):
    """An image to read."""

    concept: int
    held_out: bool
    path: Path
    caption: str
    mask: Path | None


def _places(settings: DreamBoothSettings) -> Iterator[tuple[int, bool, str]]:
    """(concept, whether its images are held out, folder)."""
    for concept, subject in enumerate(settings.subjects):
        yield concept, False, subject.instance_data_dir
        if subject.validation_data_dir is not None:
            yield concept, True, subject.validation_data_dir


def _hold_out(images: Sequence[InstanceImage], share: float) -> tuple[set[Path], list[str]]:
    """The images to hold out, and warnings: this share of each concept's images, at least one and never all.

    Hashes of the files decide: names do not matter, and copies of an image stay together.

    Raises:
        SettingsError: no concept has two different images.
    """
    contents: dict[int, set[str]] = defaultdict(set)
    for one in images:
        contents[one.concept].add(one.content)
    chosen = {
        (concept, content)
        for concept, found in contents.items()
        for content in sorted(found)[: min(max(1, round(share * len(found))), len(found) - 1)]
    }
    if not chosen:
        raise SettingsError(f"--validation_share {share:g}: there is a single image; give --validation_data_dir")
    without = [one.path.parent.name for one in images if len(contents[one.concept]) == 1]
    lines = [f"--validation_share: nothing held out of a single image ({first_names(without)})"] if without else []
    return {one.path for one in images if (one.concept, one.content) in chosen}, lines


def _central(image: InstanceImage) -> InstanceImage:
    """The same image with the crop that is nearest to the centre alone."""
    crop = min((row[0] for row in image.crops), key=lambda crop: abs(crop.offset - 0.5))
    return replace(image, crops=[[crop]])


def _fingerprint(images: Sequence[InstanceImage]) -> str:
    digest = hashlib.sha256()
    for image in images:
        mask = content_hash(image.mask) if image.mask is not None else ""
        digest.update(repr((image.content, image.concept, image.caption, mask)).encode())
    return digest.hexdigest()[:16]


def check_files(settings: DreamBoothSettings) -> None:
    """Check before a pipeline is opened that the images exist and have the header of an image; decode none.

    Raises:
        ImageError: a folder is missing or has no image, or a file is not an image.
    """
    for concept, _, place in _places(settings):
        instances = _scan(place)
        masks = [instances.folder / name for name in instances.masks.values()]
        class_data_dir = settings.subjects[concept].class_data_dir
        folder = Path(class_data_dir or "")
        class_images = scan(folder).paths if class_data_dir and folder.is_dir() else []
        for _ in prefetch(image_text, [*instances.paths, *masks, *class_images]):
            pass


def _scan(folder: str) -> ImageFolder:
    scanned = scan(folder, find_twins=True)
    if not scanned.images:
        raise no_images(scanned, repeats_flag=REPEATS_FLAG)
    return scanned


def _without(folder: ImageFolder, faulty: Sequence[str]) -> ImageFolder:
    """The same folder with some images unused, because of an error."""
    kept = tuple(name for name in folder.images if name not in faulty)
    return replace(folder, images=kept, unused={FAULTY: tuple(sorted(faulty)), **folder.unused})


def _texts(
    folder: ImageFolder, settings: DreamBoothSettings, concept: int, errors: list[InputError] | None
) -> tuple[dict[str, str], list[str]]:
    """The prompt of each image, and warnings about masks, captions and what is not used."""
    subject = settings.subjects[concept]
    warnings = _folder_warnings(folder, masked=settings.masked_loss)
    texts = dict.fromkeys(folder.images, subject.instance_prompt)
    with collecting(errors):
        found = captions(folder, prompt=subject.instance_prompt, column=settings.caption_column, errors=errors)
        texts, lines = adapt_captions(found, subject.instance_prompt, subject.class_prompt)
        warnings += [*found.warnings, *(f"{folder.folder}: {line}" for line in lines)]
    return texts, warnings


def _folder_warnings(folder: ImageFolder, *, masked: bool) -> list[str]:
    lines = []
    masks = sorted({*folder.masks.values()})
    unmasked = [image for image in folder.images if image not in folder.masks]
    if text := folder.unused_text(uses=("masks", "captions"), repeats_flag=REPEATS_FLAG):
        lines.append(f"not used in {folder.folder}: {text}")
    if shared := [f"{name} of {' and '.join(first)}" for name, first in folder.shared.items()]:
        lines.append(f"{folder.folder}: images of the same name share a file: {first_names(shared)}")
    if masks and not masked:
        count = count_text(len(masks), "mask")
        lines.append(f"{folder.folder}: {count} not used ({first_names(masks)}); use --masked_loss to apply masks")
    if masks and masked and unmasked:
        count = f"{len(unmasked)} of {count_text(len(folder.images), 'image')}"
        lines.append(f"{folder.folder}: {count} without a mask ({first_names(unmasked)}): all positions weigh the same")
    return lines


def _visible(rows: list[list[Crop]], path: Path, image: Path, size: Shape, notes: ImageNotes) -> list[list[Crop]]:
    """The crops that the mask at `path` does not black out."""
    mask = load_mask(path, notes=notes)
    if abs(mask.shape[0] * size[1] - mask.shape[1] * size[0]) > max(size):
        raise ImageError(f"{path} is {mask.shape[1]}x{mask.shape[0]}: aspect ratio differs from {image.name}")
    visible = [row for row in rows if row[0].apply(mask).any()]
    if not visible:
        where = "everywhere" if not mask.any() else "in every crop"
        raise ImageError(f"{path} is black {where}; {image.name} would not be trained")
    if mask.min() == mask.max():
        notes.add(UNIFORM_MASK, path)
    return visible
