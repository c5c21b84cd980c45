"""Training an autoencoder: from settings to weights, in the order of the steps."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mflux_vae.errors import SettingsError, TrainingError
from mflux_vae.pretrained import loading
from mflux_vae.runtime.device import is_cpu
from mflux_vae.utils.formatting import count_text
from mflux_vae.weights.formats.files import write_text
from mflux_vae_train.checkpointing import checkpoint, state
from mflux_vae_train.checkpointing.lock import Lock
from mflux_vae_train.distributed import interrupts, process_group
from mflux_vae_train.distributed.process_group import IDLE_WARNING, ProcessGroup
from mflux_vae_train.monitoring.progress import ProgressBar
from mflux_vae_train.monitoring.trackers import TensorBoard
from mflux_vae_train.optimizers import registry
from mflux_vae_train.optimizers.base import Optimizer
from mflux_vae_train.optimizers.grouped import Grouped
from mflux_vae_train.settings import flags
from mflux_vae_train.training.ema import EMA
from mflux_vae_train.training.hooks import Hook, MetricsLog, Record, every
from mflux_vae_train.training.loop import fit
from mflux_vae_train.training.pending_hooks import PendingHooks
from mflux_vae_train.training.step import Step
from mflux_vae_train.vae.build import begin_training, build, new_critic, parameter_count
from mflux_vae_train.vae.config import OPTIMIZER_FLAGS, VAETrainingSettings, settings_from_dict
from mflux_vae_train.vae.config_warnings import advice
from mflux_vae_train.vae.data.batches import Source
from mflux_vae_train.vae.dry_run import tried
from mflux_vae_train.vae.evaluation.formatting import Progress, in_words
from mflux_vae_train.vae.evaluation.validation import Validation, collapse
from mflux_vae_train.vae.fingerprint import identity
from mflux_vae_train.vae.network.gradient_checkpointing import recompute_blocks
from mflux_vae_train.vae.objective import AdversarialStep, Objective, critic_loss
from mflux_vae_train.vae.plan import Plan, images_of

logger = logging.getLogger(__name__)

_YOUNG = 50
"""Updates after which a posterior that tells nothing of its image is no longer one that has not begun to."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a run left.

    Attributes:
        best: weights with the lowest validation loss; they know their configuration, and `mflux_vae` opens them.
        last: weights at the end.
        folder: of the run.
        updates: that this call made; 0 where nothing was left to do.
        metrics: of the last validation.
    """

    best: Path
    last: Path
    folder: Path
    updates: int
    metrics: Mapping[str, float]


class _Enough(Exception):
    """Early stopping."""


class VAETrainer:
    """Trains an autoencoder from settings.

    Args:
        config: settings, or a dictionary of some of them, as `get_default_config` gives all.
        source: pictures of your own, in place of what `data` names; `val_share` of them are held out.

    Attributes:
        network: what is trained; after `train` with the weights of the last update, or their moving average.

    Raises:
        InputError: settings or data cannot be used.
    """

    def __init__(self, config: VAETrainingSettings | Mapping[str, Any], source: Source | None = None) -> None:
        self.settings = config if isinstance(config, VAETrainingSettings) else settings_from_dict(config)
        if self.settings.cpu:
            mx.set_default_device(mx.cpu)
        if self.settings.mixed_precision and is_cpu():
            raise SettingsError("--mixed_precision: a CPU computes in float32; leave it out")
        self.source = source
        self.folder = Path(self.settings.output_dir) / "checkpoints" / self.settings.name
        self.best, self.last = (self.folder / f"{which}_model.safetensors" for which in ("best", "last"))
        self.network = build(self.settings)

    def train(self) -> TrainingResult:
        """Trains, or continues where an interrupted run of the same settings stopped.

        Raises:
            SettingsError: the folder holds another run, or cannot be written.
            TrainingError: the loss is not finite, or a checkpoint is broken.
            Interrupted: a signal arrived; what was finished is kept, of training in a checkpoint.
        """
        with process_group.join() as processes, interrupts.handling(processes):
            if self.settings.dry_run:
                metrics = processes.broadcast(lambda: tried(self.settings, self.network, self.folder, self.source))
                return TrainingResult(best=self.best, last=self.last, folder=self.folder, updates=0, metrics=metrics)
            with Lock(self.folder) if processes.is_main else nullcontext() as lock:
                try:
                    return self._train(lock, processes)
                except OSError as error:
                    raise TrainingError(f"{error}; the same command continues where it can be written again") from error

    def _train(self, lock: Lock | None, processes: ProcessGroup) -> TrainingResult:
        settings, network, folder = self.settings, self.network, self.folder
        for line in advice(settings):
            logger.warning("%s", line)

        # data, and how it is cut
        train, held_out = images_of(settings, self.source)
        fingerprint = identity(settings, network, train, held_out)
        processes.assert_equal(fingerprint)
        plan = Plan(settings, train, processes)
        if settings.gradient_accumulation_steps < processes.size:
            logger.warning("%s", IDLE_WARNING % (processes.size, settings.gradient_accumulation_steps, processes.size))

        # what is trained, and how
        begin_training(network, settings.train)
        if settings.gradient_checkpointing:
            recompute_blocks(network)
        ema = EMA(network.trainable_parameters(), settings.ema_decay) if settings.ema_decay else None
        critic = new_critic(settings, network) if settings.disc_start is not None else None
        objective = Objective(settings, network, dataset_size=len(train), critic=critic)
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
        if critic is not None:
            steps = AdversarialStep(
                step, Step(critic, _optimizer(settings), critic_loss, **options), settings.disc_start or 0
            )
            objects["critic"] = state.parameters(critic)
            objects["critic optimizer"] = state.tree_state(steps.critic.optimizer.state)
        watch: dict[str, Any] = {"best": math.inf, "since": 0, "collapsed": False, "metrics": {}}

        def remember(tree: Any) -> None:
            watch.update(json.loads(tree["seen"]))

        # where an earlier part of the run stopped
        objects["watch"] = state.Stateful(read=lambda: {"seen": json.dumps(watch)}, write=remember)
        pending = PendingHooks()
        objects["pending_hooks"] = pending.stateful()

        def resumed() -> int:
            newest = checkpoint.latest(folder)
            options: dict[str, Any] = {"fingerprint": fingerprint, "allow_changes": settings.allow_changes}
            return checkpoint.load(newest, objects, **options) if newest else 0

        start = processes.broadcast(resumed)
        processes.broadcast_state(objects)
        if lock is not None:
            _claim(folder, settings, lock)
        logger.info(
            "%s: %s parameters, %s and %d held out, %s in %s%s",
            settings.name, f"{parameter_count(network):,}", count_text(len(train), "image"), len(held_out),
            count_text(plan.total, "update"),
            count_text(settings.num_epochs, "epoch"), f", going on after update {start}" if start else "",
        )  # fmt: skip

        # what happens beside the updates
        best, last = self.best, self.last

        @contextmanager
        def as_saved() -> Iterator[None]:
            """The network in evaluation, with averaged weights where there are any."""
            with ExitStack() as stack:
                if ema is not None:
                    stack.enter_context(ema.swapped_in(network))
                network.eval()
                stack.callback(begin_training, network, settings.train)
                yield

        validation = Validation(objective, network, held_out, settings, folder / "samples", processes)

        def validate(record: Record) -> None:
            with as_saved():
                watch["metrics"] = validation.measured()
                better = watch["metrics"]["loss"] < watch["best"]
                watch["best"] = min(watch["best"], watch["metrics"]["loss"])
                watch["since"] = 0 if better else watch["since"] + 1
                if better and processes.is_main:
                    loading.save_network(network, best)
            logger.info(
                "epoch %d of %d, held out: %s%s",
                record.update // plan.per_epoch, settings.num_epochs,
                in_words(watch["metrics"], network.config.latent_channels), ", the best so far" if better else "",
            )  # fmt: skip
            warning = collapse(watch["metrics"], network)
            told = watch["collapsed"]
            watch["collapsed"] = warning is not None and record.update > max(plan.total / 10, _YOUNG)
            if watch["collapsed"] and not told:
                logger.warning("%s", warning)

        boards: list[TensorBoard] = []

        def pictures(record: Record) -> None:
            def drawn() -> dict[str, np.ndarray]:
                return validation.pictures(record.update) if processes.is_main else {}

            with as_saved():
                made = interrupts.interruptible(processes, drawn)
            for board in boards:
                for name, picture in made.items():
                    board.image("held-out", record.update, np.broadcast_to(picture, (*picture.shape[:2], 3)), name)

        def save(updates: int) -> None:
            if not processes.is_main:
                return
            with as_saved():
                loading.save_network(network, last)
            checkpoint.save(folder, updates, objects, fingerprint=fingerprint, total_limit=2)

        def enough() -> bool:
            return settings.early_stopping is not None and watch["since"] >= settings.early_stopping

        def ending(hook: Hook) -> Hook:
            """To this hook the update after which it is enough is the last one, as it is."""
            return lambda record: hook(dataclasses.replace(record, total=record.update) if enough() else record)

        made = start

        def stop(record: Record) -> None:
            nonlocal made
            if enough():
                made = record.update
                raise _Enough

        # the updates; of the hooks, what must not be lost comes first
        epochs = plan.per_epoch
        with ExitStack() as stack:
            stack.callback(plan.close)
            observers: list[Hook] = []
            validations: list[MetricsLog] = []
            if processes.is_main:
                log = stack.enter_context(MetricsLog(folder / "metrics.jsonl", resumed_at=start))
                validations.append(stack.enter_context(MetricsLog(folder / "validation.jsonl", resumed_at=start)))
                also = Progress(images=settings.batch_size * settings.gradient_accumulation_steps)
                observers += [log, stack.enter_context(ProgressBar(plan.total, start, extra=also))]
            if processes.is_main and settings.tensorboard:
                boards.append(stack.enter_context(TensorBoard(folder / "tensorboard", start=start)))
                observers += boards

            def note(record: Record) -> None:
                for file in validations:
                    file(dataclasses.replace(record, metrics=watch["metrics"]))
                for board in boards:
                    board.scalars("validation", record.update, watch["metrics"])

            hooks = [
                every(epochs * settings.val_every, validate),
                every(epochs * settings.val_every, note),
                ending(every(epochs * settings.save_every, lambda record: save(record.update))),
                every(settings.save_every_n_steps, lambda record: save(record.update), last=False),
                ending(every(epochs * settings.samples_every if settings.samples_every else None, pictures)),
                every(settings.log_images_every_n_steps, pictures, last=False),
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
                made = max(start, plan.total)
            except _Enough:
                logger.info("no better loss in %d validations: that is enough", watch["since"])
        if ema is not None:
            network.update(ema.state["average"])
        network.eval()
        logger.info("best loss %.6g; see %s", watch["best"], folder)
        return TrainingResult(best=best, last=last, folder=folder, updates=made - start, metrics=watch["metrics"])


def _optimizer(settings: VAETrainingSettings) -> Optimizer | Grouped:
    given = {option: getattr(settings, name) for name, option in OPTIMIZER_FLAGS.items()}
    return registry.build(settings.optimizer, **given)


def _claim(folder: Path, settings: VAETrainingSettings, lock: Lock) -> None:
    """Takes the folder's lock and writes settings.yaml, which reproduces the run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        checkpoint.clean_up(folder)
        write_text(folder / "settings.yaml", flags.to_yaml(dataclasses.replace(settings, allow_changes=False)))
    except OSError as error:
        raise SettingsError(f"--output_dir: {folder} cannot be written ({error.strerror})") from error
