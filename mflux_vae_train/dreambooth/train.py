"""DreamBooth (arXiv:2208.12242) on any pipeline: from settings to adapter, in the order of the steps."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import MfluxVaeError, PluginError, SettingsError, TrainingError
from mflux_vae.utils.formatting import size_text
from mflux_vae_train import lora
from mflux_vae_train.checkpointing import checkpoint, state
from mflux_vae_train.checkpointing.lock import Lock
from mflux_vae_train.distributed import interrupts, process_group
from mflux_vae_train.distributed.process_group import ProcessGroup
from mflux_vae_train.dreambooth import pipeline_features, run_folder
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.batches import micro_batches
from mflux_vae_train.dreambooth.export import result_path, save_fused, save_result
from mflux_vae_train.dreambooth.optimization import loss_by_noise
from mflux_vae_train.dreambooth.optimization.checks import LearningCheck, check_adapter
from mflux_vae_train.dreambooth.optimization.objective import add_base_prediction, dreambooth_loss
from mflux_vae_train.dreambooth.optimization.optimizer import optimizers_of, passes_of, schedule_of, worth_compiling
from mflux_vae_train.dreambooth.optimization.trainable import combined, networks
from mflux_vae_train.dreambooth.planning.adapter import attach
from mflux_vae_train.dreambooth.planning.memory_estimate import compared
from mflux_vae_train.dreambooth.planning.prepare import Preparation, prepare
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings
from mflux_vae_train.dreambooth.precompute import gather
from mflux_vae_train.dreambooth.reporting.loss_curve import write_loss_curve
from mflux_vae_train.dreambooth.reporting.model_card import write_model_card
from mflux_vae_train.dreambooth.reporting.monitor import Monitor
from mflux_vae_train.dreambooth.run_folder import RunFolder
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.pipelines.registry import missing_members
from mflux_vae_train.training.hooks import every, read_metrics
from mflux_vae_train.training.loop import fit
from mflux_vae_train.training.pending_hooks import PendingHooks
from mflux_vae_train.training.step import Arrays, Loss, MicroBatch, Step

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run left.

    Attributes:
        result: the adapter (safetensors), or after full training a pipeline folder or the denoiser's weights;
            None after a dry run. Of several processes the first one writes it, where that one runs.
        updates: optimizer updates that this call made; 0 where nothing was left to do.
    """

    result: Path | None
    updates: int


class DreamBooth:
    """Teaches a pipeline a subject from a few pictures.

    Args:
        pipeline: any object that keeps the contract of `DiffusionPipeline`.

    Attributes:
        Settings, Error: what `train` takes, and what it raises, for those who were only given this class.

    Raises:
        PluginError: the object lacks some of it.
    """

    Settings = DreamBoothSettings
    Error = MfluxVaeError

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        missing = missing_members(pipeline)
        if missing:
            raise PluginError(f"a {type(pipeline).__name__} cannot be trained: it lacks {', '.join(missing)}")
        self.pipeline = pipeline

    def train(self, settings: DreamBoothSettings) -> TrainingResult:
        """Trains, or continues where an interrupted run of the same settings stopped.

        Afterwards the pipeline carries what it learnt: the adapter in its networks, or the trained weights. A
        dry run leaves it as it was, and so does a run that was complete already.

        Raises:
            InputError: settings, pictures or output folder cannot be used; said before anything long begins.
            TrainingError: the loss is not finite, nothing is learnt, a checkpoint is broken, or a disk is full.
            Interrupted: a signal arrived; what was finished is kept, of training in a checkpoint.
        """
        folder = RunFolder(Path(settings.output_dir))
        processes = process_group.join()
        if settings.dry_run:
            with processes:
                run = prepare(self.pipeline, settings, folder, processes=processes)
            _say([*run.lines, "dry run: nothing was written"], run.choices.warnings)
            return TrainingResult(result=None, updates=0)
        with (
            processes,
            interrupts.handling(processes),
            Lock(folder.root) if processes.is_main else nullcontext() as lock,
        ):
            run = prepare(self.pipeline, settings, folder, _say, processes)
            if run.standing.complete:
                result = result_path(self.pipeline, settings.train_mode, folder)
                _say([f"already complete: {result}"])
                return TrainingResult(result=result, updates=0)
            if lock is not None:
                run_folder.claim(folder, run.identity, run.choices.settings, lock)
            try:
                with run_folder.logged(folder.log) if processes.is_main else nullcontext():
                    _say(run.lines, run.choices.warnings)
                    pipeline_features.apply(self.pipeline, run.choices.settings)
                    return _train(self.pipeline, run, folder, processes)
            except OSError as error:
                raise TrainingError(f"{error}; the same command continues where it can be written again") from error


def _train(pipeline: DiffusionPipeline, run: Preparation, folder: RunFolder, processes: ProcessGroup) -> TrainingResult:
    began = time.monotonic()
    choices, plan, settings = run.choices, run.choices.plan, run.choices.settings

    # prompts, class pictures and latents: each encoded once
    material = gather(pipeline, run, folder.encodings, processes)
    mx.clear_cache()

    # what is trained, and how
    learners = networks(pipeline, settings)
    if settings.train_mode == "lora":
        attach(pipeline, learners, choices)
    else:
        pipeline.denoiser.unfreeze()
    together = combined(learners)
    optimizer = optimizers_of(settings, text_encoder=[*learners][-1])
    loss = _loss(pipeline, choices)
    step = Step(
        together,
        optimizer,
        loss,
        max_grad_norm=settings.max_grad_norm,
        compile=worth_compiling(plan.updates),
        run_passes=passes_of(pipeline.denoiser),
        processes=processes,
    )
    rate = schedule_of(settings, peak=choices.learning_rate, updates=plan.updates)

    # where an earlier part of the run stopped
    objects = {"denoiser": state.parameters(together), "optimizer": state.tree_state(optimizer.state)}
    pending = PendingHooks()
    objects["pending_hooks"] = pending.stateful()
    identity = {**run.identity, "class pictures": material.class_fingerprint}

    def resumed() -> int:
        if (found := run.standing.checkpoint) is None:
            return 0
        start = checkpoint.load(found, objects, fingerprint=identity, allow_changes=settings.allow_changes)
        if start > plan.updates:
            raise SettingsError(f"{found} is of update {start}, beyond the {plan.updates} that are asked for now")
        _say([f"continuing after update {start}, from {found}"])
        return start

    start = processes.broadcast(resumed)
    processes.broadcast_state(objects)

    # what happens beside the updates
    def save_checkpoint(updates: int) -> None:
        if not processes.is_main:
            return
        limit = settings.checkpoints_total_limit
        checkpoint.save(folder.root, updates, objects, fingerprint=identity, total_limit=limit)

    def batches(update: int) -> list[MicroBatch]:
        drawn = processes.shard(
            micro_batches(
                material.cache, plan, update=update, seed=settings.seed, caption_dropout=choices.caption_dropout
            )
        )
        if choices.preservation != "dop":
            return list(drawn)
        asked: dict[str, Any] = {"guidance": choices.guidance, "sampling": choices.sampling}
        return [add_base_prediction(pipeline, together, one, **asked) for one in drawn]

    def save() -> None:
        if not processes.is_main:
            return
        path = save_result(pipeline, settings, folder)
        if settings.train_mode == "lora":
            check_adapter(learners, path)

    # the updates; of the hooks, what must not be lost comes first
    validation = [material.prompts.get(prompt) for prompt in choices.validation_prompt]
    with Monitor(pipeline, validation, run, folder, start=start, processes=processes) as monitor:
        fit(
            step=lambda update, drawn, rate: loss_by_noise.bin_means(step(update, drawn, rate)),
            batches=batches,
            learning_rate=rate,
            total=plan.updates,
            start=start,
            observers=[*monitor.observers, compared(run.estimate)],
            hooks=[
                LearningCheck(*learners.values()),
                monitor.pace.timed_every(settings.checkpointing_steps, lambda record: save_checkpoint(record.update)),
                every(None, lambda record: save()),
                monitor.preview_hook(),
            ],
            checkpoint=save_checkpoint,
            pending=pending,
            processes=processes,
        )

    # the end
    result = result_path(pipeline, settings.train_mode, folder)
    if not processes.is_main:
        return TrainingResult(result=result, updates=plan.updates - start)
    write_loss_curve(read_metrics(folder.metrics), folder.loss_curve)
    if settings.fuse:
        _say([f"saved the whole pipeline with the adapter in its weights: {save_fused(pipeline, settings, folder)}"])
    write_model_card(pipeline, settings, folder, result)
    run_folder.finish(folder, run.identity, result)
    minutes, seconds = divmod(round(time.monotonic() - began), 60)
    peak = size_text(mx.get_peak_memory())
    _say([f"saved {result} after {minutes}:{seconds:02} minutes (peak memory {peak}); see {folder.report}"])
    monitor.finish(f"after {minutes}:{seconds:02} minutes")
    return TrainingResult(result=result, updates=plan.updates - start)


def _loss(pipeline: DiffusionPipeline, choices: ResolvedSettings) -> Loss:
    def loss(together: nn.Module, arrays: Arrays) -> tuple[mx.array, dict[str, mx.array]]:
        with lora.dropout_keys(together, arrays["dropout_key"]):
            return dreambooth_loss(
                pipeline,
                arrays,
                guidance=choices.guidance,
                prior_loss_weight=choices.prior_loss_weight,
                sampling=choices.sampling,
            )

    return loss


def _say(lines: Sequence[str], warnings: Sequence[str] = ()) -> None:
    for line in lines:
        logger.info("%s", line)
    for line in warnings:
        logger.warning("%s", line)
