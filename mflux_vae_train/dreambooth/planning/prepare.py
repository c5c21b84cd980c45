"""Everything that a run can find out and refuse before it does anything long."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae.images import content_hash
from mflux_vae.utils.links import missing
from mflux_vae_train import lora
from mflux_vae_train.checkpointing import branch
from mflux_vae_train.checkpointing.differences import BY_FILE, listed
from mflux_vae_train.distributed.process_group import IDLE_WARNING, SINGLE, ProcessGroup
from mflux_vae_train.dreambooth import pipeline_features, preview_model
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.class_images import (
    CLASS_PICTURES,
    ClassFolder,
    class_files,
    class_identity,
    file_name,
    scan_class_folders,
)
from mflux_vae_train.dreambooth.data.crops import Shape, training_resolution
from mflux_vae_train.dreambooth.data.dataset import InstanceDataset, InstanceImage, load_dataset
from mflux_vae_train.dreambooth.export import requested_files, result_path
from mflux_vae_train.dreambooth.optimization.optimizer import build_schedule, finds_rate
from mflux_vae_train.dreambooth.planning.adapter import (
    Trainable,
    plan_trainable,
    read_assistant,
    with_adapter_settings,
)
from mflux_vae_train.dreambooth.planning.bnb_config import with_quantization
from mflux_vae_train.dreambooth.planning.config_warnings import without_effect
from mflux_vae_train.dreambooth.planning.drawn_footprint import DrawnWorkload
from mflux_vae_train.dreambooth.planning.memory_advice import with_micro_batches
from mflux_vae_train.dreambooth.planning.memory_estimate import (
    Estimate,
    assumed_device,
    estimate,
    fit_batch_size,
    fit_gradient_checkpointing,
    workload,
)
from mflux_vae_train.dreambooth.planning.prompt_checks import (
    check_prompts,
    identifier_warnings,
    longest_prompt,
    prompts_of,
    syntax_warnings,
)
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings, resolve
from mflux_vae_train.dreambooth.run_folder import RESUMABLE_CHANGES, RunFolder
from mflux_vae_train.dreambooth.run_status import NEEDS_WEIGHTS, TO_GENERATE, RunStatus, read_status
from mflux_vae_train.fingerprint import file_hash, settings_identity, weights_hash
from mflux_vae_train.pipelines import checks
from mflux_vae_train.pipelines.capabilities import (
    SupportsEncodingCache,
    SupportsMemoryControl,
    SupportsPromptInspection,
    Use,
)
from mflux_vae_train.pipelines.footprint import Workload
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.training.lr_schedule import resume_warnings


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """A run that is ready to start.

    Attributes:
        drawing: draws class images and previews: the trained pipeline, or that of ``--preview_model``.
        dataset: the instance images.
        class_folders: class images, present and missing; empty without class images.
        trainable: what is trained.
        identity: what distinguishes this run from others.
        status: how far the run has come in its folder.
        estimate: memory and time; None if the pipeline cannot tell.
        measured: identifies held-out images and noise, see `best_adapter.Best`.
    """

    resolved: ResolvedSettings
    drawing: DiffusionPipeline
    dataset: InstanceDataset
    class_folders: Sequence[ClassFolder]
    trainable: Trainable
    identity: Mapping[str, Any]
    status: RunStatus
    estimate: Estimate | None

    @property
    def measured(self) -> str:
        resolved = self.resolved
        parts = (self.dataset.held_out_fingerprint, resolved.seed, resolved.resolution, resolved.training_guidance)
        return hashlib.sha256(repr((*parts, resolved.sampling)).encode()).hexdigest()[:16]


def prepare(
    pipeline: DiffusionPipeline,
    settings: DreamBoothSettings,
    folder: RunFolder,
    log: Callable[[Sequence[str]], None] = lambda _: None,
    processes: ProcessGroup = SINGLE,
) -> Preparation:
    """Inspect everything and change nothing.

    Args:
        log: receives the pipeline and the memory estimate before weights are read. A dry run does not read weights;
            `summary` has its estimate.
        processes: output folder and class images are those of the main process.

    Raises:
        ImageError: no instance images, or an image that cannot be read.
        SettingsError: settings that do not fit the pipeline, the images or the output folder.
    """
    given = settings
    settings, bnb_warnings = with_quantization(settings)
    pipeline_features.check(pipeline, settings)
    drawing = preview_model.open_preview_model(pipeline, settings)
    for name in ("output_dir", "encodings_dir", "logging_dir"):
        if reason := missing(getattr(settings, name) or ".", "", "remove the link"):
            raise SettingsError(f"--{name} {getattr(settings, name)} {reason}")
        place = Path(getattr(settings, name) or ".")
        if file := next((one for one in (place, *place.parents) if one.is_file()), None):
            raise SettingsError(f"--{name} {place}: {file} is a file, not a folder")
    settings, adapter_warnings = with_adapter_settings(settings, pipeline)
    recommended = pipeline.recommended
    resolution = training_resolution(settings, recommended)
    dataset = load_dataset(settings, resolution=resolution, multiple=recommended.size_multiple)
    resolved = resolve(settings, recommended, dataset, given, drawing.recommended)
    pipeline_features.check_sampling(pipeline, resolved.sampling)
    resolved = replace(resolved, warnings=(*resolved.warnings, *pipeline_features.warnings(pipeline)))
    trainable = plan_trainable(pipeline, resolved)
    preview_model.check_fits(pipeline, drawing, trainable.targets, resolved.resolution)
    assistant, assistant_warnings = read_assistant(pipeline, resolved)
    resolved = replace(resolved, warnings=(*resolved.warnings, *bnb_warnings, *adapter_warnings, *assistant_warnings))
    assisting = 0 if assistant is None else sum(matrix.size for matrix in assistant.tensors.values())
    folders = scan_class_folders(resolved.subjects, count=resolved.num_class_images, processes=processes)
    unused = [f"not used in {one.folder}: {one.unused}" for one in folders if one.unused]
    unused += [line for one in folders for line in one.warnings]
    unused += dataset.repetition_warnings()
    unused += [*identifier_warnings(resolved), *syntax_warnings(prompts_of(resolved, dataset))]
    resolved = replace(resolved, warnings=(*resolved.warnings, *unused))
    with assumed_device(resolved):
        resolved, memory = _estimate(pipeline, drawing, resolved, dataset, folders, trainable, assisting, processes)
        resolved = _with_joined_micro_batches(pipeline, resolved, dataset)
    if (accumulation := resolved.plan.accumulation) < processes.size:
        idle = IDLE_WARNING % (processes.size, accumulation, processes.size)
        resolved = replace(resolved, warnings=(*resolved.warnings, idle))

    def announce() -> None:
        if memory is not None and not resolved.dry_run:
            log([_heading(pipeline, resolved), *memory.lines])
            if resolved.memory_limit is not None and memory.problem is not None:
                raise SettingsError(f"--memory_limit {resolved.memory_limit:g}: {memory.problem}")

    identity = _identity(resolved, dataset)
    if trainable.alphas:
        identity[lora.ALPHAS] = dict(trainable.alphas)
    processes.assert_equal({**identity, "held-out pictures": dataset.held_out_fingerprint})
    identity |= processes.broadcast(lambda: _class_identity(resolved, folders))
    requested = requested_files(folder, resolved)
    free = without_effect(
        resolved, recommended, preservation=resolved.prior_preservation, updates=resolved.plan.updates
    )

    def status(ignored: Collection[str] = ()) -> RunStatus:
        options: dict[str, Any] = {"requested": requested, "shapes": trainable.shapes, "updates": resolved.plan.updates}
        options |= {"ignored": {*RESUMABLE_CHANGES, *free, *ignored}, "allow_changes": resolved.allow_changes}
        resume_from = resolved.resume_from_checkpoint
        return _broadcast(processes, lambda: read_status(folder, identity, resume_from, **options))

    # first without weights: what is refused or complete needs no download
    found = status(ignored=NEEDS_WEIGHTS)
    if not found.complete:
        announce()
    token_lines = None if found.complete else check_prompts(pipeline, resolved, dataset)
    if not resolved.dry_run or folder.identity.exists():  # reading all weights is long, for a dry run
        identity |= _weights_identity(pipeline)
        late = {name: identity[name] for name in NEEDS_WEIGHTS & identity.keys()}
        if any(before.get(name) != value for before in found.compared for name, value in late.items()):
            was_complete, found = found.complete, status()
            if was_complete:
                announce()
    if not found.complete:
        preview_model.check_text_encoders(pipeline, drawing, resolved)
    if token_lines is None and not found.complete and not resolved.dry_run:
        token_lines = check_prompts(pipeline, resolved, dataset)  # the tokenizers are there now
    if token_lines is None and isinstance(pipeline, SupportsPromptInspection):
        unread = "whether prompts are cut is not known before the tokenizers are downloaded"
        resolved = replace(resolved, notes=(*resolved.notes, unread))
    more = (*(token_lines or ()), *_resume_warnings(resolved, found, folder))
    resolved = replace(resolved, warnings=(*resolved.warnings, *more))
    return Preparation(
        resolved=resolved,
        drawing=drawing,
        dataset=dataset,
        class_folders=folders,
        trainable=trainable,
        identity=identity,
        status=found,
        estimate=memory,
    )


def summary(pipeline: DiffusionPipeline, run: Preparation, folder: RunFolder, processes: ProcessGroup) -> list[str]:
    """What the run is going to do, one line each."""
    resolved, plan = run.resolved, run.resolved.plan
    if run.status.complete:
        missing = [path.name for path in requested_files(folder, resolved) if not path.exists()]
        lacking = f"; without a checkpoint {', '.join(missing)} cannot be added" if missing else ""
        return [f"already complete: {result_path(pipeline, resolved.train_mode, folder)}{lacking}"]
    epochs = plan.samples / run.dataset.samples_per_epoch
    announced = run.estimate is not None and not resolved.dry_run
    lines = [] if announced else [_heading(pipeline, resolved)]
    if run.estimate is not None and not announced:
        lines += run.estimate.lines
    lines += [*run.dataset.summary(resolved.subjects), *resolved.notes]
    for one in run.class_folders:
        wanted = resolved.num_class_images
        used = f", the first {wanted} are used" if one.present > wanted else ""
        lines.append(f"class images in {one.folder}: {one.present} present, {len(one.missing)} to generate{used}")
        lines += one.notes
    lines += [
        f"training {run.trainable.description}",
        f"{plan.updates} update{'' if plan.updates == 1 else 's'} of {plan.accumulation} x {plan.batch_size} images,"
        f" {epochs:.4g} {'epoch' if epochs == 1 else 'epochs'}; learning rate {resolved.learning_rate:g},"
        f" {resolved.lr_scheduler}"
        f"{_checkpoints_text(resolved)}",
    ]
    if run.dataset.held_out:
        kept = "; the adapter of the lowest is kept (--keep_best)" if resolved.keep_best else ""
        lines.append(f"held-out loss every {resolved.validation_loss_steps} updates{kept}")
    if run.status.checkpoint is not None:
        lines.append(f"continuing after update {run.status.update}, from {run.status.checkpoint}")
    elif resolved.resume_from_checkpoint == "latest":
        lines.append(f"no checkpoint in {folder.root} yet: starting from the beginning")
    return lines


def _heading(pipeline: DiffusionPipeline, resolved: ResolvedSettings) -> str:
    return f"pipeline {pipeline.name}, {resolved.resolution}x{resolved.resolution} pixels"


def _checkpoints_text(resolved: ResolvedSettings) -> str:
    """How many checkpoints are kept, if not all."""
    interval, limit = resolved.checkpointing_steps, resolved.checkpoints_total_limit
    if interval is None or limit is None or -(-resolved.plan.updates // interval) <= limit:
        return ""
    return f"; a checkpoint every {interval}, the newest {limit} are kept (--checkpoints_total_limit)"


def _estimate(
    pipeline: DiffusionPipeline,
    drawing: DiffusionPipeline,
    resolved: ResolvedSettings,
    dataset: InstanceDataset,
    folders: Sequence[ClassFolder],
    trainable: Trainable,
    assistant: int,
    processes: ProcessGroup,
) -> tuple[ResolvedSettings, Estimate | None]:
    """Settings with what depends on memory decided, and the estimate, if the pipeline has one."""
    if not isinstance(pipeline, SupportsMemoryControl):
        if resolved.auto_batch_size:
            unknown = f"--train_batch_size auto is 1: {pipeline.name} does not estimate its memory"
            resolved = replace(resolved, warnings=(*resolved.warnings, unknown))
        return resolved, None
    captions = {one.caption for one in dataset.all_images}
    work = workload(
        pipeline,
        resolved,
        trained=trainable.weights,
        assistant=assistant,
        shape=_largest_shape(dataset),
        prompts=len(captions) + len(resolved.validation_prompt) + len(folders) + 1,
        class_images=sum(len(one.missing) for one in folders),
    )
    if (longest := longest_prompt(pipeline, resolved, dataset)) is not None:
        work = replace(work, prompt_tokens=longest)
    if drawing is not pipeline:
        if isinstance(drawing, SupportsMemoryControl):
            work = DrawnWorkload(**vars(work), drawing=drawing)
        else:
            unknown = f"the estimate lacks the memory of --preview_model: {drawing.name} does not estimate it"
            resolved = replace(resolved, warnings=(*resolved.warnings, unknown))
    resolved, work = fit_gradient_checkpointing(pipeline, resolved, work)
    if resolved.auto_batch_size:
        resolved, work = fit_batch_size(pipeline, resolved, work, processes.size)
    found = estimate(pipeline, resolved, work)
    if drawing is not pipeline and found.footprint.download:
        less = "encoders of --preview_model that the hub lists for --model, too, are not downloaded"
        resolved = replace(resolved, notes=(*resolved.notes, less))
    return resolved, found


def _with_joined_micro_batches(
    pipeline: DiffusionPipeline, resolved: ResolvedSettings, dataset: InstanceDataset
) -> ResolvedSettings:
    """Decide how many micro-batches are computed as one."""
    batch = resolved.train_batch_size * (1 if resolved.prior_preservation == "none" else 2)
    work = Workload(resolution=resolved.resolution, trained=0, shape=_largest_shape(dataset))
    joined = with_micro_batches(pipeline, resolved, work, batch, resolved.plan.accumulation).joined_micro_batches
    if joined == 1:
        return resolved
    note = f"micro-batches are computed {joined} at a time; --exact_micro_batches computes them one by one"
    return replace(resolved, joined_micro_batches=joined, notes=(*resolved.notes, note))


def _largest_shape(dataset: InstanceDataset) -> Shape:
    return max((one.shape for one in dataset.all_images), key=math.prod)


def _identity(resolved: ResolvedSettings, dataset: InstanceDataset) -> dict[str, Any]:
    """What distinguishes this run from others, as far as it is known without weights: plain values by name."""
    identity = {
        **settings_identity(resolved.to_settings(), RESUMABLE_CHANGES),
        "instance pictures": dataset.fingerprint,
        f"instance pictures{BY_FILE}": [
            [
                _name(one, several=len(resolved.subjects) > 1),
                one.content[:12],
                one.caption,
                content_hash(one.mask)[:12] if one.mask is not None else "",
            ]
            for one in dataset.images
        ],
    }
    if resolved.lora_weights is not None:
        identity["adapter to start from"] = file_hash(Path(resolved.lora_weights))
    if resolved.assistant_lora is not None:
        assistant = lora.fetch_adapter(resolved.assistant_lora, download=not resolved.dry_run)
        identity["assistant"] = "not downloaded" if assistant is None else file_hash(assistant)
    return identity


def _name(image: InstanceImage, *, several: bool) -> str:
    return f"{image.path.parent.name}/{image.path.name}" if several else image.path.name


def _class_identity(resolved: ResolvedSettings, folders: Sequence[ClassFolder]) -> dict[str, Any]:
    """The class images that are present, and the names of those to generate."""
    if resolved.prior_preservation != "class_images":
        return class_identity([])
    identity = class_identity(class_files(resolved.subjects, resolved.num_class_images))
    missing = [(one.folder.name, file_name(index)) for one in folders for index in one.missing]
    if not missing:
        return identity
    several = len(folders) > 1
    names = [f"{folder}/{name}" if several else name for folder, name in missing]
    return {CLASS_PICTURES + BY_FILE: identity[CLASS_PICTURES + BY_FILE], TO_GENERATE: names}


def _weights_identity(pipeline: DiffusionPipeline) -> dict[str, Any]:
    """The part of an identity that needs the weights."""
    identity: dict[str, Any] = {"base weights": weights_hash(pipeline.denoiser)}
    if isinstance(pipeline, SupportsEncodingCache):
        uses: tuple[Use, ...] = ("prompts", "images")
        identity["encoders"] = [checks.encoder_fingerprint(pipeline, use) for use in uses]
    return identity


def _broadcast(processes: ProcessGroup, read: Callable[[], RunStatus]) -> RunStatus:
    """The status that the main process reads."""

    def plain() -> dict[str, Any]:
        status = read()
        paths = {"checkpoint": str(status.checkpoint or ""), "abandoned": [str(path) for path in status.abandoned]}
        return {**asdict(status), **paths}

    values = processes.broadcast(plain)
    path = Path(values["checkpoint"]) if values["checkpoint"] else None
    return RunStatus(**{**values, "checkpoint": path, "abandoned": [Path(one) for one in values["abandoned"]]})


def _resume_warnings(resolved: ResolvedSettings, status: RunStatus, folder: RunFolder) -> list[str]:
    """What a run that continues with changes, or goes back, does differently from the run before."""
    warnings = []
    if status.changed:
        warnings.append(f"continuing the run in {folder.root} with changes: {listed(status.changed)}")
    if status.abandoned:
        warnings.append(branch.warning(folder.root, status.update, status.abandoned))
    if not status.changed or status.checkpoint is None or finds_rate(resolved):
        return warnings
    peak, updates = resolved.learning_rate, resolved.plan.updates
    return warnings + resume_warnings(
        build_schedule(resolved, peak=peak, updates=updates),
        start=status.update,
        total=updates,
        peak=peak,
        last_rate=status.last_rate,
        advice=f"use --lora_weights {folder.root} --output_dir NEW",
    )
