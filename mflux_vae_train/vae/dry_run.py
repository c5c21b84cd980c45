"""Dry run: log the plan of a training run and the loss of the first batch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mflux_vae.utils.formatting import count_text
from mflux_vae_train.monitoring.trackers import requested_trackers
from mflux_vae_train.vae.build import latent_shape, parameter_count, set_training_mode
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.config_warnings import config_warnings
from mflux_vae_train.vae.data.batches import Source
from mflux_vae_train.vae.evaluation.formatting import metrics_text
from mflux_vae_train.vae.fingerprint import run_identity
from mflux_vae_train.vae.objective import Objective
from mflux_vae_train.vae.plan import Plan, open_images
from mflux_vae_train.vae.run_status import read_status

logger = logging.getLogger(__name__)


def dry_run(
    settings: VAETrainingSettings, network: Any, folder: Path, source: Source | None = None
) -> dict[str, float]:
    """Log the plan and return the metrics of the first micro-batch. Writes nothing.

    Args:
        folder: the run folder.
        source: images that replace `settings.data`.
    """
    requested_trackers("tensorboard" if settings.tensorboard else None)
    for line in config_warnings(settings):
        logger.warning("%s", line)
    train, held_out = open_images(settings, source)
    plan = Plan(settings, train)
    for line in plan.warnings():
        logger.warning("%s", line)
    objective = Objective(settings, network, dataset_size=len(train))
    batch = plan.batches(0, beta=objective.beta_at(0))[0]
    plan.close()
    loss, others = objective(network, batch.arrays)
    metrics = {name: float(value) for name, value in {"loss": loss, **others}.items()}
    shape = " x ".join(map(str, latent_shape(network, settings.image_size)))
    identity = run_identity(settings, network, train, held_out)
    set_training_mode(network, settings.train)
    status = read_status(folder, identity, settings, network=network, total=plan.total, schedule=plan.learning_rate())
    for line in status.warnings:
        logger.warning("%s", line)
    if status.complete:
        would = f"already complete: {folder}"
    elif status.checkpoint is None:
        would = "would start a new run"
    else:
        would = f"would resume from {status.checkpoint}"
    for line in (
        f"{settings.name}: {parameter_count(network):,} parameters, latents of {shape}",
        f"{count_text(len(train), 'image')} and {len(held_out)} held out, {plan.images} per update",
        f"{count_text(plan.total, 'update')} in {count_text(settings.num_epochs, 'epoch')}, output in {folder}",
        would,
        f"first batch: {metrics_text(metrics, network.config.latent_channels)}",
    ):
        logger.info("%s", line)
    return metrics
