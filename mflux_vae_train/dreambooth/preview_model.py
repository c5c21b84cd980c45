"""``--preview_model``: another model of the same architecture draws class images and previews for the trained one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae_train import lora
from mflux_vae_train.dreambooth import pipeline_features
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.lora.targets import dimensions, linears
from mflux_vae_train.pipelines import checks
from mflux_vae_train.pipelines.capabilities import SupportsEncodingCache, SupportsPreviewModel, Use
from mflux_vae_train.pipelines.protocol import DiffusionPipeline
from mflux_vae_train.pipelines.registry import open_pipeline


def open_preview_model(pipeline: DiffusionPipeline, settings: DreamBoothSettings) -> DiffusionPipeline:
    """The pipeline that draws: that of ``--preview_model``, else `pipeline`.

    Raises:
        SettingsError, WeightsError: it cannot be opened, or lacks a feature that the settings need.
    """
    if (model := settings.preview_model) is None:
        return pipeline
    try:
        drawing = open_pipeline(model, vae=settings.vae)
        pipeline_features.check(drawing, settings)
    except (SettingsError, WeightsError) as error:
        reason = str(error).removeprefix(f"{model}: ").removeprefix(f"--model {model} ")
        raise type(error)(f"--preview_model {model}: {reason}") from error
    return drawing


def check_fits(
    pipeline: DiffusionPipeline, drawing: DiffusionPipeline, targets: Mapping[str, Sequence[str]], resolution: int
) -> None:
    """
    Args:
        targets: patterns of the adapted layers by network prefix.

    Raises:
        SettingsError: adapted layers of the two denoisers differ, or `drawing` does not draw this resolution.
    """
    if drawing is pipeline:
        return
    ours, theirs = (_shapes(each, targets[pipeline.adapter_prefix]) for each in (pipeline, drawing))
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path):
            found, needed = (shapes.get(path, "missing") for shapes in (theirs, ours))
            raise SettingsError(
                f"--preview_model: {path} is {found} in {drawing.name} and {needed} in {pipeline.name}; give a model of"
                " the same architecture"
            )
    if resolution % (multiple := drawing.recommended.size_multiple):
        raise SettingsError(f"--resolution is {resolution}; --preview_model draws multiples of {multiple}")


def _shapes(pipeline: DiffusionPipeline, patterns: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the layers that match, by path."""
    layers = linears(pipeline_features.skeleton_of(pipeline))
    return {path: dimensions(layer) for path, layer in layers.items() if lora.matches(path, layer, patterns)}


def share_encoders(pipeline: DiffusionPipeline, drawing: DiffusionPipeline) -> bool:
    """Let `drawing` use the encoders of `pipeline` that encode alike, so that they are loaded, or downloaded, once.

    Returns:
        whether prompts that `pipeline` encoded are conditioning for `drawing`.
    """
    if drawing is pipeline:
        return True
    uses: tuple[Use, ...] = ("images", "prompts")
    equal = {use: _encodes_alike(pipeline, drawing, use) for use in uses}
    for use in uses:
        if equal[use] and isinstance(drawing, SupportsPreviewModel) and type(drawing) is type(pipeline):
            drawing.share_encoders(pipeline, use)
    return equal["prompts"]


def check_text_encoders(pipeline: DiffusionPipeline, drawing: DiffusionPipeline, settings: DreamBoothSettings) -> None:
    """
    Raises:
        SettingsError: text encoders are trained, and `drawing` cannot use them. A dry run does not compare weights.
    """
    if drawing is pipeline or not settings.train_text_encoder:
        return
    shares = isinstance(drawing, SupportsPreviewModel) and type(drawing) is type(pipeline)
    if not shares or not (settings.dry_run or share_encoders(pipeline, drawing)):
        raise SettingsError("--preview_model: it has other text encoders, which --train_text_encoder does not train")


def _encodes_alike(one: DiffusionPipeline, other: DiffusionPipeline, use: Use) -> bool:
    if isinstance(other, SupportsPreviewModel) and type(other) is type(one):
        return other.encodes_as(one, use)
    if not isinstance(one, SupportsEncodingCache) or not isinstance(other, SupportsEncodingCache):
        return False
    return checks.encoder_fingerprint(one, use) == checks.encoder_fingerprint(other, use)


@contextmanager
def adapted(pipeline: DiffusionPipeline, drawing: DiffusionPipeline) -> Iterator[None]:
    """Within the block `drawing` has the adapter of `pipeline`. Afterwards its denoiser is freed."""
    if drawing is pipeline:
        yield
        return
    try:
        with lora.transplanted(pipeline.denoiser, drawing.denoiser):
            yield
    finally:
        release_denoiser(pipeline, drawing)


def release_denoiser(pipeline: DiffusionPipeline, drawing: DiffusionPipeline) -> None:
    """Free the denoiser of another pipeline that draws, if it can be loaded again."""
    if drawing is not pipeline and isinstance(drawing, SupportsPreviewModel):
        drawing.release_denoiser()
