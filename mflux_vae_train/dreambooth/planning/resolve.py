"""Answer every question that the settings leave open: from the pipeline's recommendations, the prompts, the images."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.batches import Plan
from mflux_vae_train.dreambooth.data.dataset import InstanceDataset
from mflux_vae_train.dreambooth.data.encoding import images_per_batch
from mflux_vae_train.dreambooth.optimization.optimizer import TEXT_ENCODER_SHARE, default_rate, finds_rate
from mflux_vae_train.dreambooth.planning.config_warnings import config_warnings
from mflux_vae_train.dreambooth.planning.preservation import DOP_WEIGHT, Kind, resolve_preservation
from mflux_vae_train.dreambooth.planning.prompt_checks import fill_placeholders
from mflux_vae_train.monitoring import trackers
from mflux_vae_train.pipelines.noise import NoiseSampling
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.settings.origins import origins_of
from mflux_vae_train.training.lr_schedule import warmup_warnings

PREVIEWS_PER_RUN = 8

_DEFAULTS = {field.name: field.default for field in fields(DreamBoothSettings)}
_RECOMMENDED = (
    "resolution",
    "learning_rate",
    "guidance",
    "caption_dropout",
    "prior_loss_weight",
    "rank",
    "weighting_scheme",
)
"""Settings that the pipeline recommends."""


@dataclass(frozen=True, kw_only=True)
class ResolvedSettings(DreamBoothSettings):
    """Settings of a run in which every open question is answered. Nothing after `resolve` decides one again.

    The fields below always have a value. An inherited field that is None means absent: no quantization, no limit, no
    adapter to start from. `subjects` have their class prompts and, where class images are used, their folders.

    Attributes:
        rank, lora_alpha: None with ``--train_mode full``.
        prior_loss_weight: None without prior preservation.
        preservation_flag: ``--with_prior_preservation`` was given, which another ``--prior_preservation`` contradicts.
        given: the settings before anything was derived.
        auto_batch_size: ``--train_batch_size auto`` was given: the memory estimate decides `train_batch_size`.
        samples: instance samples of the whole run.
        joined_micro_batches: see `Plan.joined`; 1 until the batch size is known.
        drawing_guidance, drawing_steps: of class images and previews.
        training_guidance: for models that read it. With ``--preview_model``, ``--guidance`` is for drawing alone.
        sampling: how noise levels are drawn; None for the pipeline's default.
        trackers: names of the trackers that ``--report_to`` selects.
        notes: decisions with their reasons, one line each, for the log.
        warnings: unusual or ineffective settings, one line each.
    """

    resolution: int
    learning_rate: float
    guidance: float
    caption_dropout: float
    validation_prompt: tuple[str, ...]
    validation_steps: int
    train_batch_size: int
    sample_batch_size: int
    gradient_checkpointing: bool
    prior_preservation: Kind
    with_prior_preservation: bool
    preservation_flag: bool
    given: DreamBoothSettings
    auto_batch_size: bool
    samples: int
    joined_micro_batches: int = 1
    drawing_guidance: float
    drawing_steps: int
    training_guidance: float
    sampling: NoiseSampling | None
    trackers: tuple[str, ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]

    def __post_init__(self) -> None:
        """`DreamBoothSettings` checked the fields before."""

    @property
    def plan(self) -> Plan:
        return Plan(
            samples=self.samples,
            batch_size=self.train_batch_size,
            accumulation=self.gradient_accumulation_steps,
            joined=self.joined_micro_batches,
        )

    def origin(self, name: str) -> str:
        """Who gave a setting: the flag, file and line, "given" by a program, "the pipeline", "default" or "derived"."""
        value, default = getattr(self.given, name), _DEFAULTS[name]
        if place := origins_of(self.given).get(name):
            return place
        if value != default:
            return "given"
        if getattr(self, name) == value:
            return "default"
        return "the pipeline" if name in _RECOMMENDED else "derived"

    def to_settings(self) -> DreamBoothSettings:
        """The settings that reproduce the run."""
        return DreamBoothSettings(**_values(self))


def resolve(
    settings: DreamBoothSettings,
    recommended: Recommended,
    dataset: InstanceDataset,
    given: DreamBoothSettings | None = None,
    drawing: Recommended | None = None,
) -> ResolvedSettings:
    """Answer what is open. ``--train_batch_size auto`` becomes 1 and gradient checkpointing is off, unless it is given:
    `memory_estimate` changes both.

    Args:
        given: what `settings` were derived from, for example without the rank of ``--lora_weights``; None if from
            nothing else.
        drawing: recommendations of the model that draws class images and previews; None for the trained one.

    Raises:
        SettingsError: prior preservation is requested without a class prompt, a prompt has a placeholder of another
            tool, or a tracker is not installed.
    """
    given, drawing = given or settings, drawing or recommended
    flagged = settings.with_prior_preservation is not None
    settings, replaced = fill_placeholders(settings)
    samples, per_update = _samples(settings, dataset.samples_per_epoch)
    updates = -(-samples // per_update)
    preservation = resolve_preservation(settings)
    warnings = config_warnings(
        settings, recommended, preservation=preservation.kind, updates=updates, per_update=per_update, drawing=drawing
    )
    notes, first = list(preservation.notes), preservation.concepts[0]
    if settings.lr_warmup_steps == _DEFAULTS["lr_warmup_steps"] and "lr_warmup_steps" not in origins_of(given):
        by_default = warmup_warnings(total=updates, warmup=settings.lr_warmup_steps)
        warnings = [line for line in warnings if line not in by_default]
        notes += by_default
    rate = default_rate(settings, recommended) if settings.learning_rate is None else settings.learning_rate
    if settings.scale_lr:
        notes.append(f"learning rate {rate:g} x {per_update} images per update: {rate * per_update:g}")
        rate *= per_update
        settings = replace(settings, learning_rate=rate, scale_lr=False)
    defaults: dict[str, Any] = {
        "resolution": dataset.resolution,
        "learning_rate": rate,
        "guidance": recommended.guidance,
        "caption_dropout": recommended.caption_dropout,
        "validation_prompt": tuple(dict.fromkeys(one.instance_prompt for one in settings.subjects)),
        "validation_steps": -(-updates // PREVIEWS_PER_RUN),
        "prior_loss_weight": {"class_images": recommended.prior_loss_weight, "dop": DOP_WEIGHT}.get(preservation.kind),
        "class_data_dir": first.class_data_dir,
        "weighting_scheme": recommended.weighting_scheme,
    }
    if settings.validation_epochs is not None:
        steps = round(settings.validation_epochs * dataset.samples_per_epoch / per_update)
        defaults["validation_steps"] = max(1, steps)
    if dataset.held_out:
        defaults["validation_loss_steps"] = settings.validation_steps or defaults["validation_steps"]
    if settings.train_mode == "lora":
        rank = settings.rank or recommended.rank
        defaults |= {"rank": rank, "lora_alpha": float(rank)}
    if settings.train_text_encoder and not finds_rate(settings):
        defaults["text_encoder_lr"] = rate * (TEXT_ENCODER_SHARE if settings.train_mode == "lora" else 1)
    chosen = {name: value for name, value in defaults.items() if value is not None and getattr(settings, name) is None}
    if chosen:
        notes.insert(0, "chosen: " + ", ".join(f"{name} {_text(value)}" for name, value in chosen.items()))
    settings = replace(
        settings,
        **chosen,
        class_prompt=first.class_prompt,
        concepts=preservation.concepts if settings.concepts else None,
        prior_preservation=preservation.kind,
        with_prior_preservation=preservation.kind == "class_images",
        max_train_steps=updates,
        validation_epochs=None,
    )
    guidance = drawing.guidance if given.guidance is None else given.guidance
    given_to_training = None if settings.preview_model is not None else settings.guidance
    trained = recommended.guidance if given_to_training is None else given_to_training
    steps = settings.num_inference_steps or drawing.steps
    draws = {"class images": preservation.kind == "class_images", "previews": settings.num_validation_images > 0}
    if settings.preview_model is not None and any(draws.values()):
        what = " and ".join(name for name, used in draws.items() if used)
        notes.append(f"{what} are drawn by {settings.preview_model}: {steps} steps, guidance {guidance:g}")
        if settings.fuse:
            notes.append(f"--fuse writes {settings.model} with the adapter, not {settings.preview_model}")
    if settings.assistant_lora is not None:
        notes.append(f"{settings.assistant_lora} is active in training only (--assistant_lora)")
    answers = {
        "class_data_dir": first.class_data_dir,
        "prior_loss_weight": None if preservation.kind == "none" else settings.prior_loss_weight,
        "train_batch_size": settings.train_batch_size or 1,
        "gradient_checkpointing": bool(settings.gradient_checkpointing),
        "sample_batch_size": settings.sample_batch_size or images_per_batch(dataset.resolution),
    }
    return ResolvedSettings(
        **(_values(settings) | answers),
        preservation_flag=flagged,
        given=given,
        auto_batch_size=settings.train_batch_size is None,
        samples=samples,
        drawing_guidance=guidance,
        drawing_steps=steps,
        training_guidance=trained,
        sampling=_sampling(settings, recommended),
        trackers=tuple(trackers.requested_trackers(settings.report_to)),
        notes=tuple(notes),
        warnings=(*dataset.warnings, *preservation.warnings, *replaced, *warnings),
    )


def _values(settings: DreamBoothSettings) -> dict[str, Any]:
    return {field.name: getattr(settings, field.name) for field in fields(DreamBoothSettings)}


def _samples(settings: DreamBoothSettings, per_epoch: int) -> tuple[int, int]:
    """Instance samples of the whole run and of an update."""
    per_update = (settings.train_batch_size or 1) * settings.gradient_accumulation_steps
    if settings.num_train_epochs is None:
        return settings.max_train_steps * per_update, per_update
    return settings.num_train_epochs * per_epoch, per_update


def _sampling(settings: DreamBoothSettings, recommended: Recommended) -> NoiseSampling | None:
    scheme: Any = settings.weighting_scheme
    if scheme is None and not settings.snr_gamma and not settings.noise_offset:
        return None
    sampling = NoiseSampling(
        scheme=scheme or "uniform",
        logit_mean=settings.logit_mean,
        logit_std=settings.logit_std,
        mode_scale=settings.mode_scale,
        snr_gamma=settings.snr_gamma,
        noise_offset=settings.noise_offset or 0.0,
    )
    default = recommended.weighting_scheme
    return None if default is not None and sampling == NoiseSampling(scheme=default) else sampling


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_text, value))
    if isinstance(value, float):
        return f"{value:g}"
    return repr(value) if isinstance(value, str) else str(value)
