"""Estimate memory, disk and time of a run before anything is downloaded or loaded, and suggest flags that help."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mflux_vae.runtime.device import compute_dtype, is_cpu
from mflux_vae.tiling import plan as tiling_plan
from mflux_vae.utils.formatting import GB, size_text
from mflux_vae_train.dreambooth.data.crops import Shape
from mflux_vae_train.dreambooth.data.encoding import PROMPTS_PER_BATCH, images_per_batch
from mflux_vae_train.dreambooth.optimization.optimizer import build_optimizer, concurrent_micro_batches
from mflux_vae_train.dreambooth.pipeline_features import skeleton_of
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings
from mflux_vae_train.monitoring.progress import duration
from mflux_vae_train.pipelines.capabilities import SupportsMemoryControl
from mflux_vae_train.pipelines.footprint import Footprint, Workload
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.training.hooks import Hook, Record

TRAINING = "training"
"""Name of the phase whose operations are those of one update."""

MIN_REPORTED_SECONDS = 120.0
"""Shorter time estimates are not logged."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """
    Attributes:
        footprint: the pipeline's answer.
        limit: bytes that the run may use.
        lines: for the log.
        problem: why the run does not fit and which flags help; None if it fits.
    """

    footprint: Footprint
    limit: int
    lines: Sequence[str]
    problem: str | None


def workload(
    pipeline: DiffusionPipeline,
    resolved: ResolvedSettings,
    *,
    trained: int,
    shape: Shape,
    prompts: int,
    class_images: int,
) -> Workload:
    """The run's requests to the pipeline.

    Args:
        trained: number of trained weights.
        shape: height and width of the largest training image.
        prompts: number of prompts to encode.
        class_images: number of class images to generate.
    """
    previews = min(images_per_batch(resolved.resolution), resolved.num_validation_images)
    return _with_batch_size(
        Workload(
            resolution=resolved.resolution,
            shape=shape,
            trained=trained,
            adapter=resolved.train_mode == "lora",
            state_bytes=_state_bytes(resolved),
            batch=1 if resolved.prior_preservation == "none" else 2,
            concurrent_micro_batches=concurrent_micro_batches(skeleton_of(pipeline)),
            prompts=prompts,
            prompts_per_batch=PROMPTS_PER_BATCH,
            prompt_tokens=resolved.max_sequence_length,
            class_images=class_images,
            images=max(1, previews, min(resolved.sample_batch_size, class_images)),
            guidance=resolved.guidance,
            steps=pipeline.recommended.steps,
            quantize=resolved.quantize,
            gradient_checkpointing=resolved.gradient_checkpointing,
            text_encoder=resolved.train_text_encoder,
        ),
        resolved.train_batch_size,
        resolved.gradient_accumulation_steps,
    )


def fit_batch_size(
    pipeline: SupportsMemoryControl, resolved: ResolvedSettings, work: Workload
) -> tuple[ResolvedSettings, Workload]:
    """Raise the batch size from 1 to the largest that fits into memory, with as many fewer micro-batches."""
    images = resolved.gradient_accumulation_steps
    sizes = [size for size in range(images, 0, -1) if images % size == 0]
    candidates = [(size, _with_batch_size(work, size, images // size)) for size in sizes]
    fitting = (one for one in candidates if pipeline.footprint(one[1]).peak <= _limit(resolved))
    size, work = next(fitting, candidates[-1])
    note = f"--train_batch_size auto: {images // size} micro-batches of {size} for {images} images per update"
    notes = (*resolved.notes, note)
    resolved = replace(resolved, train_batch_size=size, gradient_accumulation_steps=images // size, notes=notes)
    return resolved, work


def estimate(pipeline: SupportsMemoryControl, resolved: ResolvedSettings, work: Workload) -> Estimate:
    """Ask the pipeline what the run takes, and compare it with the available memory."""
    footprint, limit = pipeline.footprint(work), _limit(resolved)
    problem = None
    if footprint.peak > limit:
        phase = max(footprint.phases, key=lambda phase: phase.peak)
        verb = "take" if phase.name.endswith("s") else "takes"
        fixes = ", or ".join(_fixes(pipeline, resolved, work, limit))
        problem = f"{phase.name} {verb} {size_text(phase.peak)} of {size_text(limit)}; " + (
            f"it would fit with {fixes}" if fixes else "no flag reduces it enough"
        )
    lines = [*_lines(footprint, limit, resolved, work), *_time(footprint, work, resolved.max_train_steps)]
    if problem is not None:
        lines.append(f"this run would not fit: {problem}")
    return Estimate(footprint=footprint, limit=limit, lines=lines, problem=problem)


def compare_first_update(estimate: Estimate | None) -> Hook:
    """A hook that logs the memory of the first update beside its estimate.

    It reads MLX's peak, which is not reset: an earlier, higher peak gives an upper bound only.
    """
    before, done = mx.get_peak_memory(), estimate is None

    def compare(_: Record) -> None:
        nonlocal done
        if done or estimate is None:
            return
        done, peak = True, mx.get_peak_memory()
        used = size_text(peak) if peak > before else f"at most {size_text(before)}"
        training = max((phase.peak for phase in estimate.footprint.phases if phase.name == TRAINING), default=0)
        logger.info("the first update used %s of memory at its peak (estimated: %s)", used, size_text(training))
        if before < estimate.limit < peak:
            logger.warning(
                "the first update used more than the available %s: the machine may swap or stop; reduce it with"
                " --gradient_checkpointing, or halve --train_batch_size and double --gradient_accumulation_steps",
                size_text(estimate.limit),
            )

    return compare


def _with_batch_size(work: Workload, size: int, micro_batches: int) -> Workload:
    """The workload of batch size 1 with another one."""
    together = min(work.concurrent_micro_batches, micro_batches)
    return replace(work, batch=size * work.batch, micro_batches=micro_batches, concurrent_micro_batches=together)


def _limit(resolved: ResolvedSettings) -> int:
    """Bytes that the run may use: ``--memory_limit``, or what the machine has."""
    return tiling_plan.available_bytes() if resolved.memory_limit is None else int(resolved.memory_limit * GB)


def _state_bytes(resolved: ResolvedSettings) -> float:
    """Bytes of optimizer state per trained weight, master copies of half-precision weights included."""
    weights = mx.zeros((256, 256), mx.float32 if resolved.train_mode == "lora" else compute_dtype(None))
    return round(build_optimizer(resolved).state_bytes(weights) / weights.size, 2)


def _fixes(pipeline: SupportsMemoryControl, resolved: ResolvedSettings, work: Workload, limit: int) -> Iterator[str]:
    """Flags under which the run would fit, the cheapest first."""
    height, width = work.trained_shape
    buckets = " and half the sides of --aspect_ratio_buckets" if resolved.aspect_ratio_buckets else ""
    recompute: dict[str, Any] = {"gradient_checkpointing": True}
    eight, four = {"quantize": 8}, {"quantize": 4}
    smaller = {"resolution": work.resolution // 2, "shape": (height // 2, width // 2)}
    half = {"batch": max(1, work.batch // 2), "micro_batches": 2 * work.micro_batches}
    checkpointing, size = "--gradient_checkpointing", f"--resolution {work.resolution // 2}{buckets}"
    changes = {
        checkpointing: recompute,
        "half --train_batch_size": half,
        "--quantize 8": eight,
        f"--quantize 8 {checkpointing}": eight | recompute,
        f"--quantize 4 {checkpointing}": four | recompute,
        f"--quantize 4 {checkpointing} {size}": four | recompute | smaller,
    }
    for flags, change in changes.items():
        if any(getattr(work, name) == value for name, value in change.items()):
            continue  # a flag is set already
        if "quantize" in change and not work.adapter:
            continue
        peak = pipeline.footprint(replace(work, **change)).peak
        if peak <= limit:
            yield f"{flags} ({size_text(peak)})"


def _lines(footprint: Footprint, limit: int, resolved: ResolvedSettings, work: Workload) -> Iterator[str]:
    peaks = ", ".join(f"{phase.name} {size_text(phase.peak)}" for phase in footprint.phases)
    where = "available" if resolved.memory_limit is None else "--memory_limit"
    yield f"estimated peak memory: {peaks} ({where}: {size_text(limit)})"
    if footprint.download and footprint.cache is not None:
        folder = next(place for place in (footprint.cache, *footprint.cache.parents) if place.exists())
        free = shutil.disk_usage(folder).free
        short = "" if free > footprint.download else ", which is TOO LITTLE"
        yield (
            f"to download: {size_text(footprint.download)} to {footprint.cache},"
            f" where {size_text(free)} are available{short}"
        )
    checkpoint = work.trained * (mx.float32.size + work.state_bytes)
    yield f"on disk: {size_text(checkpoint)} for each checkpoint"


def _time(footprint: Footprint, work: Workload, updates: int) -> Iterator[str]:
    """A lower bound: matrix products at the speed measured now. Small models take far longer, so nothing for them."""
    if work.quantize is not None and is_cpu():
        return  # on a CPU, MLX multiplies quantized matrices far more slowly than it multiplies others
    training = math.fsum(phase.operations for phase in footprint.phases if phase.name == TRAINING)
    before = math.fsum(phase.operations for phase in footprint.phases if phase.name != TRAINING)
    speed = _operations_per_second()
    total = (before + updates * training) / speed
    if training and total > MIN_REPORTED_SECONDS:
        yield (
            f"time: at least {duration(total)}, of which {_seconds_text(before / speed)} before the first update and"
            f" {_seconds_text(training / speed)} per update: matrix products alone, at {speed / 1e12:.2g} TFLOP/s as"
            " measured now"
        )


def _operations_per_second(side: int = 1024, repeats: int = 4) -> float:
    matrix = mx.ones((side, side), compute_dtype())
    mx.eval(matrix @ matrix)
    start = time.perf_counter()
    for _ in range(repeats):
        mx.eval(matrix @ matrix)
    return 2.0 * repeats * side**3 / (time.perf_counter() - start)


def _seconds_text(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)
