"""DreamBooth (arXiv:2208.12242) on any pipeline, from settings to adapter."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import DeviceError, MfluxVaeError, SettingsError, TrainingError
from mflux_vae.runtime.device_errors import device_errors
from mflux_vae.runtime.memory_limits import limited
from mflux_vae.utils.formatting import size_text, with_article
from mflux_vae_train import lora
from mflux_vae_train.checkpointing import checkpoint, state
from mflux_vae_train.checkpointing.lock import Lock
from mflux_vae_train.distributed import interrupts, process_group
from mflux_vae_train.distributed.process_group import ProcessGroup
from mflux_vae_train.dreambooth import pipeline_features, run_folder
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.batches import micro_batches
from mflux_vae_train.dreambooth.data.class_images import CLASS_PICTURES
from mflux_vae_train.dreambooth.export import result_path, save_adapter_files, save_fused, save_result
from mflux_vae_train.dreambooth.optimization import loss_by_noise
from mflux_vae_train.dreambooth.optimization.checks import LearningCheck, check_adapter
from mflux_vae_train.dreambooth.optimization.held_out_loss import HeldOutLoss
from mflux_vae_train.dreambooth.optimization.objective import add_base_prediction, dreambooth_loss
from mflux_vae_train.dreambooth.optimization.optimizer import (
    build_optimizers,
    build_schedule,
)
from mflux_vae_train.dreambooth.optimization.trainable import combined, networks
from mflux_vae_train.dreambooth.planning.adapter import attach, read_assistant
from mflux_vae_train.dreambooth.planning.memory_advice import after_failure
from mflux_vae_train.dreambooth.planning.memory_estimate import compare_first_update
from mflux_vae_train.dreambooth.planning.prepare import Preparation, prepare, summary
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings
from mflux_vae_train.dreambooth.precompute import Precomputed, precompute
from mflux_vae_train.dreambooth.reporting.held_out import HeldOut, held_out_losses
from mflux_vae_train.dreambooth.reporting.loss_curve import write_loss_curve
from mflux_vae_train.dreambooth.reporting.model_card import write_model_card
from mflux_vae_train.dreambooth.reporting.monitor import Monitor
from mflux_vae_train.dreambooth.run_folder import ADAPTER, RunFolder
from mflux_vae_train.dreambooth.run_status import TO_GENERATE
from mflux_vae_train.monitoring.progress import OnProgress, Progress
from mflux_vae_train.pipelines.checks import check_pipeline
from mflux_vae_train.pipelines.mflux import as_pipeline
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.training.awake import awake
from mflux_vae_train.training.hooks import Record, every, peak_memory, read_metrics
from mflux_vae_train.training.loop import fit
from mflux_vae_train.training.pending_hooks import PendingHooks
from mflux_vae_train.training.step import Arrays, Loss, MicroBatch, Step

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """
    Attributes:
        result: the adapter (safetensors), or after full training a pipeline folder or the denoiser's weights; None
            after a dry run. The main process writes it, on its machine.
        updates: optimizer updates of this call; 0 if the run was complete before.
    """

    result: Path | None
    updates: int


class DreamBooth:
    """Teaches a pipeline a subject from a few images.

    Args:
        pipeline: any object with the members of `DiffusionPipeline`, or a model object of mflux, which carries the
            result after `train`; see `pipelines.mflux`.

    Attributes:
        Settings, Error: the argument and the base exception of `train`, for programs that load only this class.

    Raises:
        PluginError: members are missing, or are not of the kind that the protocol describes; or another class of mflux.
    """

    Settings = DreamBoothSettings
    Error = MfluxVaeError

    def __init__(self, pipeline: Any) -> None:
        pipeline = as_pipeline(pipeline)
        check_pipeline(pipeline, f"{with_article(type(pipeline).__name__)} cannot be trained")
        self.pipeline: DiffusionPipeline = pipeline

    def train(self, settings: DreamBoothSettings, on_progress: OnProgress | None = None) -> TrainingResult:
        """Train, or continue an interrupted run of the same settings.

        Afterwards the pipeline holds the result: the adapter in its networks, or the trained weights. If the run was
        complete before, the main process loads its adapter from `TrainingResult.result`; trained weights are not loaded
        again: open the result instead. A dry run leaves the pipeline unchanged.

        Ctrl-C (SIGINT) and SIGTERM finish the update, save a checkpoint and raise `Interrupted`. It is a
        KeyboardInterrupt and not an `Error`, so `except DreamBooth.Error` does not catch it; the same call continues
        the run. A second Ctrl-C ends the process. Python handles signals in the main thread only: to stop a run in
        another thread, raise an exception in `on_progress`.

        Args:
            on_progress: called with a `Progress` at the start of each phase and after each update, in the main
                process and the calling thread; not for a dry run. An exception that it raises after an update saves a
                checkpoint, ends the run, and is raised by `train`.

        Raises:
            InputError: settings, images or output folder cannot be used; raised before anything long starts.
            DeviceError: memory ran out, or the device failed; the updates before are saved.
            TrainingError: the loss is not finite, nothing is learned, a checkpoint is broken, or a disk is full.
            Interrupted: a signal arrived, see above.
        """
        if not isinstance(settings, DreamBoothSettings):
            raise SettingsError(
                f"settings is {with_article(type(settings).__name__)}; expected DreamBooth.Settings(...)"
            )
        if on_progress is not None and not callable(on_progress):
            raise SettingsError(
                f"on_progress is {with_article(type(on_progress).__name__)}; expected a function of a Progress"
            )
        folder = RunFolder(Path(settings.output_dir))
        processes = process_group.join()
        phase, update = "", 0

        def report(progress: Progress) -> None:
            nonlocal phase, update
            phase, update = progress.phase, progress.update
            if on_progress is not None and processes.is_main:
                on_progress(progress)

        if settings.dry_run:
            with processes:
                run = prepare(self.pipeline, settings, folder, processes=processes)
            lines = summary(self.pipeline, run, folder, processes)
            warnings = () if run.status.complete else run.resolved.warnings
            _log([*lines, "dry run: nothing was written"], warnings)
            return TrainingResult(result=None, updates=0)
        with (
            processes,
            interrupts.handling(processes),
            Lock(folder.root) if processes.is_main else nullcontext() as lock,
        ):
            run = prepare(self.pipeline, settings, folder, _log, processes)
            if run.status.complete:
                _log(summary(self.pipeline, run, folder, processes))
                result = result_path(self.pipeline, run.resolved.train_mode, folder)
                if run.resolved.train_mode == "lora" and processes.is_main:
                    _load_adapter(self.pipeline, run, result)
                updates = run.resolved.plan.updates
                report(Progress(phase="finished", update=updates, total=updates, eta=0.0))
                return TrainingResult(result=result, updates=0)
            if lock is not None:
                run_folder.claim(folder, lock)

            def cure() -> str:
                work = None if run.estimate is None else run.estimate.work
                return after_failure(self.pipeline, run.resolved, work, phase, continues=update > 0)

            try:
                with (
                    run_folder.log_to_file(folder.log) if processes.is_main else nullcontext(),
                    awake(settings.caffeinate),
                    device_errors(cure),
                    _memory_limits(run),
                ):
                    _log(summary(self.pipeline, run, folder, processes), run.resolved.warnings)
                    pipeline_features.apply(self.pipeline, run.resolved)
                    if run.drawing is not self.pipeline:
                        pipeline_features.apply(run.drawing, run.resolved)
                    return _train(self.pipeline, run, folder, processes, report)
            except OSError as error:
                raise TrainingError(f"{error}; repeat the command to continue when it can be written again") from error


def _memory_limits(run: Preparation) -> AbstractContextManager[None]:
    if run.estimate is None:
        return limited()
    return limited(peak=run.estimate.footprint.peak, work=run.estimate.footprint.work)


def _train(
    pipeline: DiffusionPipeline, run: Preparation, folder: RunFolder, processes: ProcessGroup, report: OnProgress
) -> TrainingResult:
    began = time.monotonic()
    resolved, plan = run.resolved, run.resolved.plan

    def begin(phase: str) -> None:
        report(Progress(phase=phase, update=run.status.update, total=plan.updates))

    precomputed = precompute(pipeline, run, folder.encodings, processes, begin)
    mx.clear_cache()
    identity = {name: value for name, value in run.identity.items() if name != TO_GENERATE}
    identity |= precomputed.class_identity
    start, monitor = _optimize(pipeline, run, precomputed, identity, folder, processes, report)
    del precomputed
    gc.collect()  # the compiled step, which holds all weights, and the optimizer: both refer to themselves
    mx.clear_cache()
    result = result_path(pipeline, resolved.train_mode, folder)
    if not processes.is_main:
        pipeline_features.update_host(pipeline)
        return TrainingResult(result=result, updates=plan.updates - start)
    write_loss_curve(read_metrics(folder.metrics), folder.loss_curve)
    if resolved.fuse:
        with device_errors(f"the adapter is saved as {result}; leave out --fuse"):
            fused = save_fused(pipeline, resolved, folder)
        _log([f"saved the whole pipeline with the adapter in its weights: {fused}"])
    write_model_card(pipeline, run.drawing, resolved, folder, result)
    run_folder.finish(folder, identity, result, run.status.branch)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    peak = size_text(peak_memory(read_metrics(folder.metrics)))
    if (held_out := held_out_losses(read_metrics(folder.metrics))) is not None:
        _log([f"held-out loss: {held_out.text}"], [held_out.warning] if held_out.warning else [])
    _log([f"saved {result} after {minutes}:{seconds:02} minutes (peak memory {peak}); see {folder.report}"])
    monitor.finish(f"after {minutes}:{seconds:02} minutes")
    report(Progress(phase="finished", update=plan.updates, total=plan.updates, eta=0.0))
    pipeline_features.update_host(pipeline)
    return TrainingResult(result=result, updates=plan.updates - start)


def _load_adapter(pipeline: DiffusionPipeline, run: Preparation, file: Path) -> None:
    """Let the pipeline hold the adapter of a complete run, as after the training."""
    pipeline_features.apply(pipeline, run.resolved)
    trained = networks(pipeline, run.resolved)
    attach(pipeline, trained, replace(run.resolved, lora_weights=str(file)), run.trainable.targets)
    pipeline_features.update_host(pipeline)


def _optimize(
    pipeline: DiffusionPipeline,
    run: Preparation,
    precomputed: Precomputed,
    identity: Mapping[str, Any],
    folder: RunFolder,
    processes: ProcessGroup,
    report: OnProgress,
) -> tuple[int, Monitor]:
    """Make the updates and save the result; the update that it started after, and what shows the run."""
    resolved, plan = run.resolved, run.resolved.plan

    # model, optimizer, loss
    trained = networks(pipeline, resolved)
    if resolved.train_mode == "lora":
        attach(pipeline, trained, resolved, run.trainable.targets)
    else:
        for network in trained.values():
            network.unfreeze()
    model = combined(trained)
    optimizer = build_optimizers(resolved, text_encoders=[*trained][1:])
    step = Step(
        model,
        optimizer,
        _loss(pipeline, resolved),
        max_grad_norm=resolved.max_grad_norm,
        processes=processes,
    )
    schedule = build_schedule(resolved, peak=resolved.learning_rate, updates=plan.updates)

    # checkpoint to continue from
    objects = {"denoiser": state.parameters(model), "optimizer": state.tree_state(optimizer.state)}
    pending = PendingHooks()
    objects["pending_hooks"] = pending.stateful()

    def resume() -> int:
        if (path := run.status.checkpoint) is None:
            return 0
        if not path.exists():  # its replacement was interrupted, and `claim` completed it
            path = folder.root / f"checkpoint-{run.status.update}"
        options: dict[str, Any] = {"compared": [CLASS_PICTURES], "allow_changes": resolved.allow_changes}
        return checkpoint.load(path, objects, fingerprint=identity, **options)

    start = processes.broadcast(resume)
    processes.broadcast_state(objects)

    def change_folder() -> None:
        """Change the folder, when nothing can refuse the run any more."""
        if processes.is_main:
            reproducing = resolved.to_settings(), resolved.given
            run_folder.start(folder, identity, *reproducing, run.status.branch, run.status.abandoned)

    def save_adapter(place: Path) -> None:
        """Write the adapter for other programs."""
        if resolved.train_mode != "lora":
            return
        try:
            save_adapter_files(pipeline, resolved, place)
        except DeviceError as error:  # a checkpoint may be the last act of a run whose device failed
            logger.warning("this checkpoint has no %s: %s", ADAPTER, error)

    def save_checkpoint(updates: int) -> None:
        if not processes.is_main:
            return
        limit = resolved.checkpoints_total_limit
        checkpoint.save(folder.root, updates, objects, fingerprint=identity, total_limit=limit, write_more=save_adapter)

    def batches(update: int) -> list[MicroBatch]:
        batches = micro_batches(
            precomputed.dataset,
            plan,
            update=update,
            seed=resolved.seed,
            caption_dropout=resolved.caption_dropout,
            processes=processes,
        )
        if resolved.prior_preservation != "dop":
            return batches
        options: dict[str, Any] = {"guidance": resolved.training_guidance, "sampling": resolved.sampling}
        return [add_base_prediction(pipeline, model, one, **options) for one in batches]

    def save() -> None:
        if not processes.is_main:
            return
        path = save_result(pipeline, resolved, folder)
        if resolved.train_mode == "lora":
            check_adapter(trained, path)

    held_out = None
    if precomputed.held_out is not None:
        options: dict[str, Any] = {
            "guidance": resolved.training_guidance,
            "seed": resolved.seed,
            "processes": processes,
        }
        options["batch_size"] = resolved.train_batch_size * (1 if resolved.prior_preservation == "none" else 2)
        measure = HeldOutLoss(pipeline, precomputed.held_out, sampling=resolved.sampling, **options)
        held_out = HeldOut(pipeline, measure, run, folder, start=start, processes=processes)

    # updates; hooks run in this order, the most important one first
    validation = [precomputed.prompts.get(prompt) for prompt in resolved.validation_prompt]
    report(Progress(phase="training", update=run.status.update, total=plan.updates))
    assistant, _ = read_assistant(pipeline, resolved)
    with (
        lora.assisted(pipeline.denoiser, assistant) if assistant is not None else nullcontext(),
        Monitor(
            pipeline,
            validation,
            run,
            folder,
            held_out=held_out,
            start=start,
            change_folder=change_folder,
            processes=processes,
        ) as monitor,
    ):

        def report_update(record: Record) -> None:
            loss, eta = record.metrics["loss"], monitor.pace.left(record.update)
            try:
                report(Progress(phase="training", update=record.update, total=record.total, loss=loss, eta=eta))
            except BaseException:
                save_checkpoint(record.update)
                raise

        fit(
            step=lambda update, batches, rate: loss_by_noise.bin_means(step(update, batches, rate)),
            batches=batches,
            learning_rate=schedule,
            total=plan.updates,
            start=start,
            observers=[*monitor.observers, compare_first_update(run.estimate), report_update],
            hooks=[
                LearningCheck(*trained.values()),
                *monitor.held_out_hooks(),
                monitor.pace.timed_every(resolved.checkpointing_steps, lambda record: save_checkpoint(record.update)),
                every(None, lambda record: save()),
                monitor.preview_hook(),
            ],
            checkpoint=save_checkpoint,
            pending=pending,
            processes=processes,
        )

    if start == plan.updates:
        save()  # a finished run that lacks a requested file
    return start, monitor


def _loss(pipeline: DiffusionPipeline, resolved: ResolvedSettings) -> Loss:
    def loss(model: nn.Module, arrays: Arrays) -> tuple[mx.array, dict[str, mx.array]]:
        with lora.dropout_keys(model, arrays["dropout_key"]):
            return dreambooth_loss(
                pipeline,
                arrays,
                guidance=resolved.training_guidance,
                prior_loss_weight=resolved.prior_loss_weight,
                sampling=resolved.sampling,
            )

    return loss


def _log(lines: Sequence[str], warnings: Sequence[str] = ()) -> None:
    for line in lines:
        logger.info("%s", line)
    for line in warnings:
        logger.warning("%s", line)
