"""Compute once what every update reuses: encoded prompts, class images, latents."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mflux_vae.utils.formatting import count_text
from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.dreambooth import preview_model
from mflux_vae_train.dreambooth.data.batches import EncodedDataset
from mflux_vae_train.dreambooth.data.class_images import class_files, class_identity, generate_class_images
from mflux_vae_train.dreambooth.data.encoding import (
    EncodedPrompts,
    encode_dataset,
    encode_prompts,
    open_cache,
    trimmed,
)
from mflux_vae_train.dreambooth.pipeline_features import release
from mflux_vae_train.dreambooth.planning.prepare import Preparation
from mflux_vae_train.pipelines.protocol import DiffusionPipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Precomputed:
    """
    Attributes:
        dataset: latents and conditioning that the updates draw from.
        held_out: those of the held-out images; None without any.
        prompts: of class images and previews, for the model that draws them.
        class_identity: see `class_images.class_identity`.
    """

    dataset: EncodedDataset
    held_out: EncodedDataset | None
    prompts: EncodedPrompts
    class_identity: Mapping[str, Any]


def precompute(
    pipeline: DiffusionPipeline,
    run: Preparation,
    default_folder: Path,
    processes: ProcessGroup = SINGLE,
    begin: Callable[[str], object] = lambda phase: None,
) -> Precomputed:
    """Encode prompts and images, and generate the missing class images.

    Args:
        default_folder: for encodings, without ``--encodings_dir``.
        processes: share the work. The main process reads and writes all files.
        begin: called with the name of each phase, see `Progress`.
    """
    begin("text encoding")
    resolved = run.resolved
    cache = open_cache(pipeline, Path(resolved.encodings_dir or default_folder), processes)
    captions = [one.caption for one in run.dataset.images]
    class_prompts = [one.class_prompt for one in resolved.subjects if one.class_prompt is not None]
    all_prompts = [*captions, *class_prompts, "", *resolved.validation_prompt]
    all_prompts += [one.caption for one in run.dataset.held_out]
    shared = preview_model.share_encoders(pipeline, run.drawing)
    drawn_prompts = prompts = encode_prompts(pipeline, all_prompts, cache, processes=processes)
    release(pipeline, "prompts")
    if not shared:
        its_cache = open_cache(run.drawing, Path(resolved.encodings_dir or default_folder), processes)
        drawn_prompts = encode_prompts(
            run.drawing, [*class_prompts, "", *resolved.validation_prompt], its_cache, processes=processes
        )
        release(run.drawing, "prompts")
    if any(one.missing for one in run.class_folders):
        begin("class images")
    class_images = _class_images(run, drawn_prompts, processes)
    preview_model.release_denoiser(pipeline, run.drawing)
    begin("latents")
    dataset = encode_dataset(
        pipeline,
        run.dataset.images,
        trimmed(pipeline, prompts, [*captions, *class_prompts, ""]),
        resolved.subjects,
        cache,
        class_images=class_images,
        preserves_output=resolved.prior_preservation == "dop",
        processes=processes,
    )
    held_out = None
    if run.dataset.held_out:
        once = [replace(one, repeats=1) for one in resolved.subjects]
        options: dict[str, Any] = {"class_images": None, "preserves_output": False, "processes": processes}
        of_held_out = trimmed(pipeline, prompts, [*(one.caption for one in run.dataset.held_out), *class_prompts, ""])
        held_out = encode_dataset(pipeline, run.dataset.held_out, of_held_out, once, cache, **options)
    release(pipeline, "images")
    run.dataset.release()
    if cache.hits:
        logger.info("%d encodings of earlier runs reused, %d new", cache.hits, cache.writes)
    identity = processes.broadcast(lambda: class_identity(class_images or []))
    return Precomputed(dataset=dataset, held_out=held_out, prompts=drawn_prompts, class_identity=identity)


def _class_images(run: Preparation, prompts: EncodedPrompts, processes: ProcessGroup) -> list[Sequence[Path]] | None:
    """Generate the missing class images.

    Returns:
        for each concept its class images on the main process, sorted by name; None if the run uses none.
    """
    resolved = run.resolved
    if resolved.prior_preservation != "class_images":
        return None
    for one in run.class_folders:
        if not one.missing:
            continue
        start = time.monotonic()
        generate_class_images(
            run.drawing,
            prompts.get(one.prompt),
            one.missing,
            one.folder,
            count=resolved.num_class_images,
            class_prompt=one.prompt,
            resolution=resolved.resolution,
            guidance=resolved.drawing_guidance,
            steps=resolved.drawing_steps,
            seed=resolved.seed,
            batch_size=resolved.sample_batch_size,
            processes=processes,
        )
        logger.info("generated %s in %.0f s", count_text(len(one.missing), "class image"), time.monotonic() - start)
    files = partial(class_files, resolved.subjects, resolved.num_class_images)
    found = processes.broadcast(lambda: [[str(path) for path in paths] for paths in files()])
    return [[Path(path) for path in paths] for paths in found]
