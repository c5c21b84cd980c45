"""Everything a run can find out before it does anything long, and every mistake it can refuse by then."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx.utils import tree_map, tree_reduce

from mflux_vae.errors import SettingsError
from mflux_vae.images import load_image
from mflux_vae.utils.prefetch import prefetch
from mflux_vae_train import lora
from mflux_vae_train.distributed.process_group import IDLE_WARNING, SINGLE, ProcessGroup
from mflux_vae_train.dreambooth import pipeline_features
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.class_images import ClassFolder, find_class_images, scan_class_folders
from mflux_vae_train.dreambooth.data.dataset import InstanceDataset, file_hash, load_dataset
from mflux_vae_train.dreambooth.export import check_result
from mflux_vae_train.dreambooth.optimization.trainable import skeletons
from mflux_vae_train.dreambooth.planning import adapter
from mflux_vae_train.dreambooth.planning.memory_estimate import Estimate, estimated, with_batch_size
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings, choose, choose_resolution
from mflux_vae_train.dreambooth.run_folder import RunFolder, RunStatus, identity_of, standing
from mflux_vae_train.fingerprint import weights_hash
from mflux_vae_train.monitoring import trackers
from mflux_vae_train.pipelines.capabilities import Identifies, SupportsPrediction, Use
from mflux_vae_train.pipelines.protocol import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A run that can begin.

    Attributes:
        choices: settings with nothing left open, and what follows from them.
        pictures: the instance pictures.
        class_folders: the class pictures, and what is missing of them; none where they are of no use.
        identity: what makes this run this run.
        standing: how far it has come.
        lines: what to say at the start.
        estimate: what it will take; None where the pipeline does not know.
    """

    choices: ResolvedSettings
    pictures: InstanceDataset
    class_folders: Sequence[ClassFolder]
    identity: Mapping[str, Any]
    standing: RunStatus
    lines: Sequence[str]
    estimate: Estimate | None


def check_pictures(settings: DreamBoothSettings) -> None:
    """What can be known of the pictures without a pipeline: that there are some, and all can be read.

    Raises:
        ImageError: no instance pictures, or a picture that cannot be read.
    """
    # what a mask leaves of a picture depends on how the pipeline has it cut
    load_dataset(replace(settings, masked_loss=False), resolution=settings.resolution or 8)
    folders = {one.class_data_dir for one in settings.subjects if one.class_data_dir is not None}
    for folder in sorted(folders):
        for _ in prefetch(load_image, find_class_images(Path(folder))):
            pass  # reading is what is asked for


def prepare(
    pipeline: DiffusionPipeline,
    settings: DreamBoothSettings,
    folder: RunFolder,
    tell: Callable[[Sequence[str]], None] = lambda _: None,
    processes: ProcessGroup = SINGLE,
) -> Preparation:
    """Looks at everything and changes nothing.

    Args:
        tell: is given what the run is estimated to take, before weights are looked at; of a dry run, which does not
            look at them, `lines` say it.
        processes: the processes that train together. The output folder, and that of class pictures, is the first one's.

    Raises:
        ImageError: no instance pictures, or a picture that cannot be read.
        SettingsError: settings that the pipeline, the pictures or the output folder do not allow.
    """
    pipeline_features.check(pipeline, settings)
    settings = adapter.as_in_file(settings, pipeline)
    trackers.requested_trackers(settings.report_to)
    resolution = choose_resolution(settings, pipeline.recommended)
    pictures = load_dataset(settings, resolution=resolution, multiple=pipeline.recommended.size_multiple)
    repeats = [concept.repeats or settings.repeats for concept in settings.subjects]
    in_an_epoch = sum(repeats[one.concept] for one in pictures.images)
    _check_that_it_can(pipeline, settings)
    largest = max((one.shape for one in pictures.images), key=math.prod)
    settings, said = with_batch_size(settings, pipeline, resolution, largest)
    choices = choose(settings, pipeline.recommended, pictures=in_an_epoch)
    check_result(pipeline, settings, pipeline_features.outline_of(pipeline))
    trained = _trained(pipeline, choices)
    classes = scan_class_folders(choices.concepts, wanted=settings.num_class_images, processes=processes)
    prompts = len({one.caption for one in pictures.images}) + len(choices.validation_prompt) + len(classes) + 1
    missing = sum(len(one.missing) for one in classes)
    estimate = estimated(pipeline, choices, shape=largest, prompts=prompts, class_pictures=missing)
    if estimate is not None and not settings.dry_run:
        tell(estimate.lines)  # before anything is downloaded or read
        estimate.check(settings)
    looked_at = not settings.dry_run or folder.identity.exists()  # reading all weights is long, for a dry run
    identity = identity_of(
        choices.settings,
        base=weights_hash(pipeline.denoiser) if looked_at else "",
        pictures=pictures.fingerprint,
    )
    if looked_at and isinstance(pipeline, Identifies):
        uses: tuple[Use, ...] = ("prompts", "images")
        identity["encoders"] = [pipeline.encoder_identity(use) for use in uses]
    if settings.lora_weights is not None:
        identity["adapter to start from"] = file_hash(Path(settings.lora_weights))
    processes.assert_equal(identity)

    def looked_up() -> tuple[bool, str | None]:
        found = standing(folder, identity, settings.resume_from_checkpoint, allow_changes=settings.allow_changes)
        return found.complete, None if found.checkpoint is None else str(found.checkpoint)

    complete, checkpoint = processes.broadcast(looked_up)
    state = RunStatus(complete=complete, checkpoint=None if checkpoint is None else Path(checkpoint))

    plan, epochs = choices.plan, choices.plan.samples / in_an_epoch
    lines = [f"pipeline {pipeline.name}, {resolution}x{resolution} pixels", *pictures.summary(settings.subjects)]
    lines += [*said, *choices.notes]
    for one in classes:
        wanted = settings.num_class_images
        used = f", the first {wanted} are used" if one.present > wanted else ""
        lines.append(f"class pictures in {one.folder}: {one.present} there, {len(one.missing)} to generate{used}")
    lines += [
        f"training {trained}",
        f"{plan.updates} updates of {plan.accumulation} x {plan.batch_size} pictures, {epochs:.4g}"
        f" {'epoch' if epochs == 1 else 'epochs'}; learning rate {choices.learning_rate:g}, {settings.lr_scheduler}",
    ]
    if settings.resume_from_checkpoint == "latest" and state.checkpoint is None and not state.complete:
        lines.append(f"no checkpoint in {folder.root} yet: the run begins")
    if estimate is not None and settings.dry_run:
        lines += estimate.lines
    if plan.accumulation < processes.size:
        lines.append(IDLE_WARNING % (processes.size, plan.accumulation, processes.size))
    return Preparation(
        choices=choices,
        pictures=pictures,
        class_folders=classes,
        identity=identity,
        standing=state,
        lines=lines,
        estimate=estimate,
    )


def _check_that_it_can(pipeline: DiffusionPipeline, settings: DreamBoothSettings) -> None:
    """
    Raises:
        SettingsError: the settings need more of the pipeline's loss than its sum, and the pipeline does not show it.
    """
    needing = {
        "--masked_loss": settings.masked_loss,
        "--weighting_scheme": settings.weighting_scheme is not None,
        "--prior_preservation dop": settings.prior_preservation == "dop",
    }
    if (asked := [name for name, given in needing.items() if given]) and not isinstance(pipeline, SupportsPrediction):
        raise SettingsError(f"{', '.join(asked)}: pipeline {pipeline.name} does not show its predictions (`predict`)")


def _trained(pipeline: DiffusionPipeline, choices: ResolvedSettings) -> str:
    """What will be trained, in words."""
    denoiser = pipeline_features.outline_of(pipeline)
    if any(map(lora.layers, skeletons(pipeline, choices.settings).values())):
        raise SettingsError(f"pipeline {pipeline.name} carries an adapter already: open it anew to train another")
    if choices.rank is None:
        sizes = tree_map(lambda array: array.size, denoiser.parameters())
        return f"all {tree_reduce(operator.add, sizes, 0):,} weights"
    return adapter.described(pipeline, choices)
