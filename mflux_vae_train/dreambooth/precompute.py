"""What a run trains on, made ready: prompts encoded, class pictures drawn, latents of all pictures."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mflux_vae_train.distributed.process_group import SINGLE, ProcessGroup
from mflux_vae_train.dreambooth.data.batches import EncodedDataset
from mflux_vae_train.dreambooth.data.class_images import class_images, generate_class_images
from mflux_vae_train.dreambooth.data.encoding import Prompts, build_cache, encode_prompts, fingerprint, open_store
from mflux_vae_train.dreambooth.data.encoding_cache import Store
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
    prompts: Prompts
    class_fingerprint: str


def gather(pipeline: DiffusionPipeline, run: Preparation, kept_in: Path, processes: ProcessGroup = SINGLE) -> Material:
    """Encodes everything once, and draws the class pictures that are missing.

    Args:
        kept_in: folder of what was encoded, where the settings name none.
        processes: the processes that share out what is drawn and encoded; files are the first one's.
    """
    choices = run.choices
    store = open_store(pipeline, Path(choices.settings.encodings_dir or kept_in)) if processes.is_main else Store(None)
    prompts = encode_prompts(pipeline, _prompts(run), store, processes=processes)
    release(pipeline, "prompts")
    class_pictures = _class_pictures(pipeline, run, prompts, processes)
    cache = build_cache(
        pipeline,
        run.pictures.instances,
        prompts,
        choices.concepts,
        store,
        class_pictures=class_pictures,
        preserves_output=choices.preservation == "dop",
        processes=processes,
    )
    release(pipeline, "images")
    if store.found:
        logger.info("%d encodings of an earlier run were used, %d are new", store.found, store.written)
    pictures = list(dict.fromkeys(path for paths in class_pictures or [] for path in paths))
    return Material(cache=cache, prompts=prompts, class_fingerprint=processes.broadcast(lambda: fingerprint(pictures)))


def _prompts(run: Preparation) -> list[str]:
    choices = run.choices
    captions = [one.caption for one in run.pictures.instances]
    classes = [one.class_prompt for one in choices.concepts if one.class_prompt is not None]
    return [*captions, *classes, "", *choices.validation_prompt]


def _class_pictures(
    pipeline: DiffusionPipeline, run: Preparation, prompts: Prompts, processes: ProcessGroup
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
            prompts.of(one.prompt),
            one.missing,
            one.folder,
            count=choices.settings.num_class_images,
            class_prompt=one.prompt,
            resolution=choices.resolution,
            guidance=choices.guidance,
            seed=choices.settings.seed,
            at_once=choices.settings.sample_batch_size,
            processes=processes,
        )
        logger.info("generated %d class pictures in %.0f s", len(one.missing), time.monotonic() - began)
    wanted = choices.settings.num_class_images
    found = processes.broadcast(
        lambda: [[str(p) for p in class_images(Path(one.class_data_dir or ""))[:wanted]] for one in choices.concepts]
    )
    return [[Path(path) for path in paths] for paths in found]
