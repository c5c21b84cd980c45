"""Warnings about the settings of a run. They are logged and forbid nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mflux_vae_train.dreambooth.config import OPTIMIZER_FLAGS, DreamBoothSettings
from mflux_vae_train.dreambooth.optimization.optimizer import default_rate, finds_rate
from mflux_vae_train.dreambooth.planning.preservation import Kind
from mflux_vae_train.optimizers.registry import used_by, with_default_rate
from mflux_vae_train.pipelines.noise import SCHEMES
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.settings.fields import ignored_settings, unused_settings
from mflux_vae_train.training.lr_schedule import schedule_warnings

USUAL = {
    "train_batch_size": (1, 4),
    "gradient_accumulation_steps": (1, 8),
    "num_class_images": (5, 100),
}
"""Ranges in which the documented recipe was tested. A run outside them is unusual, not wrong."""
USUAL_GUIDANCE = (5.0, 10.0)
USUAL_RATE = {"full": (1e-6, 1e-5), "lora": (1e-5, 1e-3)}
"""By train mode. An adapter starts at zero and needs a higher rate than pretrained weights."""
USUAL_FACTOR = (0.1, 2.0)
"""A factor on the rate that an optimizer finds."""

PRODIGY_UPDATES = {"constant": 300, "constant_with_warmup": 300}
PRODIGY_UPDATES_ELSE = 600
"""Minimum length of a run with Prodigy, by schedule. On the embedded pipeline it searched for its rate for 150 updates.
With 300 updates and a cosine, which lowers the rate meanwhile, the subject was not learned; at a constant rate it was.
"""

_USED_BY: Mapping[str, Mapping[str, Sequence[str]]] = {
    "weighting_scheme": {
        name: tuple(scheme for scheme, parameters in SCHEMES.items() if name in parameters)
        for name in ("logit_mean", "logit_std", "mode_scale")
    },
    "lr_scheduler": {"lr_num_cycles": ("cosine_with_restarts",), "lr_power": ("polynomial",)},
    "optimizer": used_by(OPTIMIZER_FLAGS, with_default_rate()),
}
"""By setting: other settings that only some of its values read."""


def config_warnings(
    settings: DreamBoothSettings,
    recommended: Recommended,
    *,
    preservation: Kind,
    updates: int,
    per_update: int = 1,
    drawing: Recommended | None = None,
) -> list[str]:
    """One line for each setting outside its usual range, without effect, or known to give bad results.

    Args:
        settings: as the user gave them.
        updates: of the whole run.
        per_update: instance images of an update.
        drawing: recommendations of the model that draws class images and previews; None for the trained one.
    """
    drawing = drawing or recommended
    low, high = drawing.usual_guidance or USUAL_GUIDANCE
    guidance = min(low, drawing.guidance), max(high, drawing.guidance)
    distilled = _distilled(settings, drawing)
    return [
        *_unusual(settings, {} if distilled else {"guidance": guidance}),
        *_unusual_rate(settings, recommended, per_update),
        *_schedule(settings, updates),
        *ignored_settings(settings, without_effect(settings, recommended, preservation=preservation, updates=updates)),
        *distilled,
        *_train_instead(settings, recommended),
        *_too_short(settings, updates),
    ]


def _unusual(settings: DreamBoothSettings, more: Mapping[str, tuple[float, float]]) -> list[str]:
    """One line for each setting outside its usual range; `more` has ranges that depend on the pipeline."""
    return [
        f"--{name} is {value:g}; usual is {low:g} to {high:g}"
        for name, (low, high) in {**USUAL, **more}.items()
        if (value := getattr(settings, name)) is not None and not low <= value <= high
        if (name, value) != ("num_class_images", 0)  # no prior preservation
    ]


def _unusual_rate(settings: DreamBoothSettings, recommended: Recommended, per_update: int) -> list[str]:
    """A line if the peak learning rate is outside its usual range and not the one that the pipeline recommends."""
    default = default_rate(settings, recommended)
    rate = default if settings.learning_rate is None else settings.learning_rate
    rate *= per_update if settings.scale_lr else 1
    factor = finds_rate(settings)
    low, high = USUAL_FACTOR if factor else USUAL_RATE[settings.train_mode]
    if low <= rate <= high or rate == default:
        return []
    scaled = f" after --scale_lr ({per_update} images per update)" if settings.scale_lr else ""
    kind = f"--optimizer {settings.optimizer}" if factor else f"--train_mode {settings.train_mode}"
    return [f"--learning_rate is {rate:g}{scaled}; usual with {kind} is {low:g} to {high:g}"]


def _schedule(settings: DreamBoothSettings, updates: int) -> list[str]:
    warmup, cycles = settings.lr_warmup_steps, settings.lr_num_cycles
    return schedule_warnings(total=updates, warmup=warmup, shape=settings.lr_scheduler, cycles=cycles)


def without_effect(
    settings: DreamBoothSettings, recommended: Recommended, *, preservation: Kind, updates: int
) -> dict[str, str]:
    """Settings that other settings disable -> why."""
    settings = replace(settings, weighting_scheme=settings.weighting_scheme or recommended.weighting_scheme)
    reasons = unused_settings(settings, _USED_BY)
    shared = {"text_encoder_lr": "--learning_rate", "adam_weight_decay_text_encoder": "--adam_weight_decay"}
    if not settings.train_text_encoder:
        reasons |= dict.fromkeys(shared, "it is for --train_text_encoder")
    elif finds_rate(settings):
        reasons |= {
            name: f"--optimizer {settings.optimizer} uses {flag} for all weights" for name, flag in shared.items()
        }
    if settings.center_crop:
        reasons["num_crops"] = "it is for --no_center_crop"
    if settings.num_train_epochs is not None and settings.max_train_steps != updates:
        reasons["max_train_steps"] = f"--num_train_epochs {settings.num_train_epochs} is {updates} updates"
    if settings.validation_share is None and not any(one.validation_data_dir for one in settings.subjects):
        reasons["validation_loss_steps"] = "there are no held-out images"
    if settings.report_to in (None, "none"):
        reasons["logging_dir"] = "it is for --report_to"
    if preservation != "class_images":
        images = ("class_data_dir", "num_class_images", "sample_batch_size")
        reasons |= dict.fromkeys(images, f"--prior_preservation {preservation} uses no class images")
        if settings.num_class_images == 0:
            del reasons["num_class_images"]
        if settings.num_validation_images == 0:
            drawn = ("preview_model", "num_inference_steps")
            reasons |= dict.fromkeys(drawn, "there are no previews and no class images")
    if preservation == "none":
        reasons |= dict.fromkeys(("prior_loss_weight", "class_prompt"), "there is no prior preservation")
    return reasons


def _distilled(settings: DreamBoothSettings, recommended: Recommended) -> list[str]:
    """A line if the model was distilled to sample without guidance, and guidance would harm its images."""
    limit = recommended.most_guidance
    if settings.guidance is None or limit is None or settings.guidance <= limit:
        return []
    return [
        f"--guidance {settings.guidance:g}: this model was distilled to sample without guidance; above {limit:g} class"
        " images and previews take twice as long and look garish (training does not depend on it)"
    ]


def _train_instead(settings: DreamBoothSettings, recommended: Recommended) -> list[str]:
    if recommended.train_instead is None or settings.assistant_lora is not None:
        return []
    base = f"train --model {recommended.train_instead} --preview_model {settings.model}"
    cure = f"{base}; its adapter fits this model"
    if recommended.assistant_lora is not None:
        cure = f"give --assistant_lora {recommended.assistant_lora}, or train --model {recommended.train_instead}"
    return [f"this model was distilled to {recommended.steps} steps, which training undoes: {cure}"]


def _too_short(settings: DreamBoothSettings, updates: int) -> list[str]:
    if not finds_rate(settings) or updates >= PRODIGY_UPDATES.get(settings.lr_scheduler, PRODIGY_UPDATES_ELSE):
        return []
    return [
        f"--optimizer {settings.optimizer} starts with tiny steps and takes a hundred updates or more to find its rate;"
        f" this run has {updates} with --lr_scheduler {settings.lr_scheduler}: it may learn little"
    ]
