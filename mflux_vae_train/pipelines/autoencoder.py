"""Another autoencoder in place of the one that a pipeline was published with."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.pretrained.loading import describe, new_network, open_network
from mflux_vae.pretrained.locate import SCALING, locate, not_downloaded
from mflux_vae.vae import VAE
from mflux_vae_train.pipelines.lazy import Lazy

logger = logging.getLogger(__name__)


def open_vae(source: str, replaces: Mapping[str, Any]) -> tuple[Lazy[VAE], dict[str, Any]]:
    """Open an autoencoder from anything that `VAE.from_pretrained` opens. Its weights are read on first use.

    The scaling of latents that a file does not state is that of the replaced autoencoder.

    Args:
        replaces: configuration of the pipeline's autoencoder.

    Returns:
        the autoencoder and its configuration.

    Raises:
        WeightsError: files are missing, broken, or of an unknown kind.
        SettingsError: its latents do not have the shape of the pipeline's.
    """
    try:
        return _open(source, replaces)
    except (SettingsError, WeightsError) as error:
        raise type(error)(f"--vae {source}: {str(error).removeprefix(f'{source}: ')}") from error


def _open(source: str, replaces: Mapping[str, Any]) -> tuple[Lazy[VAE], dict[str, Any]]:
    config, stated = (found := describe(source)).config, found.assumed is None
    if not stated:
        config = config | {name: replaces[name] for name in SCALING if name in replaces}
    ours, theirs = (VAE(network=new_network(each)) for each in (replaces, config))  # lazy, never computed
    if (theirs.spatial_scale, theirs.latent_channels) != (ours.spatial_scale, ours.latent_channels):
        raise SettingsError(
            f"its latents have {theirs.latent_channels} channels at 1/{theirs.spatial_scale} of the size, the model's"
            f" {ours.latent_channels} at 1/{ours.spatial_scale}; give an autoencoder of this kind of model"
        )
    if type(theirs.network) is type(ours.network) and theirs.scaling_factor != ours.scaling_factor:
        logger.warning(
            "--vae %s: its latents are scaled by %g, the model's by %g: it may belong to another model",
            *(source, theirs.scaling_factor, ours.scaling_factor),
        )
    given = None if stated else config
    vae = Lazy(lambda: VAE(network=open_network(source, config=given)), prepare=lambda: locate(source, given))
    if not_downloaded(source) is None:
        vae.get()  # compares names and shapes of its tensors
        vae.release()
    else:
        logger.info("--vae %s: downloaded when it is first used", source)
    return vae, config
