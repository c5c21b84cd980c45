"""A training's dry run: what would happen, and the loss of the first batch. Nothing is written or changed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mflux_vae.utils.formatting import count_text
from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.vae.build import latent_shape, parameter_count
from mflux_vae_train.vae.config import VAETrainingSettings
from mflux_vae_train.vae.config_warnings import advice
from mflux_vae_train.vae.data.batches import Source
from mflux_vae_train.vae.evaluation.formatting import in_words
from mflux_vae_train.vae.objective import Objective
from mflux_vae_train.vae.plan import Plan, images_of

logger = logging.getLogger(__name__)


def tried(settings: VAETrainingSettings, network: Any, folder: Path, source: Source | None = None) -> dict[str, float]:
    """Says it, and gives what was measured of the first micro-batch.

    Args:
        folder: of the run.
        source: images in place of what the settings name.
    """
    for line in advice(settings):
        logger.warning("%s", line)
    train, held_out = images_of(settings, source)
    plan = Plan(settings, train)
    objective = Objective(settings, network, dataset_size=len(train))
    batch = plan.batches(0, beta=objective.beta_at(0))[0]
    plan.close()
    loss, told = objective(network, batch.arrays)
    metrics = {name: float(value) for name, value in {"loss": loss, **told}.items()}
    shape = " x ".join(map(str, latent_shape(network, settings.image_size)))
    newest = checkpoint.latest(folder)
    for line in (
        f"{settings.name}: {parameter_count(network):,} parameters, latents of {shape}",
        f"{count_text(len(train), 'image')} and {len(held_out)} held out, {plan.images} in an update",
        f"{count_text(plan.total, 'update')} in {count_text(settings.num_epochs, 'epoch')}, into {folder}",
        f"would go on from {newest}" if newest else "would begin",
        f"first batch: {in_words(metrics, network.config.latent_channels)}",
    ):
        logger.info("%s", line)
    return metrics
