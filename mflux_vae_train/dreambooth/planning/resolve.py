"""What the user left open, decided: by the pipeline's recommendations, the prompt and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae_train.dreambooth.config import Concept, DreamBoothSettings
from mflux_vae_train.dreambooth.data.batches import Plan
from mflux_vae_train.dreambooth.optimization.optimizer import TEXT_ENCODER_SHARE, default_rate, finds_rate
from mflux_vae_train.dreambooth.planning.config_warnings import advice
from mflux_vae_train.dreambooth.planning.preservation import OUTPUT_WEIGHT, Kind, choose_preservation
from mflux_vae_train.pipelines.noise import NoiseSampling
from mflux_vae_train.pipelines.protocol import Recommended

PREVIEWS_IN_A_RUN = 8


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings:
    """A run without an open question.

    Attributes:
        settings: as the user gave them, with everything decided that was left open.
        plan: samples, updates and micro-batches that follow.
        notes: what was decided and why, one line each, to be said at the start.
        warnings: what is unusual, one line each.
        preservation: whether, and by what, the class is kept alive.
        concepts: what is learnt, see `preservation.Preservation`.
        prior_loss_weight: None without prior preservation.
        sampling: how noise levels are drawn; None for as the pipeline does by itself.
        rank, lora_alpha: None where all weights are trained.

    The other attributes repeat settings, as the numbers and texts that they are by now.
    """

    settings: DreamBoothSettings
    plan: Plan
    notes: Sequence[str]
    warnings: Sequence[str]
    resolution: int
    learning_rate: float
    guidance: float
    caption_dropout: float
    validation_prompt: Sequence[str]
    validation_steps: int
    preservation: Kind
    concepts: Sequence[Concept]
    sampling: NoiseSampling | None
    prior_loss_weight: float | None
    rank: int | None
    lora_alpha: float | None


def choose_resolution(settings: DreamBoothSettings, recommended: Recommended) -> int:
    """Side of the training pictures.

    Raises:
        SettingsError: the pipeline cannot do it.
    """
    resolution, multiple = settings.resolution or recommended.resolution, recommended.size_multiple
    if resolution % multiple:
        below, above = resolution // multiple * multiple, -(-resolution // multiple) * multiple
        near = f"{below} or {above}" if below else f"{above}"
        raise SettingsError(f"--resolution is {resolution}; a multiple of {multiple} is needed, such as {near}")
    return resolution


def choose(settings: DreamBoothSettings, recommended: Recommended, *, pictures: int) -> ResolvedSettings:
    """Decides what is open.

    Args:
        pictures: number of instance pictures in an epoch, repeats counted.

    Raises:
        SettingsError: prior preservation is asked for without a class prompt, or the pipeline cannot do the
            resolution.
    """
    plan = _plan(settings, pictures)
    preservation = choose_preservation(settings)
    warnings = advice(settings, recommended, preserved=preservation.kind, updates=plan.updates)
    notes, first = preservation.notes, preservation.concepts[0]
    if settings.scale_lr:
        rate, at_once = _rate(settings, recommended), plan.batch_size * plan.accumulation
        settings = replace(settings, learning_rate=rate * at_once, scale_lr=False)
        notes.append(f"learning rate {rate:g} x {at_once} pictures in an update: {rate * at_once:g}")
    lora, prior = settings.train_mode == "lora", preservation.kind != "none"
    rank = settings.rank or recommended.rank
    suggested: dict[str, Any] = {
        "resolution": choose_resolution(settings, recommended),
        "learning_rate": _rate(settings, recommended),
        "guidance": recommended.guidance,
        "caption_dropout": recommended.caption_dropout,
        "validation_prompt": tuple(dict.fromkeys(one.instance_prompt for one in settings.subjects)),
        "validation_steps": _validation_steps(settings, plan, pictures),
        "rank": rank if lora else None,
        "lora_alpha": float(rank) if lora else None,
        "text_encoder_lr": _text_encoder_rate(settings, recommended),
        "prior_loss_weight": _prior_weight(preservation.kind, recommended),
        "class_data_dir": first.class_data_dir,
        "weighting_scheme": recommended.weighting_scheme,
    }
    left_open = {
        name: value for name, value in suggested.items() if value is not None and getattr(settings, name) is None
    }
    if left_open:
        said = ", ".join(f"{name} {_shown(value)}" for name, value in left_open.items())
        notes = [f"chosen: {said}", *notes]
    decided = {name: getattr(settings, name) for name in suggested} | left_open
    final = replace(
        settings,
        **left_open,
        class_prompt=first.class_prompt,
        concepts=preservation.concepts if settings.concepts else None,
        prior_preservation=preservation.kind,
        with_prior_preservation=preservation.kind == "class_images",
        max_train_steps=plan.updates,
        validation_epochs=None,
    )
    del decided["class_data_dir"], decided["text_encoder_lr"]
    sampling = _sampling(settings, scheme=decided.pop("weighting_scheme"), recommended=recommended)
    return ResolvedSettings(
        **{**decided, "prior_loss_weight": decided["prior_loss_weight"] if prior else None},
        settings=final,
        plan=plan,
        notes=notes,
        warnings=warnings,
        preservation=preservation.kind,
        concepts=preservation.concepts,
        sampling=sampling,
    )


def _prior_weight(kind: Kind, recommended: Recommended) -> float | None:
    weights = {"class_images": recommended.prior_loss_weight, "dop": OUTPUT_WEIGHT}
    return weights.get(kind)


def _rate(settings: DreamBoothSettings, recommended: Recommended) -> float:
    return default_rate(settings, recommended) if settings.learning_rate is None else settings.learning_rate


def _text_encoder_rate(settings: DreamBoothSettings, recommended: Recommended) -> float | None:
    """None where there is none of its own."""
    if not settings.train_text_encoder or finds_rate(settings):
        return None
    return _rate(settings, recommended) * TEXT_ENCODER_SHARE


def _validation_steps(settings: DreamBoothSettings, plan: Plan, pictures: int) -> int:
    """Updates between previews."""
    if settings.validation_epochs is None:
        return max(1, -(-plan.updates // PREVIEWS_IN_A_RUN))
    return max(1, round(settings.validation_epochs * pictures / (plan.batch_size * plan.accumulation)))


def _plan(settings: DreamBoothSettings, pictures: int) -> Plan:
    batch_size, accumulation = settings.train_batch_size or 1, settings.gradient_accumulation_steps
    if settings.num_train_epochs is None:
        samples = settings.max_train_steps * batch_size * accumulation
    else:
        samples = settings.num_train_epochs * pictures
    return Plan(samples=samples, batch_size=batch_size, accumulation=accumulation)


def _sampling(settings: DreamBoothSettings, *, scheme: Any, recommended: Recommended) -> NoiseSampling | None:
    if scheme is None:
        return None
    asked = NoiseSampling(
        scheme=scheme, logit_mean=settings.logit_mean, logit_std=settings.logit_std, mode_scale=settings.mode_scale
    )
    own = recommended.weighting_scheme
    return None if own is not None and asked == NoiseSampling(scheme=own) else asked


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_shown, value))
    if isinstance(value, float):
        return f"{value:g}"
    return repr(value) if isinstance(value, str) else str(value)
