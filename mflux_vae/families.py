"""The kinds of autoencoders: how each is built from its configuration, and how its weights may be named on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from mflux_vae.networks.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mflux_vae.networks.plain import PlainAutoencoder, PlainConfig
from mflux_vae.weights.diffusers import AUTOENCODER_KL, SAME_NAMES
from mflux_vae.weights.rules import Rule


@dataclass(frozen=True)
class Family:
    """A kind of autoencoder.

    Attributes:
        config: its configuration's class: `from_dict` reads a config.json, `to_dict` writes one.
        network: its class, built from a configuration.
        tables: key tables by naming; `diffusers` is the one of folders.
    """

    config: Any
    network: Any
    tables: Mapping[str, Sequence[Rule]]

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """An untrained network as a config.json describes it; a SettingsError where it does not have what is asked."""
        return self.network(self.config.from_dict(config))


FAMILIES = {
    "AutoencoderKL": Family(AutoencoderKLConfig, AutoencoderKL, {"diffusers": AUTOENCODER_KL}),
    "PlainAutoencoder": Family(PlainConfig, PlainAutoencoder, {"diffusers": SAME_NAMES}),
}
"""By the `_class_name` of config.json."""
