"""What a run trains on, made ready: prompts encoded, class pictures drawn, latents of all pictures."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.dreambooth.data.batches import EncodedDataset
from mflux_vae_train.dreambooth.data.class_images import find_class_images, generate_class_images
from mflux_vae_train.dreambooth.data.encoding import (
    EncodedPrompts,
    encode_dataset,
    encode_prompts,
    hash_files,
    open_cache,
)
from mflux_vae_train.dreambooth.data.encoding_cache import EncodingCache
from mflux_vae_train.dreambooth.pipeline_features import release
from mflux_vae_train.dreambooth.planning.prepare import Preparation
from mflux_vae_train.dreambooth.planning.resolve import ResolvedSettings
from mflux_vae_train.pipelines.protocol import DiffusionPipeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a run trains on.

    Attributes:
        cache: what the updates draw from.
        prompts: all prompts of the run, the previews' among them.
        class_fingerprint: of the class pictures.
    """

    cache: EncodedDataset
    prompts: EncodedPrompts
    class_fingerprint: str


def gather(pipeline: DiffusionPipeline, run: Preparation, kept_in: Path, processes: ProcessGroup = SINGLE) -> Material:
    """Encodes everything once, and draws the class pictures that are missing.

    Args:
        kept_in: folder of what was encoded, where the settings name none.
        processes: the processes that share out what is drawn and encoded; files are the first one's.
    """
    choices = run.choices
    store = (
        open_cache(pipeline, Path(choices.settings.encodings_dir or kept_in))
        if processes.is_main
        else EncodingCache(None)
    )
    prompts = encode_prompts(pipeline, _prompts(run), store, processes=processes)
    release(pipeline, "prompts")
    class_pictures = _class_pictures(pipeline, run, prompts, processes)
    cache = encode_dataset(
        pipeline,
        run.pictures.images,
        prompts,
        choices.concepts,
        store,
        class_images=class_pictures,
        preserves_output=choices.preservation == "dop",
        processes=processes,
    )
    release(pipeline, "images")
    if store.hits:
        logger.info("%d encodings of an earlier run were used, %d are new", store.hits, store.writes)
    pictures = list(dict.fromkeys(path for paths in class_pictures or [] for path in paths))
    return Material(cache=cache, prompts=prompts, class_fingerprint=processes.broadcast(lambda: hash_files(pictures)))


def _prompts(run: Preparation) -> list[str]:
    choices = run.choices
    captions = [one.caption for one in run.pictures.images]
    classes = [one.class_prompt for one in choices.concepts if one.class_prompt is not None]
    return [*captions, *classes, "", *choices.validation_prompt]


def _class_pictures(
    pipeline: DiffusionPipeline, run: Preparation, prompts: EncodedPrompts, processes: ProcessGroup
) -> list[Sequence[Path]] | None:
    """The class pictures of each concept, sorted by name, after generating those that are missing; None without.

    They lie where the first process runs.
    """
    choices: ResolvedSettings = run.choices
    if choices.preservation != "class_images":
        return None
    for one in run.class_folders:
        if not one.missing:
            continue
        began = time.monotonic()
        generate_class_images(
            pipeline,
            prompts.get(one.prompt),
            one.missing,
            one.folder,
            count=choices.settings.num_class_images,
            class_prompt=one.prompt,
            resolution=choices.resolution,
            guidance=choices.guidance,
            seed=choices.settings.seed,
            batch_size=choices.settings.sample_batch_size,
            processes=processes,
        )
        logger.info("generated %d class pictures in %.0f s", len(one.missing), time.monotonic() - began)
    wanted = choices.settings.num_class_images
    found = processes.broadcast(
        lambda: [
            [str(p) for p in find_class_images(Path(one.class_data_dir or ""))[:wanted]] for one in choices.concepts
        ]
    )
    return [[Path(path) for path in paths] for paths in found]
