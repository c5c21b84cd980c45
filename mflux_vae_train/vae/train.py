"""Train an autoencoder from settings."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae.errors import SettingsError, TrainingError
from mflux_vae.pretrained import loading
from mflux_vae.runtime.device import compute_dtype, use_cpu
from mflux_vae.runtime.device_errors import device_errors
from mflux_vae.runtime.memory_limits import limited
from mflux_vae.utils.formatting import count_text
from mflux_vae.utils.paths import file_name
from mflux_vae_train.checkpointing import checkpoint, state
from mflux_vae_train.checkpointing.lock import Lock
from mflux_vae_train.distributed import interrupts, process_group
from mflux_vae_train.distributed.process_group import IDLE_WARNING, ProcessGroup
from mflux_vae_train.monitoring.progress import Pace, ProgressBar
from mflux_vae_train.monitoring.trackers import TensorBoard, requested_trackers
from mflux_vae_train.optimizers import registry
from mflux_vae_train.optimizers.base import Optimizer
from mflux_vae_train.optimizers.grouped import Grouped
from mflux_vae_train.training.awake import awake
from mflux_vae_train.training.ema import EMA
from mflux_vae_train.training.hooks import Hook, MetricsLog, Record, every
from mflux_vae_train.training.loop import fit
from mflux_vae_train.training.pending_hooks import PendingHooks
from mflux_vae_train.training.step import Step
from mflux_vae_train.vae import run_status
from mflux_vae_train.vae.build import build, build_discriminator, parameter_count, set_training_mode
from mflux_vae_train.vae.config import OPTIMIZER_FLAGS, VAETrainingSettings, settings_from_dict
from mflux_vae_train.vae.config_warnings import config_warnings
from mflux_vae_train.vae.data.batches import Source
from mflux_vae_train.vae.dry_run import dry_run
from mflux_vae_train.vae.evaluation.formatting import Progress, metrics_text
from mflux_vae_train.vae.evaluation.validation import Validation, collapse_warning
from mflux_vae_train.vae.fingerprint import run_identity
from mflux_vae_train.vae.memory_advice import less_memory
from mflux_vae_train.vae.network.gradient_checkpointing import recompute_blocks
from mflux_vae_train.vae.objective import AdversarialStep, Objective, discriminator_loss
from mflux_vae_train.vae.plan import Plan, open_images
from mflux_vae_train.vae.run_status import RunStatus, read_status

logger = logging.getLogger(__name__)

_COLLAPSE_GRACE = 50
"""Updates before which a collapsed posterior is not reported: it may not have been trained yet."""

_FIRST_LINES, _LINE_INTERVAL = 3, 15.0
"""Validations are logged so many times, then at most once in so many seconds; validation.jsonl has all of them."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Result of a run.

    Attributes:
        best: file with the weights of the lowest validation loss; `mflux_vae` opens it.
        last: file with the final weights.
        folder: the run folder.
        updates: number of updates in this call; 0 if the run was already complete.
        metrics: metrics of the last validation.
    """

    best: Path
    last: Path
    folder: Path
    updates: int
    metrics: Mapping[str, float]


class _EarlyStop(Exception):
    """Ends the training loop: early stopping."""


class VAETrainer:
    """Train an autoencoder from settings.

    Args:
        config: settings, or a dictionary of some or all of them, see `get_default_config`.
        source: training images that replace `data`; a fraction `val_share` of them is held out.

    Attributes:
        network: the network; after `train` with the final weights, or their moving average.

    Raises:
        InputError: invalid settings or data.
    """

    def __init__(self, config: VAETrainingSettings | Mapping[str, Any], source: Source | None = None) -> None:
        self.settings = config if isinstance(config, VAETrainingSettings) else settings_from_dict(config)
        if self.settings.cpu:
            use_cpu()
        if self.settings.mixed_precision and compute_dtype(mx.bfloat16) != mx.bfloat16:
            raise SettingsError("--mixed_precision: not supported on a CPU or a GPU without bfloat16; leave it out")
        self.source = source
        self.folder = Path(self.settings.output_dir) / "checkpoints" / file_name(self.settings.name)
        self.best, self.last = (self.folder / f"{which}_model.safetensors" for which in ("best", "last"))
        self.network = build(self.settings)

    def train(self) -> TrainingResult:
        """Train, or resume an interrupted run with the same settings.

        Raises:
            SettingsError: the folder contains another run, or cannot be written.
            DeviceError: memory ran out, or the device failed; the updates before are saved.
            TrainingError: the loss is not finite, or a checkpoint is broken.
            Interrupted: Ctrl-C or SIGTERM; a checkpoint was saved. It is a KeyboardInterrupt, not an Error.
        """
        with process_group.join() as processes, interrupts.handling(processes):
            if self.settings.dry_run:
                metrics = processes.broadcast(lambda: dry_run(self.settings, self.network, self.folder, self.source))
                return TrainingResult(best=self.best, last=self.last, folder=self.folder, updates=0, metrics=metrics)
            with Lock(self.folder) if processes.is_main else nullcontext() as lock:
                try:
                    with device_errors(lambda: less_memory(self.settings, self.network, self.folder)), limited():
                        return self._train(lock, processes)
                except OSError as error:
                    raise TrainingError(f"{error}; run the same command again to resume") from error

    def _train(self, lock: Lock | None, processes: ProcessGroup) -> TrainingResult:
        settings, network, folder = self.settings, self.network, self.folder
        requested_trackers("tensorboard" if settings.tensorboard else None)
        for line in config_warnings(settings):
            logger.warning("%s", line)

        # data
        train, held_out = open_images(settings, self.source)
        fingerprint = run_identity(settings, network, train, held_out)
        processes.assert_equal(fingerprint)
        plan = Plan(settings, train, processes)
        for line in plan.warnings():
            logger.warning("%s", line)
        if settings.gradient_accumulation_steps < processes.size:
            logger.warning("%s", IDLE_WARNING % (processes.size, settings.gradient_accumulation_steps, processes.size))

        # network, objective, optimizer
        set_training_mode(network, settings.train)
        if settings.gradient_checkpointing:
            recompute_blocks(network)
        ema = EMA(network.trainable_parameters(), settings.ema_decay) if settings.ema_decay else None
        discriminator = build_discriminator(settings, network) if settings.disc_start is not None else None
        objective = Objective(settings, network, dataset_size=len(train), discriminator=discriminator)
        options: dict[str, Any] = {"max_grad_norm": settings.max_grad_norm or math.inf, "processes": processes}
        step = Step(network, _optimizer(settings), objective, ema=ema, buffers=True, **options)
        objects = {
            "network": state.parameters(network),
            "buffers": state.buffers(network),
            "optimizer": state.tree_state(step.optimizer.state),
        }
        if ema is not None:
            objects["ema"] = state.tree_state(ema.state)
        steps: Any = step
        if discriminator is not None:
            steps = AdversarialStep(
                step, Step(discriminator, _optimizer(settings), discriminator_loss, **options), settings.disc_start or 0
            )
            objects["discriminator"] = state.parameters(discriminator)
            objects["discriminator optimizer"] = state.tree_state(steps.discriminator.optimizer.state)
        validated: dict[str, Any] = {"best": math.inf, "without_improvement": 0, "collapsed": False, "metrics": {}}

        def restore(tree: Any) -> None:
            validated.update(json.loads(tree["state"]))

        # resume
        objects["validation"] = state.Stateful(read=lambda: {"state": json.dumps(validated)}, write=restore)
        pending = PendingHooks()
        objects["pending_hooks"] = pending.stateful()

        status = RunStatus()

        def resume() -> int:
            nonlocal status
            status = read_status(
                folder, fingerprint, settings, network=network, total=plan.total, schedule=plan.learning_rate()
            )
            for line in status.warnings:
                logger.warning("%s", line)
            if status.checkpoint is None:
                if status.complete:
                    network.update(loading.open_network(self.last, mx.float32).parameters())
                    if ema is not None:
                        ema.state["average"] = network.trainable_parameters()
                return 0
            start = checkpoint.load(status.checkpoint, objects, compared=())
            if status.starts_branch:  # the best weights are those of abandoned updates
                validated.update(best=math.inf, without_improvement=0)
            return start

        start, complete = processes.broadcast(lambda: [resume(), status.complete])
        processes.broadcast_state(objects)
        if complete:
            plan.close()
            logger.info("already complete: %s", self.best)
            return self._finish(ema, updates=0, metrics=validated["metrics"])
        if lock is not None:
            run_status.claim(folder, lock)
            run_status.start(folder, fingerprint, settings, status)
        logger.info(
            "%s: %s parameters, %s and %d held out, %s in %s%s",
            settings.name, f"{parameter_count(network):,}", count_text(len(train), "image"), len(held_out),
            count_text(plan.total, "update"),
            count_text(settings.num_epochs, "epoch"), f", resuming after update {start}" if start else "",
        )  # fmt: skip

        # hooks
        best, last = self.best, self.last

        @contextmanager
        def evaluation_mode() -> Iterator[None]:
            """Evaluate with the weights that are saved: averaged ones, if there are any."""
            with ExitStack() as stack:
                if ema is not None:
                    stack.enter_context(ema.swapped_in(network))
                network.eval()
                stack.callback(set_training_mode, network, settings.train)
                yield

        validation = Validation(objective, network, held_out, settings, folder / "samples", processes)

        lines, last_line = 0, 0.0

        def validate(record: Record) -> None:
            with evaluation_mode():
                metrics = validation.measure()
                better = metrics["loss"] < validated["best"]
                if better and processes.is_main:
                    loading.save_network(network, best)
            # all of it after the last step that may fail: then a continued run validates again
            validated["metrics"], validated["best"] = metrics, min(validated["best"], metrics["loss"])
            validated["without_improvement"] = 0 if better else validated["without_improvement"] + 1
            nonlocal lines, last_line
            if lines < _FIRST_LINES or time.monotonic() - last_line > _LINE_INTERVAL or record.update == record.total:
                lines, last_line = lines + 1, time.monotonic()
                logger.info(
                    "epoch %d of %d, held out: %s%s",
                    record.update // plan.per_epoch, settings.num_epochs,
                    metrics_text(validated["metrics"], network.config.latent_channels),
                    " (best so far)" if better else "",
                )  # fmt: skip
            warning = collapse_warning(validated["metrics"], network)
            reported = validated["collapsed"]
            validated["collapsed"] = warning is not None and record.update > max(plan.total / 10, _COLLAPSE_GRACE)
            if validated["collapsed"] and not reported:
                logger.warning("%s", warning)

        trackers: list[TensorBoard] = []

        def preview(record: Record) -> None:
            def draw() -> dict[str, np.ndarray]:
                return validation.draw(record.update) if processes.is_main else {}

            with evaluation_mode():
                pictures = interrupts.interruptible(processes, draw)
            for tracker in trackers:
                for name, picture in pictures.items():
                    tracker.image("held-out", record.update, np.broadcast_to(picture, (*picture.shape[:2], 3)), name)

        def save(updates: int) -> None:
            if not processes.is_main:
                return
            with evaluation_mode():
                loading.save_network(network, last)
            checkpoint.save(folder, updates, objects, fingerprint=fingerprint, total_limit=2)

        def should_stop() -> bool:
            return settings.early_stopping is not None and validated["without_improvement"] >= settings.early_stopping

        def also_at_early_stop(hook: Hook) -> Hook:
            """Tell the hook that the update of an early stop is the last one."""
            return lambda record: hook(dataclasses.replace(record, total=record.update) if should_stop() else record)

        last_update = start

        def stop(record: Record) -> None:
            nonlocal last_update
            if should_stop():
                last_update = record.update
                raise _EarlyStop

        # train; hooks run in this order, so validation and checkpoint come before previews
        epoch = plan.per_epoch
        with ExitStack() as stack:
            stack.callback(plan.close)
            stack.enter_context(awake(settings.caffeinate))
            pace = Pace(plan.total)
            observers: list[Hook] = [pace]
            validation_logs: list[MetricsLog] = []
            if processes.is_main:
                log = stack.enter_context(MetricsLog(folder / "metrics.jsonl", resumed_at=start))
                validation_logs.append(stack.enter_context(MetricsLog(folder / "validation.jsonl", resumed_at=start)))
                fields = Progress(images=settings.batch_size * settings.gradient_accumulation_steps)
                observers += [log, stack.enter_context(ProgressBar(plan.total, start, extra=fields, pace=pace))]
            if processes.is_main and settings.tensorboard:
                trackers.append(stack.enter_context(TensorBoard(folder / "tensorboard", start=start)))
                observers += trackers

            def log_validation(record: Record) -> None:
                for file in validation_logs:
                    file(dataclasses.replace(record, metrics=validated["metrics"]))
                for tracker in trackers:
                    tracker.scalars("validation", record.update, validated["metrics"])

            def seconds_of_validation() -> float:
                """A forward pass takes about a third of an update."""
                return pace.per_update * len(held_out) / plan.images / 3

            def checkpointed(record: Record) -> None:
                save(record.update)

            hooks = [
                pace.timed_every(epoch * settings.val_every, validate, seconds=seconds_of_validation),
                every(epoch * settings.val_every, log_validation),
                also_at_early_stop(pace.timed_every(epoch * settings.save_every, checkpointed)),
                pace.timed_every(settings.save_every_n_steps, checkpointed, last=False),
                also_at_early_stop(
                    pace.timed_every(epoch * settings.samples_every if settings.samples_every else None, preview)
                ),
                pace.timed_every(settings.log_images_every_n_steps, preview, last=False),
                stop,
            ]
            try:
                fit(
                    step=steps,
                    batches=lambda update: plan.batches(update, beta=objective.beta_at(update)),
                    learning_rate=plan.learning_rate(),
                    total=plan.total,
                    start=start,
                    observers=observers,
                    hooks=hooks,
                    checkpoint=save,
                    pending=pending,
                    processes=processes,
                )
                last_update = max(start, plan.total)
            except _EarlyStop:
                logger.info("early stopping: no lower loss in %d validations", validated["without_improvement"])
        if lock is not None:
            run_status.finish(folder, fingerprint, status, plan.total)
        logger.info("best loss %.6g; output in %s", validated["best"], folder)
        return self._finish(ema, updates=last_update - start, metrics=validated["metrics"])

    def _finish(self, ema: EMA | None, *, updates: int, metrics: Mapping[str, float]) -> TrainingResult:
        """The result; the network holds the final weights."""
        if ema is not None:
            self.network.update(ema.state["average"])
        self.network.eval()
        return TrainingResult(best=self.best, last=self.last, folder=self.folder, updates=updates, metrics=metrics)


def _optimizer(settings: VAETrainingSettings) -> Optimizer | Grouped:
    options = {option: getattr(settings, name) for name, option in OPTIMIZER_FLAGS.items()}
    return registry.build(settings.optimizer, **options)
