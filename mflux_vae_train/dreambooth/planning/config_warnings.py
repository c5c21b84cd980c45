"""What is remarked on in the settings of a run: to be logged, never to forbid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mflux_vae_train.dreambooth.config import OPTIMIZER_FLAGS, DreamBoothSettings
from mflux_vae_train.dreambooth.optimization.optimizer import finds_rate
from mflux_vae_train.dreambooth.planning.preservation import Kind
from mflux_vae_train.optimizers.registry import used_by, with_default_rate
from mflux_vae_train.pipelines.noise import SCHEMES
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.settings.fields import ignored_settings

# Ranges in which the documented recipe was tried. Outside them a run is unusual, not wrong. Pipelines have their own.
USUAL = {
    "train_batch_size": (1, 4),
    "gradient_accumulation_steps": (1, 8),
    "num_class_images": (5, 100),
}
USUAL_GUIDANCE = (5.0, 10.0)
USUAL_RATE = {"full": (1e-6, 1e-5), "lora": (1e-5, 1e-3)}
"""By train mode: an adapter, which begins at zero, wants more than weights that are there."""
USUAL_FACTOR = (0.1, 2.0)
"""A factor on the rate that it finds."""

PRODIGY_SETTLES = {"constant": 300, "constant_with_warmup": 300}
PRODIGY_SETTLES_ELSE = 600
"""Updates that a run with Prodigy should have, by schedule. On the embedded pipeline it looked for its rate for 150;
over 300 with a cosine, which lowers the rate meanwhile, the subject was not learnt, and at a constant rate it was."""

_USED_BY: Mapping[str, Mapping[str, Sequence[str]]] = {
    "weighting_scheme": {
        name: tuple(scheme for scheme, parameters in SCHEMES.items() if name in parameters)
        for name in ("logit_mean", "logit_std", "mode_scale")
    },
    "lr_scheduler": {"lr_num_cycles": ("cosine_with_restarts",), "lr_power": ("polynomial",)},
    "optimizer": used_by(OPTIMIZER_FLAGS, with_default_rate()),
}
"""By setting: those that only some of its values look at."""


def advice(settings: DreamBoothSettings, recommended: Recommended, *, preserved: Kind, updates: int) -> list[str]:
    """One line for each setting outside its usual range, without effect, or known to end badly.

    Args:
        preserved: whether, and by what, the class is kept alive.
        updates: of the whole run.
    """
    harmful = _harmful(settings, recommended)
    return [
        *_unusual(settings, {} if harmful else {"guidance": _usual_guidance(recommended)}),
        *_without_use(settings, recommended, preserved),
        *harmful,
        *_too_short(settings, updates),
    ]


def _unusual(settings: DreamBoothSettings, more: Mapping[str, tuple[float, float]]) -> list[str]:
    """One line for each setting outside its usual range, of which `more` are given here."""
    lines = []
    factor = finds_rate(settings)
    rates = USUAL_FACTOR if factor else USUAL_RATE[settings.train_mode]
    with_what = f" with --optimizer {settings.optimizer}" if factor else f" with --train_mode {settings.train_mode}"
    for name, (low, high) in {**USUAL, "learning_rate": rates, **more}.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= high:
            where = with_what if name == "learning_rate" else ""
            lines.append(f"--{name} is {value:g}; usual{where} is {low:g} to {high:g}")
    return lines


def _usual_guidance(recommended: Recommended) -> tuple[float, float]:
    low, high = recommended.usual_guidance or USUAL_GUIDANCE
    return min(low, recommended.guidance), max(high, recommended.guidance)


def _without_use(settings: DreamBoothSettings, recommended: Recommended, preserved: Kind) -> list[str]:
    """One line for each setting that others leave without effect."""
    settings = replace(settings, weighting_scheme=settings.weighting_scheme or recommended.weighting_scheme)
    reasons: dict[str, str] = {}
    own = {"text_encoder_lr": "--learning_rate", "adam_weight_decay_text_encoder": "--adam_weight_decay"}
    if not settings.train_text_encoder:
        reasons |= dict.fromkeys(own, "it is for --train_text_encoder")
    elif finds_rate(settings):
        reasons |= {
            name: f"--optimizer {settings.optimizer} has one for all parameters, {other}" for name, other in own.items()
        }
    if settings.center_crop:
        reasons["num_crops"] = "it is for --no_center_crop"
    if settings.report_to in (None, "none"):
        reasons["logging_dir"] = "it is for --report_to"
    if preserved != "class_images":
        pictures = ("class_data_dir", "num_class_images", "sample_batch_size")
        reasons |= dict.fromkeys(pictures, f"--prior_preservation {preserved} takes no class pictures")
    if preserved == "none":
        reasons["prior_loss_weight"] = "there is no prior preservation"
    return ignored_settings(settings, _USED_BY, reasons)


def _harmful(settings: DreamBoothSettings, recommended: Recommended) -> list[str]:
    """A line where guidance would spoil the pictures of a model that was distilled to do without."""
    most = recommended.most_guidance
    if settings.guidance is None or most is None or settings.guidance <= most:
        return []
    return [
        f"--guidance {settings.guidance:g}: this model was distilled to draw without guidance; above {most:g} class"
        " pictures and previews take twice as long and come out garish (training does not depend on it)"
    ]


def _too_short(settings: DreamBoothSettings, updates: int) -> list[str]:
    settled = PRODIGY_SETTLES.get(settings.lr_scheduler, PRODIGY_SETTLES_ELSE)
    if not finds_rate(settings) or updates >= settled:
        return []
    return [
        f"--optimizer {settings.optimizer} begins with tiny steps and takes a hundred updates or more to find its rate;"
        f" this run has {updates} with --lr_scheduler {settings.lr_scheduler}: it may learn little"
    ]
