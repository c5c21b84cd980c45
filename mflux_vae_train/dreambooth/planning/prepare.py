"""Everything that a run can find out and refuse before it does anything long."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae_train.distributed.process_group import IDLE_WARNING, SINGLE, ProcessGroup
from mflux_vae_train.dreambooth import pipeline_features
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.class_images import ClassFolder, scan_class_folders
from mflux_vae_train.dreambooth.data.crops import training_resolution
from mflux_vae_train.dreambooth.data.dataset import InstanceDataset, file_hash, load_dataset
from mflux_vae_train.dreambooth.planning.adapter import Trainable, plan_trainable, with_adapter_settings
from mflux_vae_train.dreambooth.planning.memory_estimate import (
    Estimate,
    assumed_device,
    estimate,
    fit_batch_size,
    workload,
)
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings, resolve
from mflux_vae_train.dreambooth.run_folder import RunFolder, RunStatus, read_status, run_identity
from mflux_vae_train.fingerprint import weights_hash
from mflux_vae_train.pipelines.capabilities import SupportsEncodingCache, SupportsMemoryControl, Use
from mflux_vae_train.pipelines.protocol import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A run that is ready to start.

    Attributes:
        dataset: the instance images.
        class_folders: class images, present and missing; empty without class images.
        trainable: what is trained.
        identity: what distinguishes this run from others.
        status: how far the run has come in its folder.
        estimate: memory and time; None if the pipeline cannot tell.
    """

    resolved: ResolvedSettings
    dataset: InstanceDataset
    class_folders: Sequence[ClassFolder]
    trainable: Trainable
    identity: Mapping[str, Any]
    status: RunStatus
    estimate: Estimate | None


def prepare(
    pipeline: DiffusionPipeline,
    settings: DreamBoothSettings,
    folder: RunFolder,
    log: Callable[[Sequence[str]], None] = lambda _: None,
    processes: ProcessGroup = SINGLE,
) -> Preparation:
    """Inspect everything and change nothing.

    Args:
        log: receives the memory estimate before weights are read. A dry run does not read weights; `summary` has its
            estimate.
        processes: output folder and class images are those of the main process.

    Raises:
        ImageError: no instance images, or an image that cannot be read.
        SettingsError: settings that do not fit the pipeline, the images or the output folder.
    """
    pipeline_features.check(pipeline, settings)
    settings = with_adapter_settings(settings, pipeline)
    recommended = pipeline.recommended
    resolution = training_resolution(settings, recommended)
    dataset = load_dataset(settings, resolution=resolution, multiple=recommended.size_multiple)
    resolved = resolve(settings, recommended, dataset)
    trainable = plan_trainable(pipeline, resolved)
    folders = scan_class_folders(resolved.subjects, count=resolved.num_class_images, processes=processes)
    with assumed_device(resolved):
        resolved, memory = _estimate(pipeline, resolved, dataset, folders, trainable)
    if memory is not None and not resolved.dry_run:
        log(memory.lines)
        if resolved.memory_limit is not None and memory.problem is not None:
            raise SettingsError(f"--memory_limit {resolved.memory_limit:g}: {memory.problem}")
    identity = _identity(pipeline, resolved, dataset, folder)
    processes.assert_equal(identity)
    return Preparation(
        resolved=resolved,
        dataset=dataset,
        class_folders=folders,
        trainable=trainable,
        identity=identity,
        status=_status(resolved, identity, folder, processes),
        estimate=memory,
    )


def summary(pipeline: DiffusionPipeline, run: Preparation, folder: RunFolder, processes: ProcessGroup) -> list[str]:
    """What the run is going to do, one line each."""
    resolved, plan = run.resolved, run.resolved.plan
    epochs = plan.samples / run.dataset.samples_per_epoch
    lines = [f"pipeline {pipeline.name}, {resolved.resolution}x{resolved.resolution} pixels"]
    lines += [*run.dataset.summary(resolved.subjects), *resolved.notes]
    for one in run.class_folders:
        wanted = resolved.num_class_images
        used = f", the first {wanted} are used" if one.present > wanted else ""
        lines.append(f"class images in {one.folder}: {one.present} present, {len(one.missing)} to generate{used}")
    lines += [
        f"training {run.trainable.description}",
        f"{plan.updates} updates of {plan.accumulation} x {plan.batch_size} images, {epochs:.4g}"
        f" {'epoch' if epochs == 1 else 'epochs'}; learning rate {resolved.learning_rate:g}, {resolved.lr_scheduler}",
    ]
    if resolved.resume_from_checkpoint == "latest" and run.status == RunStatus():
        lines.append(f"no checkpoint in {folder.root} yet: starting from the beginning")
    if run.estimate is not None and resolved.dry_run:
        lines += run.estimate.lines
    if plan.accumulation < processes.size:
        lines.append(IDLE_WARNING % (processes.size, plan.accumulation, processes.size))
    return lines


def _estimate(
    pipeline: DiffusionPipeline,
    resolved: ResolvedSettings,
    dataset: InstanceDataset,
    folders: Sequence[ClassFolder],
    trainable: Trainable,
) -> tuple[ResolvedSettings, Estimate | None]:
    """Settings with ``--train_batch_size auto`` decided, and the estimate if the pipeline can tell."""
    if not isinstance(pipeline, SupportsMemoryControl):
        return resolved, None
    captions = {one.caption for one in dataset.images}
    work = workload(
        pipeline,
        resolved,
        trained=trainable.weights,
        shape=max((one.shape for one in dataset.images), key=math.prod),
        prompts=len(captions) + len(resolved.validation_prompt) + len(folders) + 1,
        class_images=sum(len(one.missing) for one in folders),
    )
    if resolved.auto_batch_size:
        resolved, work = fit_batch_size(pipeline, resolved, work)
    return resolved, estimate(pipeline, resolved, work)


def _identity(
    pipeline: DiffusionPipeline, resolved: ResolvedSettings, dataset: InstanceDataset, folder: RunFolder
) -> dict[str, Any]:
    read_weights = not resolved.dry_run or folder.identity.exists()  # reading all weights is long, for a dry run
    base = weights_hash(pipeline.denoiser) if read_weights else ""
    identity = run_identity(resolved.to_settings(), base=base, images=dataset.fingerprint)
    if read_weights and isinstance(pipeline, SupportsEncodingCache):
        uses: tuple[Use, ...] = ("prompts", "images")
        identity["encoders"] = [pipeline.encoder_fingerprint(use) for use in uses]
    if resolved.lora_weights is not None:
        identity["adapter to start from"] = file_hash(Path(resolved.lora_weights))
    return identity


def _status(
    resolved: ResolvedSettings, identity: Mapping[str, Any], folder: RunFolder, processes: ProcessGroup
) -> RunStatus:
    def read() -> tuple[bool, str]:
        resume, allow_changes = resolved.resume_from_checkpoint, resolved.allow_changes
        status = read_status(folder, identity, resume, allow_changes=allow_changes)
        return status.complete, str(status.checkpoint or "")

    complete, checkpoint = processes.broadcast(read)
    return RunStatus(complete=complete, checkpoint=Path(checkpoint) if checkpoint else None)
