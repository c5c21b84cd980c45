"""A pipeline whose adapter is attached once, and then exchanged and scaled from image to image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import mlx.nn as nn
import numpy as np

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.utils.formatting import shortened
from mflux_vae_train import lora
from mflux_vae_train.dreambooth import pipeline_features
from mflux_vae_train.dreambooth.data.encoding import SHOWN_PROMPT, EncodedPrompts, encode_prompts
from mflux_vae_train.dreambooth.data.encoding_cache import EncodingCache
from mflux_vae_train.dreambooth.data.sampling import Size, preview_batches, sample_images
from mflux_vae_train.dreambooth.drawing.source import Source
from mflux_vae_train.dreambooth.optimization.trainable import adapter_names
from mflux_vae_train.pipelines import checks
from mflux_vae_train.pipelines.capabilities import (
    SupportsClipSkip,
    SupportsMemoryControl,
    SupportsNegativePrompt,
    SupportsPromptLimit,
    SupportsTextEncoderTraining,
)
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.pipelines.registry import open_pipeline
from mflux_vae_train.randomness import Stream, sample_keys


class Adapted:
    """The pipeline of a `Source`, which draws with any of its adapters at any scale.

        adapted = open_adapted(read_source("dog-lora"))
        prompts = adapted.encode(["a photo of sks dog"])
        for scale in (0.0, 0.5, 1.0):
            with adapted.using("last", scale):
                images = adapted.draw(prompts, "a photo of sks dog", seed=0, count=4)

    An image depends on adapter, scale, prompt, seed and its index, and its last bits on `count`. Image i is preview i
    of a run with this seed, bit for bit if `count`, size, steps and guidance are those of its previews.

    Attributes:
        pipeline: without an adapter outside of `using`.
        size, steps, guidance: of the source, or recommended by the pipeline.
    """

    def __init__(self, source: Source, pipeline: DiffusionPipeline, *, adapts_text: bool = False) -> None:
        recommended, side = pipeline.recommended, pipeline.recommended.resolution
        self.source, self.pipeline = source, pipeline
        self.size: Size = source.size or (side, side)
        self.steps = source.steps or recommended.steps
        self.guidance = recommended.guidance if source.guidance is None else source.guidance
        self._adapts_text = adapts_text
        self._networks: dict[str, nn.Module] = {}
        self._attached: str | None = None

    def encode(self, prompts: Sequence[str]) -> EncodedPrompts:
        """Encode prompts for `draw`, those of the run's previews by its cache, and free the text encoders."""
        cache = _ReadOnlyCache(self.source.encodings)
        encoded = encode_prompts(self.pipeline, [*prompts, self.source.negative_prompt], cache)
        pipeline_features.release(self.pipeline, "prompts")
        return encoded

    @contextmanager
    def using(self, label: str, scale: float = 1.0) -> Iterator[DiffusionPipeline]:
        """Within the block the pipeline has an adapter, see `lora.scaled`.

        Args:
            label: of `Source.adapters`; only read unless `scale` is 0.
            scale: 0 is the untrained model, 1 the trained one, bit for bit.

        Raises:
            WeightsError: the file cannot be read, or does not fit.
        """
        if scale != 0 and self.source.adapters:
            self._attach(label)
        with ExitStack() as stack:
            for network in self._networks.values():
                stack.enter_context(lora.scaled(network, scale))
            yield self.pipeline

    def draw(self, prompts: EncodedPrompts, prompt: str, *, seed: int, count: int = 1) -> list[np.ndarray]:
        """Images 0 to `count` - 1 of a prompt, uint8 (*size, 3).

        Raises:
            RunError: an image has NaN or infinite values.
        """
        images: list[np.ndarray] = []
        for batch in preview_batches(count, self.size):
            names = [f"image {index} of {shortened(prompt, SHOWN_PROMPT)!r}" for index in batch]
            keys = sample_keys(seed, Stream.PREVIEW, 0, batch)
            conditioning = prompts.get(prompt)
            images += sample_images(
                self.pipeline, conditioning, keys, names, size=self.size, guidance=self.guidance, steps=self.steps
            )
        return images

    def _attach(self, label: str) -> None:
        if label == self._attached:
            return
        if not self._networks:
            self._networks = {self.pipeline.adapter_prefix: checks.denoiser(self.pipeline)}
            if self._adapts_text:
                assert isinstance(self.pipeline, SupportsTextEncoderTraining)  # see `_prefixes`
                self._networks |= self.pipeline.text_encoders_to_train()
        self._attached = None  # if the next line fails, no whole adapter is attached
        lora.load_adapter(self._networks, self.source.file(label), adapter_names(self.pipeline))
        self._attached = label


def open_adapted(source: Source) -> Adapted:
    """Open the model of a source, and compare the chosen adapter with its layers. Weights are read later.

    Raises:
        SettingsError: the model cannot be opened, or lacks a feature that the source needs.
        WeightsError: the model's files are broken, or the adapter does not fit.
    """
    opening = {name: getattr(source, name) for name in ("revision", "variant", "vae", "prediction_type")}
    try:
        pipeline = open_pipeline(source.model, **opening)
    except (SettingsError, WeightsError) as error:
        if source.settings is None:
            raise
        raise type(error)(f"{error}; {source.settings} names this model: give another place as --model") from error
    needs = {
        "--quantize": (source.quantize, SupportsMemoryControl),
        "--max_sequence_length": (source.max_sequence_length, SupportsPromptLimit),
        "--clip_skip": (source.clip_skip, SupportsClipSkip),
        "--negative_prompt": (source.negative_prompt or None, SupportsNegativePrompt),
    }
    for flag, (value, capability) in needs.items():
        if value is not None:
            pipeline_features.require(pipeline, flag, capability)
    adapts_text = not _prefixes(source, pipeline) <= {pipeline.adapter_prefix}
    pipeline_features.apply_to_images(
        pipeline,
        max_sequence_length=source.max_sequence_length,
        clip_skip=source.clip_skip,
        train_text_encoder=adapts_text,
        quantize=source.quantize,
    )
    adapted = Adapted(source, pipeline, adapts_text=adapts_text)
    _check(adapted)
    return adapted


def _prefixes(source: Source, pipeline: DiffusionPipeline) -> set[str]:
    """Prefixes of the networks that the chosen adapter is for."""
    if not source.adapters:
        return set()
    skeletons = {pipeline.adapter_prefix: pipeline_features.skeleton_of(pipeline)}
    if isinstance(pipeline, SupportsTextEncoderTraining):
        skeletons |= pipeline.text_encoder_skeletons()
    file = source.file(source.chosen)
    if not (found := lora.check_adapter_fits(skeletons, file, adapter_names(pipeline))):
        raise WeightsError(f"{file}: holds no adapter")
    return {*found}


def _check(adapted: Adapted) -> None:
    """
    Raises:
        SettingsError: the pipeline does not draw this size, or does not read a negative prompt.
    """
    source, pipeline = adapted.source, adapted.pipeline
    multiple = pipeline.recommended.size_multiple
    if any(side < multiple or side % multiple for side in adapted.size):
        raise SettingsError(
            f"--size {adapted.size[0]} {adapted.size[1]}: {pipeline.name} draws multiples of {multiple}"
        )
    if not source.negative_prompt:
        return
    assert isinstance(pipeline, SupportsNegativePrompt)
    if not pipeline.reads_negative_prompt(adapted.guidance):
        raise SettingsError(
            f"--negative_prompt has no effect: {pipeline.name} draws without classifier-free guidance at guidance"
            f" {adapted.guidance:g}; leave it out, or give a higher --guidance to a model that is guided so"
        )
    pipeline.negative_prompt = source.negative_prompt


class _ReadOnlyCache(EncodingCache):
    def put(self, key: object, arrays: object) -> None:
        """Drawing does not change the run's folder."""
