"""Everything a run can find out before it does anything long, and every mistake it can refuse by then."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx.utils import tree_map, tree_reduce

from mflux_vae.ahead import ahead
from mflux_vae.errors import SettingsError
from mflux_vae.images import find_images, load_image
from mflux_vae_train import lora
from mflux_vae_train.config import DreamBoothSettings
from mflux_vae_train.dreambooth.choices import Choices, choose, choose_resolution
from mflux_vae_train.dreambooth.data import Pictures, load_pictures
from mflux_vae_train.dreambooth.prior import missing_indices, present_class_images
from mflux_vae_train.dreambooth.run_folder import RunFolder, Standing, identity_of, standing
from mflux_vae_train.fingerprint import of_weights
from mflux_vae_train.pipelines.protocol import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A run that can begin.

    Attributes:
        choices: settings with nothing left open, and what follows from them.
        pictures: the instance pictures.
        class_missing: numbers of the class pictures to be generated.
        identity: what makes this run this run.
        standing: how far it has come.
        lines: what to say at the start.
    """

    choices: Choices
    pictures: Pictures
    class_missing: Sequence[int]
    identity: Mapping[str, Any]
    standing: Standing
    lines: Sequence[str]


def check_pictures(settings: DreamBoothSettings) -> None:
    """What can be known of the pictures without a pipeline: that there are some, and all can be read.

    Raises:
        ImageError: no instance pictures, or a picture that cannot be read.
    """
    load_pictures(settings.instance_data_dir, resolution=settings.resolution or 8)
    if settings.class_data_dir is not None and Path(settings.class_data_dir).is_dir():
        for _ in ahead(load_image, find_images(settings.class_data_dir)[0]):
            pass  # reading is what is asked for


def prepare(pipeline: DiffusionPipeline, settings: DreamBoothSettings, folder: RunFolder) -> Preparation:
    """Looks at everything and changes nothing.

    Raises:
        ImageError: no instance pictures, or a picture that cannot be read.
        SettingsError: settings that the pipeline, the pictures or the output folder do not allow.
    """
    resolution = choose_resolution(settings, pipeline.recommended)
    pictures = load_pictures(settings.instance_data_dir, resolution)
    choices = choose(settings, pipeline.recommended, pictures=len(pictures.paths))
    trained = _trained(pipeline, choices)
    present, missing = _class_pictures(choices)
    looked_at = not settings.dry_run or folder.identity.exists()  # reading all weights is long, for a dry run
    identity = identity_of(
        choices.settings,
        pipeline=type(pipeline).__name__,
        base=of_weights(pipeline.denoiser) if looked_at else "",
        pictures=pictures.fingerprint,
    )
    state = standing(folder, identity, settings.resume_from_checkpoint, allow_changes=settings.allow_changes)

    skipped = f", {pictures.skipped} other files skipped" if pictures.skipped else ""
    plan, epochs = choices.plan, choices.plan.samples / len(pictures.paths)
    lines = [
        f"pipeline {pipeline.name}, {resolution}x{resolution} pixels",
        f"{len(pictures.paths)} instance pictures in {settings.instance_data_dir}{skipped}",
        *choices.notes,
    ]
    if choices.class_folder is not None:
        wanted = settings.num_class_images
        used = f", the first {wanted} are used" if present > wanted else ""
        lines.append(f"class pictures in {choices.class_folder}: {present} there, {len(missing)} to generate{used}")
    lines += [
        f"training {trained}",
        f"{plan.updates} updates of {plan.accumulation} x {plan.batch_size} pictures, {epochs:.4g} epochs;"
        f" learning rate {choices.learning_rate:g}, {settings.lr_scheduler}",
    ]
    if settings.resume_from_checkpoint == "latest" and state.checkpoint is None and not state.complete:
        lines.append(f"no checkpoint in {folder.root} yet: the run begins")
    return Preparation(
        choices=choices,
        pictures=pictures,
        class_missing=missing,
        identity=identity,
        standing=state,
        lines=lines,
    )


def _class_pictures(choices: Choices) -> tuple[int, list[int]]:
    """How many class pictures are there, and the numbers of those that are missing."""
    if choices.class_folder is None or choices.class_prompt is None:
        return 0, []
    if choices.class_folder.exists() and not choices.class_folder.is_dir():
        raise SettingsError(f"--class_data_dir {choices.class_folder} is a file, not a folder")
    present = present_class_images(choices.class_folder, choices.class_prompt)
    return len(present), missing_indices(present, choices.settings.num_class_images)


def _trained(pipeline: DiffusionPipeline, choices: Choices) -> str:
    """What will be trained, in words."""
    denoiser = pipeline.denoiser
    if lora.layers(denoiser):
        raise SettingsError(f"pipeline {pipeline.name} carries an adapter already: open it anew to train another")
    if choices.rank is None:
        sizes = tree_map(lambda array: array.size, denoiser.parameters())
        return f"all {tree_reduce(operator.add, sizes, 0):,} weights"
    patterns = pipeline.lora_targets()
    matched = lora.matching(denoiser, patterns)
    size = choices.rank * sum(matched.values())
    return f"a LoRA of rank {choices.rank} on {len(matched)} layers: {size:,} weights ({', '.join(patterns)})"
