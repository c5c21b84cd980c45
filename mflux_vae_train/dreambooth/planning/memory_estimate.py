"""Estimate memory, disk and time of a run before anything is downloaded or loaded.

Memory means the same as in the log and the report of a run: see `training.hooks.peak_memory`.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import mlx.core as mx

from mflux_vae.errors import SettingsError
from mflux_vae.kernels import linear
from mflux_vae.runtime.device import DEVICES, assuming, compute_dtype
from mflux_vae.runtime.device import kind as device_kind
from mflux_vae.tiling import plan as tiling_plan
from mflux_vae.utils.formatting import GB, size_text
from mflux_vae_train.dreambooth.data.crops import Shape
from mflux_vae_train.dreambooth.data.encoding import PROMPTS_PER_BATCH, images_per_batch
from mflux_vae_train.dreambooth.planning import memory_advice
from mflux_vae_train.dreambooth.planning.drawn_footprint import TRAINING, footprint_of
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings
from mflux_vae_train.monitoring.progress import duration
from mflux_vae_train.pipelines.capabilities import SupportsMemoryControl
from mflux_vae_train.pipelines.footprint import Footprint, Workload
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.training.hooks import Hook, Record

MIN_REPORTED_SECONDS = 120.0
"""Shorter time estimates are not logged."""

SIDES, PRODUCTS = {"cpu": 512, "mac": 2048, "cuda": 4096}, 20
"""Side of the matrices whose products are timed, and their number in a graph on a GPU."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """
    Attributes:
        footprint: the pipeline's answer.
        limit: bytes that the run may use; None if it is not known, for another machine.
        lines: for the log.
        problem: why the run does not fit and which flags help; None if it fits.
        reducing: finds flags that reduce the memory of an update.
        work: what the footprint is of.
    """

    footprint: Footprint
    limit: int | None
    lines: Sequence[str]
    problem: str | None
    reducing: Callable[[], Sequence[str]] = tuple
    work: Workload | None = None


def workload(
    pipeline: DiffusionPipeline,
    resolved: ResolvedSettings,
    *,
    trained: int,
    shape: Shape,
    prompts: int,
    class_images: int,
    assistant: int = 0,
) -> Workload:
    """The run's requests to the pipeline.

    Args:
        trained: number of trained weights.
        shape: height and width of the largest training image.
        prompts: number of prompts to encode.
        class_images: number of class images to generate.
        assistant: number of weights of the assistant.
    """
    previews = min(images_per_batch(resolved.resolution), resolved.num_validation_images)
    batch = resolved.train_batch_size * (1 if resolved.prior_preservation == "none" else 2)
    return memory_advice.with_micro_batches(
        pipeline,
        resolved,
        Workload(
            resolution=resolved.resolution,
            shape=shape,
            trained=trained,
            assistant=assistant,
            adapter=resolved.train_mode == "lora",
            state_bytes=memory_advice.state_bytes(resolved),
            prompts=prompts,
            prompts_per_batch=PROMPTS_PER_BATCH,
            prompt_tokens=resolved.max_sequence_length,
            class_images=class_images,
            images=max(1, previews, min(resolved.sample_batch_size, class_images)),
            guidance=resolved.drawing_guidance,
            steps=resolved.drawing_steps,
            previews=previews > 0,
            quantize=resolved.quantize,
            gradient_checkpointing=resolved.gradient_checkpointing,
            text_encoder=resolved.train_text_encoder,
            fuse=resolved.fuse,
        ),
        batch,
        resolved.gradient_accumulation_steps,
    )


def fit_gradient_checkpointing(
    pipeline: SupportsMemoryControl, resolved: ResolvedSettings, work: Workload
) -> tuple[ResolvedSettings, Workload]:
    """Turn gradient checkpointing on where the updates do not fit into memory without, unless the user decided."""
    limit = _limit(resolved)
    if resolved.given.gradient_checkpointing is not None or limit is None:
        return resolved, work
    checkpointed = replace(work, gradient_checkpointing=True)
    before, after = (_training_peak(footprint_of(pipeline, one)) for one in (work, checkpointed))
    if before <= limit or after >= before:
        return resolved, work
    warning = (
        f"gradient checkpointing is on: without it training takes {size_text(before)} of {size_text(limit)}, with it"
        f" {size_text(after)} and more time; --no_gradient_checkpointing turns it off"
    )
    return replace(resolved, gradient_checkpointing=True, warnings=(*resolved.warnings, warning)), checkpointed


def fit_batch_size(
    pipeline: SupportsMemoryControl, resolved: ResolvedSettings, work: Workload, processes: int = 1
) -> tuple[ResolvedSettings, Workload]:
    """Raise the batch size from 1 to the largest that fits into memory, with as many fewer micro-batches.

    It stays 1 where `fit_gradient_checkpointing` turned that on: the run can continue on a machine with less memory.
    Several processes share the micro-batches: each gets as many as the others, or at least one, where possible.

    Raises:
        SettingsError: the memory is that of another machine, and not given.
    """
    images, limit = resolved.gradient_accumulation_steps, _limit(resolved)
    if limit is None:
        raise SettingsError(
            f"--train_batch_size auto --estimate_for {resolved.estimate_for}: give that machine's --memory_limit in GB"
        )
    sizes = [size for size in range(images, 0, -1) if images % size == 0]
    equal = [size for size in sizes if images // size % processes == 0]
    sizes = equal or [size for size in sizes if images // size >= processes] or [1]
    if resolved.gradient_checkpointing and not resolved.given.gradient_checkpointing:
        sizes = [1]
    candidates = [
        (size, memory_advice.with_micro_batches(pipeline, resolved, work, size * work.batch, images // size))
        for size in sizes
    ]
    fitting = (one for one in candidates if footprint_of(pipeline, one[1]).peak <= limit)
    size, work = next(fitting, candidates[-1])
    note = f"--train_batch_size auto: {images // size} micro-batches of {size} for {images} images per update"
    notes = (*resolved.notes, note)
    resolved = replace(resolved, train_batch_size=size, gradient_accumulation_steps=images // size, notes=notes)
    return resolved, work


def estimate(pipeline: SupportsMemoryControl, resolved: ResolvedSettings, work: Workload) -> Estimate:
    """Ask the pipeline what the run takes, and compare it with the available memory."""
    footprint, limit = footprint_of(pipeline, work), _limit(resolved)
    problem = None
    if limit is not None and footprint.peak > limit:
        phase = max(footprint.phases, key=lambda phase: phase.peak)
        verb = "take" if phase.name.endswith("s") else "takes"
        cure = memory_advice.advice(pipeline, resolved, work, limit)
        problem = f"{phase.name} {verb} {size_text(phase.peak)} of {size_text(limit)}; {cure}"
    time_line = _time(footprint, resolved)
    lines = [*_lines(footprint, limit, resolved, work, time_known=time_line is not None)]
    lines += [] if time_line is None else [time_line]
    if problem is not None and (resolved.dry_run or resolved.memory_limit is None):  # else it is the error
        lines.append(f"this run would not fit: {problem}")
    reducing = partial(memory_advice.reducing, pipeline, resolved, work, _training_peak)
    return Estimate(footprint=footprint, limit=limit, lines=lines, problem=problem, reducing=reducing, work=work)


def assumed_device(resolved: ResolvedSettings) -> AbstractContextManager[None]:
    """Within the block, estimates are for the device of ``--estimate_for``."""
    return assuming(resolved.estimate_for == "cpu") if _elsewhere(resolved) else nullcontext()


def _elsewhere(resolved: ResolvedSettings) -> bool:
    return resolved.estimate_for not in (None, device_kind())


def _training_peak(footprint: Footprint) -> int:
    return max((phase.peak for phase in footprint.phases if phase.name == TRAINING), default=0)


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
        training = _training_peak(estimate.footprint)
        logger.info("the first update used %s of memory at its peak (estimated: %s)", used, size_text(training))
        if estimate.limit is not None and before < estimate.limit < peak:
            flags = estimate.reducing()[:3]
            reduce = f"; reduce it with {', or '.join(flags)}" if flags else ""
            logger.warning(
                "the first update used more than the %s %s: the machine may swap or stop%s",
                tiling_plan.limit_name(), size_text(estimate.limit), reduce,
            )  # fmt: skip

    return compare


def _limit(resolved: ResolvedSettings) -> int | None:
    """Bytes that the run may use: ``--memory_limit``, or what this machine has; None for another machine."""
    if resolved.memory_limit is not None:
        return int(resolved.memory_limit * GB)
    return None if _elsewhere(resolved) else tiling_plan.available_bytes()


def _lines(
    footprint: Footprint, limit: int | None, resolved: ResolvedSettings, work: Workload, *, time_known: bool
) -> Iterator[str]:
    peaks = ", ".join(f"{phase.name} {size_text(phase.peak)}" for phase in footprint.phases)
    where = tiling_plan.limit_name() if resolved.memory_limit is None else "--memory_limit"
    limited = "" if limit is None else f" ({where}: {size_text(limit)})"
    name = resolved.estimate_for or device_kind()
    device = f"{'an' if name == 'cuda' else 'a'} {DEVICES[name]}" if _elsewhere(resolved) else f"this {DEVICES[name]}"
    dtype = str(compute_dtype()).removeprefix("mlx.core.")
    unknown = "" if time_known else "; time unknown until the first updates"
    yield f"estimated peak memory: {peaks}{limited}; estimated for {device}, {dtype}{unknown}"
    if footprint.download and footprint.cache is not None:
        folder = next(place for place in (footprint.cache, *footprint.cache.parents) if place.exists())
        free = shutil.disk_usage(folder).free
        short = "" if free > footprint.download else ", which is TOO LITTLE"
        access = "" if footprint.access is None else f"; {footprint.access}"
        yield (
            f"to download: {size_text(footprint.download)} to {footprint.cache},"
            f" where {size_text(free)} are available{short}{access}"
        )
    copies = 1 + (resolved.train_mode == "lora") + resolved.output_kohya_format  # adapters for other programs
    checkpoint = work.trained * (copies * mx.float32.size + work.state_bytes)
    yield f"on disk: {size_text(checkpoint)} for each checkpoint"


def _time(footprint: Footprint, resolved: ResolvedSettings) -> str | None:
    """A lower bound: matrix products at the speed measured now. None if unknown: for small models, which take far
    longer, and for another machine."""
    training = math.fsum(phase.operations for phase in footprint.phases if phase.name == TRAINING)
    if not training or _elsewhere(resolved):
        return None
    before = math.fsum(phase.operations for phase in footprint.phases if phase.name != TRAINING)
    speed = _operations_per_second()
    total = (before + resolved.max_train_steps * training) / speed
    if total <= MIN_REPORTED_SECONDS:
        return None
    return (
        f"time: at least {duration(total)}, of which {_seconds_text(before / speed)} before the first update and"
        f" {_seconds_text(training / speed)} per update: matrix products alone, at {speed / 1e12:.2g} TFLOP/s as"
        " measured now"
    )


def _operations_per_second(side: int | None = None, repeats: int = 4) -> float:
    """The fastest of a few measurements: others may have shared the cores.

    A GPU starts a product later than it computes one: there a measurement is one graph of `PRODUCTS`.
    """
    name = device_kind()
    side, count = side or SIDES[name], 1 if name == "cpu" else PRODUCTS
    matrix = mx.full((side, side), 1 / side, compute_dtype())  # its powers are equal to it
    seconds = []
    for _ in range(1 + repeats):  # the first one starts threads or compiles
        start, product = time.perf_counter(), matrix
        for _ in range(count):
            product = linear(product, matrix)
        mx.eval(product)
        seconds.append(time.perf_counter() - start)
    return 2.0 * side**3 * count / min(seconds[1:])


def _seconds_text(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)
