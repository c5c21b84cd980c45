"""Warnings about settings of the autoencoder trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from mflux_vae_train.optimizers.registry import used_by, with_given_rate
from mflux_vae_train.settings.fields import ignored_settings, unused_settings
from mflux_vae_train.vae.config import OPTIMIZER_FLAGS, VAETrainingSettings

_USED_BY: Mapping[str, Mapping[str, Sequence[str]]] = {
    "network": {
        **dict.fromkeys(("batch_norm", "upsampling", "last_conv", "output"), ("flat",)),
        "layers_per_block": ("kl",),
    },
    "loss_type": {
        "beta": ("vae", "tc"),
        **dict.fromkeys(("beta_start", "beta_end", "beta_steps", "beta_cyclical"), ("beta_vae",)),
        "gamma": ("tc",),
        "free_bits": ("vae", "beta_vae"),
    },
    "optimizer": used_by(OPTIMIZER_FLAGS, with_given_rate()),
    "lr_scheduler": {"lr_gamma": ("exponential", "step"), "lr_step_epochs": ("step",)},
}
"""Choosing setting -> setting -> the choices that use it."""


def without_effect(settings: VAETrainingSettings) -> dict[str, str]:
    """Settings that other settings disable -> why."""
    reasons = unused_settings(settings, _USED_BY)
    if settings.lpips is None:
        reasons["lpips_weight"] = "only for --lpips"
    if settings.disc_start is None:
        reasons["disc_weight"] = "only for --disc_start"
    return reasons


_NETWORK = ("network", "hidden_dims", "max_filters", "latent_dim", "batch_norm", "upsampling", "last_conv", "output")
"""Settings that ``--network_config`` and ``--init_from`` replace."""


def _other_network(settings: VAETrainingSettings) -> list[str]:
    """A line if the network does not come from the settings that describe one."""
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    source = next((name for name in ("network_config", "init_from") if getattr(settings, name)), None)
    unused = [f"--{name}" for name in (*_NETWORK, "layers_per_block") if getattr(settings, name) != defaults[name]]
    if source is None or not unused:
        return []
    return [f"no effect: {', '.join(unused)}; the network is that of --{source} {getattr(settings, source)}"]


def config_warnings(settings: VAETrainingSettings) -> list[str]:
    """One line per setting without effect and per combination that is known to fail."""
    lines = [*ignored_settings(settings, without_effect(settings)), *_other_network(settings)]
    beta = settings.beta_end if settings.loss_type == "beta_vae" else settings.beta
    if settings.reduction == "mean" and beta > 0.01:
        lines.append(
            f"--reduction mean with beta {beta:g}: KL is a sum and outweighs the mean error: posterior collapse;"
            " use --reduction sum, or a beta near 1e-4"
        )
    return lines
