"""Flags under which a run fits into memory: alone or together, those that change the result least come first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import mlx.core as mx

from mflux_vae.runtime.device import compute_dtype
from mflux_vae.utils.formatting import size_text
from mflux_vae_train import lora
from mflux_vae_train.dreambooth.optimization.optimizer import build_optimizer, joined_micro_batches
from mflux_vae_train.dreambooth.pipeline_features import skeleton_of
from mflux_vae_train.dreambooth.planning.drawn_footprint import footprint_of
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings
from mflux_vae_train.dreambooth.run_folder import RESUMABLE_CHANGES
from mflux_vae_train.dreambooth.run_status import UNCHANGEABLE
from mflux_vae_train.pipelines import checks
from mflux_vae_train.pipelines.capabilities import SupportsMemoryControl, SupportsPrediction
from mflux_vae_train.pipelines.footprint import Footprint, Workload
from mflux_vae_train.pipelines.protocol import Recommended

MAX_OFFERS = 4
"""Alternatives in a message."""

SMALLEST_SIDE = 8
"""Smallest `--resolution`, in pixels."""

MAX_TOGETHER = 3
"""Flags that are tried in every combination; beyond it they are added one after another."""


@dataclass(frozen=True)
class Fix:
    """Flags, and what they change in the estimated workload."""

    flags: str
    change: Callable[[Workload], Workload]


def advice(pipeline: SupportsMemoryControl, resolved: ResolvedSettings, work: Workload, limit: int) -> str:
    """The flags under which the run fits, or how close it can come; a clause without a full stop."""
    groups = fixes(pipeline, resolved, work)
    offers = _fitting(pipeline, groups, work, limit)
    if offers:
        return "it would fit with " + ", or ".join(_text(fixed, peak) for fixed, peak in offers)
    chosen, peak = _least(pipeline, [group[-1] for group in groups], work)
    if not chosen:
        return "no flags reduce it"
    return f"no flags reduce it enough; the least is {_text(chosen, peak)}"


def reducing(
    pipeline: SupportsMemoryControl,
    resolved: ResolvedSettings,
    work: Workload,
    memory: Callable[[Footprint], float],
) -> list[str]:
    """The mildest flags that reduce this part of the estimate, one by one."""
    before = memory(footprint_of(pipeline, work))
    firsts = [group[0] for group in fixes(pipeline, resolved, work)]
    return [fix.flags for fix in firsts if memory(footprint_of(pipeline, fix.change(work))) < before]


def after_failure(
    pipeline: Any, resolved: ResolvedSettings, work: Workload | None, phase: str, *, continues: bool
) -> str:
    """Flags for a run that ran out of memory, the mildest first; a clause without a full stop.

    Args:
        work: None if the pipeline does not estimate its memory.
        phase: what ran out of it, see `Footprint.phases`.
        continues: there is a checkpoint, which only some flags can continue.
    """
    if work is None:
        side = Workload(resolution=resolved.resolution, trained=0)
        multiple = pipeline.recommended.size_multiple
        groups = [_batch_sizes(pipeline, resolved), _resolutions(pipeline, resolved, side, multiple)]
        flags = [group[0].flags for group in map(list, groups) if group]
    else:

        def memory(footprint: Footprint) -> int:
            peaks = [one.peak for one in footprint.phases if one.name == phase]
            return max(peaks, default=footprint.peak)

        flags = reducing(pipeline, resolved, work, memory)
    if not continues:
        return f"give {' or '.join(flags[:MAX_OFFERS])}" if flags else ""
    names = {each: {word[2:].removeprefix("no_") for word in each.split() if word[:2] == "--"} for each in flags}
    free = [each for each in flags if names[each] <= RESUMABLE_CHANGES]
    others = [each for each in flags if each not in free and not names[each] & UNCHANGEABLE]
    offers = [f"give {' or '.join(free)}"] if free else []
    if others:
        offers.append(f"{'or change' if free else 'change'} by --allow_changes {' or '.join(others[:MAX_OFFERS])}")
    return ", ".join(offers)


def state_bytes(resolved: ResolvedSettings) -> float:
    """Bytes of optimizer state per trained weight, master copies of half-precision weights included."""
    weights = mx.zeros((256, 256), mx.float32 if resolved.train_mode == "lora" else compute_dtype(None))
    return round(build_optimizer(resolved).state_bytes(weights) / weights.size, 2)


def fixes(pipeline: Any, resolved: ResolvedSettings, work: Workload) -> list[list[Fix]]:
    """Groups of which a run takes one fix each, from mild to strong. The groups that change the result least are first.

    Only flags that this run can take: half a batch only of two or more images, and no flag that is set already.
    """
    recommended: Recommended = pipeline.recommended
    groups = [
        _exact(work),
        _checkpointing(work),
        _batch_sizes(pipeline, resolved),
        _images_at_once(resolved, work),
        _optimizers(resolved),
        _quantizations(resolved, work),
        _preservations(pipeline, resolved),
        _ranks(resolved),
        _resolutions(pipeline, resolved, work, recommended.size_multiple),
        _adapters(pipeline, resolved, recommended.rank),
    ]
    return [group for group in map(list, groups) if group]


def _exact(work: Workload) -> Iterator[Fix]:
    if work.joined_micro_batches > 1:

        def exact(work: Workload) -> Workload:
            return replace(work, joined_micro_batches=1, exact_micro_batches=True)

        yield Fix("--exact_micro_batches", exact)


def _checkpointing(work: Workload) -> Iterator[Fix]:
    if not work.gradient_checkpointing:
        yield Fix("--gradient_checkpointing", lambda work: replace(work, gradient_checkpointing=True))


def _batch_sizes(pipeline: Any, resolved: ResolvedSettings) -> Iterator[Fix]:
    """Smaller micro-batches, with as many images per update."""
    images, accumulation = resolved.train_batch_size, resolved.gradient_accumulation_steps
    for size in range(images // 2, 0, -1):
        if images % size:
            continue
        parts = images // size
        flags = f"--train_batch_size {size} --gradient_accumulation_steps {accumulation * parts}"

        def smaller(work: Workload, parts: int = parts) -> Workload:
            return with_micro_batches(pipeline, resolved, work, max(1, work.batch // parts), work.micro_batches * parts)

        yield Fix(flags, smaller)


def with_micro_batches(
    pipeline: Any, resolved: ResolvedSettings, work: Workload, batch: int, micro_batches: int
) -> Workload:
    """The workload with other micro-batches, of `batch` samples."""
    work = replace(work, batch=batch, micro_batches=micro_batches)
    return replace(work, joined_micro_batches=joined_micro_batches(skeleton_of(pipeline), resolved, work))


def _images_at_once(resolved: ResolvedSettings, work: Workload) -> Iterator[Fix]:
    flags = []
    if work.class_images > 1 and resolved.sample_batch_size > 1:
        flags.append("--sample_batch_size 1")
    if resolved.num_validation_images > 1:
        flags.append("--num_validation_images 1")
    if flags and work.images > 1:
        yield Fix(" ".join(flags), lambda work: replace(work, images=1))


def _optimizers(resolved: ResolvedSettings) -> Iterator[Fix]:
    if resolved.optimizer == "adamw":
        state = state_bytes(replace(resolved, optimizer="adamw8bit"))
        yield Fix("--optimizer adamw8bit", lambda work: replace(work, state_bytes=min(work.state_bytes, state)))


def _quantizations(resolved: ResolvedSettings, work: Workload) -> Iterator[Fix]:
    """Not with ``--fuse``, as quantized weights cannot hold an adapter."""
    for bits in (8, 4):
        if work.adapter and not resolved.fuse and (work.quantize is None or bits < work.quantize):

            def quantized(work: Workload, bits: int = bits) -> Workload:
                return replace(work, quantize=bits)

            yield Fix(f"--quantize {bits}", quantized)


def _preservations(pipeline: Any, resolved: ResolvedSettings) -> Iterator[Fix]:
    kind = resolved.prior_preservation
    flag = "--prior_preservation"
    if resolved.preservation_flag:  # the two flags must not contradict each other
        flag = f"--no_with_prior_preservation {flag}"
    if kind == "class_images" and resolved.train_mode == "lora" and isinstance(pipeline, SupportsPrediction):
        yield Fix(f"{flag} dop", lambda work: replace(work, class_images=0))
    if kind != "none":

        def unpreserved(work: Workload) -> Workload:
            work = replace(work, class_images=0)
            return with_micro_batches(pipeline, resolved, work, max(1, work.batch // 2), work.micro_batches)

        yield Fix(f"{flag} none", unpreserved)


def _ranks(resolved: ResolvedSettings) -> Iterator[Fix]:
    """Only where ``--lora_weights`` does not set it."""
    if resolved.train_mode != "lora" or resolved.rank is None or resolved.lora_weights is not None:
        return
    for rank in (resolved.rank // 2, resolved.rank // 4):
        if rank >= 4:

            def narrower(work: Workload, share: float = rank / resolved.rank) -> Workload:
                return replace(work, trained=int(work.trained * share))

            yield Fix(f"--rank {rank}", narrower)


def _resolutions(pipeline: Any, resolved: ResolvedSettings, work: Workload, multiple: int) -> Iterator[Fix]:
    """Three quarters, half, and a quarter of the side; with custom shapes, of all their sides."""
    least = -(-SMALLEST_SIDE // multiple) * multiple
    sides = [max(least, _rounded(work.resolution * share, multiple)) for share in (3 / 4, 1 / 2, 1 / 4)]
    for side in sorted({side for side in sides if side < work.resolution}, reverse=True):
        share = side / work.resolution
        height, width = (_rounded(length * share, multiple) for length in work.trained_shape)
        flags = f"--resolution {side}"
        if resolved.aspect_ratio_buckets is not None:
            pairs = [pair.split(",") for pair in resolved.aspect_ratio_buckets.split(";")]
            smaller = [",".join(str(_rounded(int(length) * share, multiple)) for length in pair) for pair in pairs]
            flags += f' --aspect_ratio_buckets "{";".join(smaller)}"'

        def shrunk(work: Workload, side: int = side, shape: tuple[int, int] = (height, width)) -> Workload:
            work = replace(work, resolution=side, shape=shape)
            return with_micro_batches(pipeline, resolved, work, work.batch, work.micro_batches)

        yield Fix(flags, shrunk)


def _adapters(pipeline: Any, resolved: ResolvedSettings, rank: int) -> Iterator[Fix]:
    """Instead of training all weights."""
    if resolved.train_mode == "lora":
        return
    trained = rank * sum(lora.matching(skeleton_of(pipeline), checks.lora_targets(pipeline)).values())
    state = state_bytes(replace(resolved, train_mode="lora"))
    for bits in (None, 8, 4):

        def adapted(work: Workload, bits: int | None = bits) -> Workload:
            return replace(work, adapter=True, trained=trained, state_bytes=min(work.state_bytes, state), quantize=bits)

        yield Fix("--train_mode lora" + (f" --quantize {bits}" if bits else ""), adapted)


def _rounded(length: float, multiple: int) -> int:
    """Down to a multiple, at least one."""
    return max(multiple, int(length) // multiple * multiple)


def _fitting(
    pipeline: SupportsMemoryControl, groups: Sequence[Sequence[Fix]], work: Workload, limit: int
) -> list[tuple[list[Fix], int]]:
    """The smallest combinations that fit: of each choice of groups the mildest one. Empty if none fits."""
    for count in range(1, min(MAX_TOGETHER, len(groups)) + 1):
        offers = []
        for chosen in combinations(groups, count):
            for together in sorted(
                product(*map(enumerate, chosen)), key=lambda ranked: sum(rank for rank, _ in ranked)
            ):
                some = [fix for _, fix in together]
                if (peak := _peak(pipeline, some, work)) <= limit:
                    offers.append((some, peak))
                    break
        if offers:
            return offers[:MAX_OFFERS] if count == 1 else offers[:2]
    everything, peak = _least(pipeline, [group[-1] for group in groups], work)
    return [(everything, peak)] if everything and peak <= limit else []


def _least(pipeline: SupportsMemoryControl, strongest: Sequence[Fix], work: Workload) -> tuple[list[Fix], int]:
    """The fixes that together give the least memory, without those that do not matter."""
    chosen = list(strongest)
    peak = _peak(pipeline, chosen, work)
    for fix in reversed(strongest):
        others = [other for other in chosen if other is not fix]
        if _peak(pipeline, others, work) <= peak:
            chosen = others
    return chosen, peak


def _peak(pipeline: SupportsMemoryControl, some: Sequence[Fix], work: Workload) -> int:
    for fix in some:
        work = fix.change(work)
    return footprint_of(pipeline, work).peak


def _text(some: Sequence[Fix], peak: int) -> str:
    return f"{' '.join(fix.flags for fix in some)} ({size_text(peak)})"
