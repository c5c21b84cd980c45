"""Families of autoencoders: configuration, network, and key tables by naming. A new network is one row here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import SettingsError
from mflux_vae.networks.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from mflux_vae.networks.flux2 import AutoencoderKLFlux2, AutoencoderKLFlux2Config
from mflux_vae.networks.laq import LAQConfig, LatentActionQuantizer
from mflux_vae.networks.plain import PlainAutoencoder, PlainConfig
from mflux_vae.networks.tiny import AutoencoderTiny, AutoencoderTinyConfig
from mflux_vae.networks.vector_latent import FlatAutoencoder, FlatConfig
from mflux_vae.networks.video.taehv import TAEHV, TAEHVConfig
from mflux_vae.networks.video.wan import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImageConfig,
    AutoencoderKLWan,
    AutoencoderKLWanConfig,
)
from mflux_vae.runtime.threads import exclusive
from mflux_vae.weights.keymaps import wan
from mflux_vae.weights.keymaps.compvis import bfl, compvis
from mflux_vae.weights.keymaps.diffusers import AUTOENCODER_KL, SAME_NAMES
from mflux_vae.weights.keymaps.lapa import LAPA
from mflux_vae.weights.keymaps.mlx_examples import MLX_EXAMPLES, NAMING
from mflux_vae.weights.keymaps.pytorch_vae import FLAT, pytorch_vae
from mflux_vae.weights.keymaps.rules import Rule
from mflux_vae.weights.keymaps.taesd import taesd

Table: TypeAlias = "Sequence[Rule] | Callable[[Iterable[str]], Sequence[Rule]]"


_MAX_VALUE = 2**16
"""Largest integer in a configuration."""


@dataclass(frozen=True)
class Family:
    """A family of autoencoders.

    Attributes:
        config: configuration class with `from_dict` and `to_dict` for a config.json.
        network: network class, constructed from a configuration.
        tables: key tables by naming (`diffusers` for folders), or functions of the keys that return one.
        unused: pattern of our names of tensors in files that the network does not use, for such a family.
    """

    config: Any
    network: Any
    tables: Mapping[str, Table]
    unused: str = ""

    def build(self, config: Mapping[str, Any]) -> nn.Module:
        """Build an untrained network from the content of a config.json.

        Raises:
            SettingsError: an unsupported or invalid configuration.
        """
        name = self.network.__name__
        numbers = [n for value in config.values() for n in (value if isinstance(value, list) else [value])]
        if huge := [n for n in numbers if isinstance(n, int) and n > _MAX_VALUE]:
            raise SettingsError(f"{name}: {huge[0]} in its configuration is too large")
        try:
            return self.network(self.config.from_dict(config))
        except (TypeError, ValueError, ArithmeticError) as error:
            reason = str(error).partition("\n")[0]
            raise SettingsError(f"{name}: invalid configuration ({reason})") from error
        finally:
            # evaluate, or unevaluated draws of many networks exceed MLX's recursion limit
            with exclusive():
                mx.eval(mx.random.state)

    def rules(self, naming: str, keys: Iterable[str]) -> Sequence[Rule]:
        """Key table for a network with these keys."""
        table = self.tables[naming]
        return table(keys) if callable(table) else table

    def renaming(self, naming: str, keys: Iterable[str]) -> Sequence[Rule]:
        """`rules` that leave the tensors as they are."""
        return [replace(rule, to_mlx=None, from_mlx=None) for rule in self.rules(naming, keys)]

    def used(self, key: str) -> bool:
        """Whether the network uses the tensor with this name of ours."""
        return not self.unused or re.fullmatch(self.unused, key) is None


_KL: dict[str, Table] = {"diffusers": AUTOENCODER_KL, "compvis": compvis, "bfl": bfl}
_FLAT: dict[str, Table] = {"diffusers": FLAT, "pytorch-vae": pytorch_vae, NAMING: MLX_EXAMPLES}
_WAN: dict[str, Table] = {"diffusers": wan.DIFFUSERS, "wan": wan.wan}

FAMILIES = {
    "AutoencoderKL": Family(AutoencoderKLConfig, AutoencoderKL, _KL),
    "AutoencoderKLFlux2": Family(AutoencoderKLFlux2Config, AutoencoderKLFlux2, _KL),
    "AutoencoderKLQwenImage": Family(AutoencoderKLQwenImageConfig, AutoencoderKLQwenImage, _WAN, wan.UNUSED),
    "AutoencoderKLWan": Family(AutoencoderKLWanConfig, AutoencoderKLWan, _WAN, wan.UNUSED),
    "AutoencoderTiny": Family(AutoencoderTinyConfig, AutoencoderTiny, {"diffusers": SAME_NAMES, "taesd": taesd}),
    "FlatAutoencoder": Family(FlatConfig, FlatAutoencoder, _FLAT),
    "LatentActionQuantizer": Family(LAQConfig, LatentActionQuantizer, {"diffusers": LAPA, "lapa": LAPA}),
    "PlainAutoencoder": Family(PlainConfig, PlainAutoencoder, {"diffusers": SAME_NAMES}),
    "TAEHV": Family(TAEHVConfig, TAEHV, {"diffusers": SAME_NAMES}),
}
"""Families by the `_class_name` of a config.json (`locate.family_of`)."""
