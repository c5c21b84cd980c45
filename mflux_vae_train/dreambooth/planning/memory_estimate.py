"""What a run takes, said before anything is downloaded or loaded: memory of each phase, disk, time, and what cures."""

from __future__ import annotations

import logging
import operator
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map, tree_reduce

from mflux_vae.errors import SettingsError
from mflux_vae.runtime.device import compute_dtype, is_cpu
from mflux_vae.tiling import plan as tiling_plan
from mflux_vae.utils.formatting import GB, size_text
from mflux_vae_train import lora
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.crops import Shape
from mflux_vae_train.dreambooth.data.encoding import PROMPTS_PER_BATCH, images_per_batch
from mflux_vae_train.dreambooth.optimization.optimizer import at_once, optimizer_of
from mflux_vae_train.dreambooth.optimization.trainable import skeletons
from mflux_vae_train.dreambooth.pipeline_features import outline_of
from mflux_vae_train.dreambooth.planning.adapter import targets_of
from mflux_vae_train.dreambooth.planning.preservation import choose_preservation
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings
from mflux_vae_train.monitoring.progress import duration
from mflux_vae_train.pipelines.capabilities import Estimates
from mflux_vae_train.pipelines.footprint import Footprint, Workload
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.training.hooks import Hook, Record

TRAINING = "training"
"""Name of the phase whose operations are those of one update."""

logger = logging.getLogger(__name__)

_WORTH_TELLING = 120.0
"""Seconds."""

_FULL_WIDTH = 4
"""Bytes of a number in float32."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """
    Attributes:
        footprint: what the pipeline says.
        limit: bytes that the run may take.
        lines: what to say.
        cures: settings under which it would fit, where it does not; none where nothing helps.
    """

    footprint: Footprint
    limit: int
    lines: Sequence[str]
    cures: Sequence[str]

    @property
    def fits(self) -> bool:
        return self.footprint.peak <= self.limit

    def check(self, settings: DreamBoothSettings) -> None:
        """
        Raises:
            SettingsError: the user set a limit, and the run would take more.
        """
        if settings.memory_limit is not None and not self.fits:
            raise SettingsError(f"--memory_limit {settings.memory_limit:g}: {_too_much(self)}")


def estimated(
    pipeline: DiffusionPipeline, choices: ResolvedSettings, *, shape: Shape, prompts: int, class_pictures: int
) -> Estimate | None:
    """What a run will take; None where the pipeline does not know.

    Args:
        shape: of the largest instance picture.
        prompts: to be encoded.
        class_pictures: to be drawn.
    """
    if not isinstance(pipeline, Estimates):
        return None
    plan = choices.plan
    asked = workload(pipeline, choices.settings, plan.batch_size, plan.accumulation, choices.resolution, shape)
    together = min(choices.settings.sample_batch_size or images_per_batch(choices.resolution), class_pictures)
    work = replace(
        asked,
        pictures=max(asked.pictures, together),
        prompts=prompts,
        class_pictures=class_pictures,
        guidance=choices.guidance,
        steps=pipeline.recommended.steps,
    )
    footprint, limit = pipeline.footprint(work), limit_of(choices.settings)
    cures = [] if footprint.peak <= limit else list(_cures(pipeline, choices.settings, work, limit))
    made = Estimate(footprint=footprint, limit=limit, lines=[], cures=cures)
    return replace(made, lines=[*_lines(made, choices.settings, work), *_time(footprint, work, plan.updates)])


def compared(estimate: Estimate | None) -> Hook:
    """A hook that says, after the first update that it sees, what that took beside what was estimated for it.

    Nothing is computed for it, and no peak is forgotten: where something before took more, it can say no more than so.
    """
    before, seen = mx.get_peak_memory(), False

    def compare(_: Record) -> None:
        nonlocal seen
        first, seen = not seen, True
        if estimate is None or not first:
            return
        peak = mx.get_peak_memory()
        took = size_text(peak) if peak > before else f"at most {size_text(before)}"  # which something before it took
        training = max((phase.peak for phase in estimate.footprint.phases if phase.name == TRAINING), default=0)
        logger.info("the first update took %s of memory at its peak (estimated: %s)", took, size_text(training))
        if before < estimate.limit < peak:
            logger.warning(
                "that is more than the %s that there are: the machine may swap or stop; less is taken with"
                " --gradient_checkpointing, or with half the --train_batch_size and twice the"
                " --gradient_accumulation_steps",
                size_text(estimate.limit),
            )

    return compare


def workload(
    pipeline: DiffusionPipeline,
    settings: DreamBoothSettings,
    batch: int,
    micro_batches: int,
    resolution: int,
    shape: Shape,
) -> Workload:
    """The training that settings ask for, with so many instance pictures in a micro-batch, the largest of a shape."""
    outline = outline_of(pipeline)
    trained_as = settings.train_mode
    if trained_as == "lora":
        rank = settings.rank or pipeline.recommended.rank
        layers, patterns = skeletons(pipeline, settings), targets_of(pipeline, settings)
        trained = rank * sum(sum(lora.matching(layers[prefix], own).values()) for prefix, own in patterns.items())
    else:
        trained = tree_reduce(operator.add, tree_map(lambda array: array.size, outline.parameters()), 0)
    drawn_at_once = images_per_batch(resolution)
    return Workload(
        resolution=resolution,
        shape=shape,
        trained=trained,
        adapter=trained_as == "lora",
        state_bytes=_state_bytes(settings),
        batch=batch * (1 if choose_preservation(settings).kind == "none" else 2),
        micro_batches=micro_batches,
        side_by_side=min(at_once(outline), micro_batches),
        prompts_at_once=PROMPTS_PER_BATCH,
        prompt_tokens=settings.max_sequence_length,
        pictures=max(1, min(drawn_at_once, settings.num_validation_images)),
        quantize=settings.quantize,
        recompute=settings.gradient_checkpointing,
        text_encoder=settings.train_text_encoder,
    )


def limit_of(settings: DreamBoothSettings) -> int:
    """Bytes that a run may take: what is set, or what is there."""
    return tiling_plan.limit() if settings.memory_limit is None else int(settings.memory_limit * GB)


def with_batch_size(
    settings: DreamBoothSettings, pipeline: DiffusionPipeline, resolution: int, shape: Shape
) -> tuple[DreamBoothSettings, list[str]]:
    """Settings with a micro-batch where they leave it open: the largest that fits, and divides an update's pictures.

    Args:
        shape: of the largest instance picture.

    Returns:
        the settings, and what to say.

    Raises:
        SettingsError: there is a limit, and not even one picture fits.
    """
    if settings.train_batch_size is not None or not isinstance(pipeline, Estimates):
        return settings, []
    pictures, limit = settings.gradient_accumulation_steps, limit_of(settings)
    sizes = [size for size in range(pictures, 0, -1) if pictures % size == 0]
    for size in sizes:
        work = workload(pipeline, settings, size, pictures // size, resolution, shape)
        footprint = pipeline.footprint(work)
        if footprint.peak <= limit or size == 1:
            break
    if footprint.peak > limit and settings.memory_limit is not None:
        cures = list(_cures(pipeline, settings, work, limit))
        too_much = _too_much(Estimate(footprint=footprint, limit=limit, lines=[], cures=cures))
        raise SettingsError(f"--train_batch_size auto, --memory_limit {settings.memory_limit:g}: {too_much}")
    said = f"--train_batch_size auto: {size} at once, {pictures // size} times, for {pictures} pictures in an update"
    return replace(settings, train_batch_size=size, gradient_accumulation_steps=pictures // size), [said]


def _state_bytes(settings: DreamBoothSettings) -> float:
    """What the optimizer keeps for each weight, master copies of those in half precision included."""
    weights = mx.zeros((256, 256), mx.float32 if settings.train_mode == "lora" else compute_dtype(None))
    return round(optimizer_of(settings).state_bytes(weights) / weights.size, 2)


def _cures(pipeline: Estimates, settings: DreamBoothSettings, work: Workload, limit: int) -> Iterator[str]:
    """Flags under which it would fit, those that cost least first."""
    recompute = {"recompute": True}, "--gradient_checkpointing"
    batch = {"batch": max(1, work.batch // 2), "micro_batches": 2 * work.micro_batches}, "half --train_batch_size"
    height, width = work.trained_shape
    smaller = (
        {"resolution": work.resolution // 2, "shape": (height // 2, width // 2)},
        (
            f"--resolution {work.resolution // 2}"
            + (" and half the sides of --aspect_ratio_buckets" if settings.aspect_ratio_buckets else "")
        ),
    )
    eight, four = ({"quantize": 8}, "--quantize 8"), ({"quantize": 4}, "--quantize 4")
    tried: list[list[tuple[dict[str, Any], str]]] = [
        [recompute],
        [batch],
        [eight],
        [eight, recompute],
        [four, recompute],
        [four, recompute, smaller],
    ]
    for changes in tried:
        merged = {name: value for change, _ in changes for name, value in change.items()}
        if any(getattr(work, name) == value for name, value in merged.items()):
            continue  # it is so already
        if not work.adapter and "quantize" in merged:
            continue
        peak = pipeline.footprint(replace(work, **merged)).peak
        if peak <= limit:
            yield f"{' '.join(text for _, text in changes)} ({size_text(peak)})"


def _lines(made: Estimate, settings: DreamBoothSettings, work: Workload) -> Iterator[str]:
    footprint = made.footprint
    peaks = ", ".join(f"{phase.name} {size_text(phase.peak)}" for phase in footprint.phases)
    where = "--memory_limit" if settings.memory_limit is not None else "free"
    yield f"estimated memory at the peak: {peaks} ({where}: {size_text(made.limit)})"
    if footprint.download and footprint.cache is not None:
        free = shutil.disk_usage(_existing(footprint.cache)).free
        short = "" if free > footprint.download else ", which is TOO LITTLE"
        needed = f"{size_text(footprint.download)} to {footprint.cache}"
        yield f"to download: {needed}, where {size_text(free)} are free{short}"
    yield f"on disk: {size_text(work.trained * (_FULL_WIDTH + work.state_bytes))} for each checkpoint"
    if not made.fits:
        yield f"this run would not fit: {_too_much(made)}"


def _too_much(made: Estimate) -> str:
    largest = max(made.footprint.phases, key=lambda phase: phase.peak)
    takes = "take" if largest.name.endswith("s") else "takes"
    what = f"{largest.name} {takes} {size_text(largest.peak)} of {size_text(made.limit)}"
    if not made.cures:
        return f"{what}, and no flag cures it"
    return f"{what}; it would fit with {', or '.join(made.cures)}"


def _time(footprint: Footprint, work: Workload, updates: int) -> Iterator[str]:
    """What the matrix products alone take at the speed that they have here now; nothing where that is little.

    Small models take far more, and so the bound would say nothing of them.
    """
    if work.quantize is not None and is_cpu():
        return  # MLX multiplies quantised matrices on a CPU in a way of its own, far slower
    before = sum(phase.operations for phase in footprint.phases if phase.name != TRAINING)
    update = sum(phase.operations for phase in footprint.phases if phase.name == TRAINING)
    speed = _operations_per_second()
    total = (before + updates * update) / speed
    if update and total > _WORTH_TELLING:
        yield (
            f"time: at least {duration(total)}, of which {_span(before / speed)} before the first update and"
            f" {_span(update / speed)} for each: matrix products alone, at {speed / 1e12:.2g} TFLOP/s as measured now"
        )


def _operations_per_second(side: int = 1024) -> float:
    one = mx.ones((side, side), compute_dtype())
    mx.eval(one @ one)
    began, times = time.perf_counter(), 4
    for _ in range(times):
        mx.eval(one @ one)
    return 2.0 * times * side**3 / (time.perf_counter() - began)


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def _span(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)
