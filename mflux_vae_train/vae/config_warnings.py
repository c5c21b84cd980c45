"""What is remarked on in an autoencoder's settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mflux_vae_train.optimizers.registry import used_by, with_given_rate
from mflux_vae_train.settings.fields import ignored_settings
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
"""By setting: those that only some of its values look at."""


def advice(settings: VAETrainingSettings) -> list[str]:
    """One line for each setting without effect, and each combination that is known to end badly: to be logged."""
    reasons: dict[str, str] = {}
    if settings.lpips is None:
        reasons["lpips_weight"] = "it is for --lpips"
    if settings.disc_start is None:
        reasons["disc_weight"] = "it is for --disc_start"
    lines = ignored_settings(settings, _USED_BY, reasons)
    beta = settings.beta_end if settings.loss_type == "beta_vae" else settings.beta
    if settings.reduction == "mean" and beta > 0.01:
        lines.append(
            f"the KL divergence, a sum, weighs {beta:g} beside an error that is a mean over pixels: the posterior will"
            " collapse; take --reduction sum, or a beta near 1e-4"
        )
    return lines
