"""The build's outer loop: updates with a progress bar, checkpoints, and going on where an earlier run stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mflux_vae_train import checkpoint
from mflux_vae_train.state import parameters, tree_of
from mflux_vae_train.step import MicroBatch, Step


def run(
    folder: Path,
    step: Step,
    batch: Callable[[int], Sequence[MicroBatch]],
    rate: Callable[[int], float],
    updates: int,
    every: int,
    fingerprint: Any,
) -> None:
    """Make all updates that `folder`'s newest checkpoint has not seen."""
    objects = {"model": parameters(step.model), "optimizer": tree_of(step.optimizer.state)}
    if step.ema is not None:
        objects["ema"] = tree_of(step.ema.state)
    settings = asdict(fingerprint)
    newest = checkpoint.latest(folder)
    start = checkpoint.load(newest, objects, fingerprint=settings) if newest else 0
    with tqdm(total=updates, initial=start, desc=folder.name, mininterval=5, dynamic_ncols=True) as bar:
        for update in range(start, updates):
            measured = step(update, batch(update), rate(update))
            shown = {name: f"{value:.4g}" for name, value in measured.items() if name != "learning_rate"}
            bar.set_postfix(shown, refresh=False)
            bar.update()
            if (update + 1) % every == 0 or update + 1 == updates:
                checkpoint.save(folder, update + 1, objects, fingerprint=settings, total_limit=2)
