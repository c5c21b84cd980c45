"""Run the training loop with progress bar, metrics, checkpoints and resuming."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.checkpointing.state import parameters, tree_state
from mflux_vae_train.monitoring.progress import ProgressBar
from mflux_vae_train.tiny_world.recipe import Round
from mflux_vae_train.training.hooks import MetricsLog, every
from mflux_vae_train.training.loop import fit
from mflux_vae_train.training.step import MicroBatch, Step


def run(
    folder: Path,
    step: Step,
    batch: Callable[[int], Sequence[MicroBatch]],
    rate: Callable[[int], float],
    updates: int,
    checkpoint_every: int,
    settings: Round,
) -> None:
    """Train up to `updates`, from the newest checkpoint in `folder`."""
    objects = {"model": parameters(step.model), "optimizer": tree_state(step.optimizer.state)}
    if step.ema is not None:
        objects["ema"] = tree_state(step.ema.state)
    identity = asdict(settings)
    newest = checkpoint.latest(folder)
    start = checkpoint.load(newest, objects, fingerprint=identity) if newest else 0

    def save(update: int) -> None:
        checkpoint.save(folder, update, objects, fingerprint=identity, total_limit=2)

    with MetricsLog(folder / "metrics.jsonl", resumed_at=start) as log, ProgressBar(updates, start) as bar:
        fit(
            step=step,
            batches=batch,
            learning_rate=rate,
            total=updates,
            start=start,
            observers=[log, bar],
            hooks=[every(checkpoint_every, lambda record: save(record.update))],
            checkpoint=save,
        )
