"""What a run would see, image by image, and what is wrong or improvable about it."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median_high

from mflux_vae.errors import InputError, collecting
from mflux_vae.image_files.notes import ENLARGED, ImageNotes
from mflux_vae.images import load_mask
from mflux_vae.utils.formatting import count_text, first_names
from mflux_vae.utils.prefetch import prefetch
from mflux_vae_train.dreambooth import pipeline_features
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.class_images import ClassFolder, scan_class_folders
from mflux_vae_train.dreambooth.data.crops import Crop, training_resolution
from mflux_vae_train.dreambooth.data.dataset import InstanceDataset, InstanceImage, load_dataset
from mflux_vae_train.dreambooth.inspection.captions import caption_remarks
from mflux_vae_train.dreambooth.inspection.exposure import exposure_remarks
from mflux_vae_train.dreambooth.inspection.settings import ASSUMED
from mflux_vae_train.dreambooth.planning.prompt_checks import (
    check_prompts,
    identifier_warnings,
    prompts_of,
    syntax_warnings,
)
from mflux_vae_train.dreambooth.planning.resolve import resolve
from mflux_vae_train.pipelines.protocol import DiffusionPipeline, Recommended
from mflux_vae_train.settings.origins import origins_of

FEWEST = 5
ADVICE = "5 to 20 photographs are usual: different places, light and poses"

SMALL_SHARE = 0.6
"""A crop that keeps less of an image is worth a warning: of 2:3 it keeps 0.67, of 9:16 0.56."""

CROPPED = "much cropped away"


@dataclass(frozen=True, kw_only=True)
class ImageFinding:
    """
    Attributes:
        name: file name, after its folder if there are several.
        crop: the middle one of its crops.
        kept: share of the image that it shows.
        enlarged: factor by which the image is too small for it; 1 if it is not.
        mask: mean weight of its positions; None without a mask.
        remarks: a few words each.
    """

    image: InstanceImage
    name: str
    crop: Crop
    kept: float
    enlarged: float
    mask: float | None
    remarks: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Findings:
    """
    Attributes:
        settings: with class prompts, if a run would not be refused for them.
        errors: why a run would be refused; one for each file.
        warnings: what a run warns about, and what would help; one line a kind.
        duplicates: names of images with equal or nearly equal content, in pairs.
    """

    settings: DreamBoothSettings
    errors: Sequence[InputError]
    warnings: Sequence[str]
    images: Sequence[ImageFinding]
    duplicates: Sequence[tuple[str, str]]
    dataset: InstanceDataset
    class_folders: Sequence[ClassFolder]


def inspect(settings: DreamBoothSettings, pipeline: DiffusionPipeline | None = None) -> Findings:
    """Read images, captions, masks and class images as a run does, but all of them, also after an error.

    Args:
        pipeline: None for `ASSUMED` sizes and no count of tokens.

    Raises:
        ImageError: a folder is missing or has no image.
        SettingsError: the pipeline does not offer a feature or a resolution.
    """
    recommended, resolution = ASSUMED, settings.resolution or ASSUMED.resolution
    if pipeline is not None:
        pipeline_features.check(pipeline, settings)
        recommended = pipeline.recommended
        resolution = training_resolution(settings, recommended)
    files: list[InputError] = []
    errors: list[InputError] = []
    dataset = load_dataset(settings, resolution=resolution, multiple=recommended.size_multiple, errors=files)
    resolved: DreamBoothSettings = settings
    class_folders: list[ClassFolder] = []
    warnings = list(dataset.warnings)
    with collecting(errors):
        resolved = resolve(settings, recommended, dataset)
        warnings = list(resolved.warnings)
        if "output_dir" in origins_of(settings) or any(one.class_data_dir for one in settings.subjects):
            class_folders = scan_class_folders(resolved.subjects, count=resolved.num_class_images, errors=files)
    for one in class_folders:
        warnings += [*([f"not used in {one.folder}: {one.unused}"] if one.unused else []), *one.warnings]
    warnings += [*dataset.repetition_warnings(), *identifier_warnings(resolved)]
    warnings += syntax_warnings(prompts_of(resolved, dataset))
    with collecting(errors):
        warnings += check_prompts(pipeline, resolved, dataset) or []
    copies = list(dataset.near_copies)
    copies += [pair for group in _same(dataset.images) for pair in pairwise(group)]
    images, lines = _images(resolved, dataset, copies)
    warnings = [line for line in warnings if ENLARGED.text not in line]  # more precisely below
    return Findings(
        settings=resolved,
        errors=[*errors, *sorted(files, key=str)],
        warnings=[*warnings, *lines, *_image_warnings(resolved, images, resolution, recommended)],
        images=images,
        duplicates=[(_name(one, dataset), _name(other, dataset)) for one, other in copies],
        dataset=dataset,
        class_folders=class_folders,
    )


def _same(images: Sequence[InstanceImage]) -> list[list[InstanceImage]]:
    """Images with equal content."""
    groups: dict[str, list[InstanceImage]] = defaultdict(list)
    for one in images:
        groups[one.content].append(one)
    return [group for group in groups.values() if len(group) > 1]


def _name(image: InstanceImage, dataset: InstanceDataset) -> str:
    return f"{image.path.parent.name}/{image.path.name}" if len(dataset.folders) > 1 else image.path.name


def _images(
    settings: DreamBoothSettings, dataset: InstanceDataset, copies: Sequence[tuple[InstanceImage, InstanceImage]]
) -> tuple[list[ImageFinding], list[str]]:
    """Every image, and warnings about captions."""
    remarks: dict[int, list[str]] = defaultdict(list)  # by id
    lines = []
    for number, concept in enumerate(settings.subjects):
        images = [one for one in dataset.images if one.concept == number]
        found, more = caption_remarks(concept, images)
        lines += more
        for index, texts in found.items():
            remarks[id(images[index])] += texts
    for one, other in copies:
        for image, twin in ((one, other), (other, one)):
            verb = "same as" if one.content == other.content else "like"
            remarks[id(image)].append(f"{verb} {_name(twin, dataset)}")

    held_out = [id(one) for one in dataset.held_out]

    def find(image: InstanceImage) -> ImageFinding:
        crop = image.crops[len(image.crops) // 2][0]
        scale = min(image.size[0] / crop.shape[0], image.size[1] / crop.shape[1])
        mask = None
        if image.mask is not None:
            mask = float(crop.apply(load_mask(image.mask, notes=ImageNotes())).mean()) / 255
        enlarged = max(1.0, 1 / scale)
        kept = min(1.0, math.prod(crop.shape) * scale**2 / math.prod(image.size))
        return ImageFinding(
            image=image,
            name=_name(image, dataset),
            crop=crop,
            kept=kept,
            enlarged=enlarged,
            mask=mask,
            remarks=(
                *(["held out"] if id(image) in held_out else []),
                *([f"enlarged {enlarged:.1f} times"] if enlarged > 1 else []),
                *([CROPPED] if kept < SMALL_SHARE and len(image.crops) == 1 else []),
                *remarks[id(image)],
                *exposure_remarks(image.read(image.square)),
            ),
        )

    return list(prefetch(find, [*dataset.images, *dataset.held_out])), lines


def _image_warnings(
    settings: DreamBoothSettings, images: Sequence[ImageFinding], resolution: int, recommended: Recommended
) -> Iterator[str]:
    subjects = Counter(one.image.concept for one in images)
    for number, concept in enumerate(settings.subjects):
        if 1 < subjects[number] < FEWEST:
            yield f"{count_text(subjects[number], 'image')} in {concept.instance_data_dir}: add some; {ADVICE}"
    if small := [one for one in images if one.enlarged > 1]:
        worst = max(one.enlarged for one in small)
        yield (
            f"{count_text(len(small), 'image')} smaller than the training images ({_listed(small)}), up to"
            f" {worst:.1f} times: {_cure_of_small(settings, images, resolution, recommended)}"
        )
    if cut := [one for one in images if CROPPED in one.remarks]:
        most = 1 - min(one.kept for one in cut)
        verb = f"loses {most:.0%} of its" if len(cut) == 1 else f"lose up to {most:.0%} of their"
        buckets = settings.use_aspect_ratio_buckets or settings.aspect_ratio_buckets
        yield (
            f"{count_text(len(cut), 'image')} {verb} area by cropping ({_listed(cut)}): crop around the subject"
            f" yourself, or {'leave out' if buckets else 'give --use_aspect_ratio_buckets'}"
        )
    for fault, cure in (("very dark", "brighten"), ("very bright", "darken"), ("blurred", "replace")):
        if found := [one for one in images if fault in one.remarks]:
            yield f"{count_text(len(found), 'image')} {fault} ({_listed(found)}): {cure} or leave out"


def _cure_of_small(
    settings: DreamBoothSettings, images: Sequence[ImageFinding], resolution: int, recommended: Recommended
) -> str:
    """Other files; or the resolution of the median image, if most are small and that is half the usual one or more."""
    multiple = recommended.size_multiple
    median = int(median_high(resolution / one.enlarged for one in images)) // multiple * multiple
    if median >= resolution:
        return "replace or remove these files"
    lower = settings.aspect_ratio_buckets is None and median >= recommended.resolution / 2
    return f"give larger files{f', or --resolution {median}' if lower else ''}"


def _listed(images: Sequence[ImageFinding]) -> str:
    return first_names([one.name for one in images])
