"""Check a pipeline's members before they are used, and what they return: one line names member, value and expectation.

`faults` is for the door: it calls no method and reads no denoiser, which might be downloaded. The functions below call
a member and check its result.
"""

from __future__ import annotations

import inspect
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from numbers import Integral, Real
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mflux_vae.errors import PluginError
from mflux_vae.utils.formatting import with_article
from mflux_vae_train.pipelines import capabilities
from mflux_vae_train.pipelines.footprint import Footprint, Phase, Workload
from mflux_vae_train.pipelines.noise import SCHEMES, NoiseSampling, Prediction
from mflux_vae_train.pipelines.protocol import Conditioning, DiffusionPipeline, Recommended

MAX_TEXT = 200
"""Characters of the faults in a message; the first one is always there."""

HELP = "help(mflux_vae_train.pipelines.protocol) has an example"

CAPABILITIES: Sequence[Any] = [
    value for name, value in vars(capabilities).items() if name.startswith("Supports") and isinstance(value, type)
]

_LEAST = {"resolution": 1, "size_multiple": 1, "steps": 1, "rank": 1, "guidance": 0, "prior_loss_weight": 0}
_MISSING = object()


def check_pipeline(pipeline: object, subject: str) -> None:
    """
    Args:
        subject: start of the message, before ": it lacks ...".

    Raises:
        PluginError: members are missing, or are not of the kind that `DiffusionPipeline` describes.
    """
    if found := faults(pipeline):
        count = 1
        while count < len(found) and sum(map(len, found[: count + 1])) <= MAX_TEXT:
            count += 1
        more = f" (and {len(found) - count} more)" if count < len(found) else ""
        raise PluginError(f"{subject}: {'; '.join(found[:count])}{more}; {HELP}")


def faults(pipeline: object) -> list[str]:
    """What is wrong with an object as a pipeline; empty if nothing."""
    if isinstance(pipeline, type):
        return [f"it is the class {pipeline.__name__}, not an object of it"]
    found = []
    if missing := missing_members(pipeline):
        found.append("it lacks " + ", ".join(map(_expected, missing)))
    for name in sorted(_members(DiffusionPipeline).keys() - missing):
        found += _kind_faults(pipeline, name)
    for capability in CAPABILITIES:
        if not _lacking(pipeline, capability):
            found += _signature_faults(pipeline, capability)
    return found


def missing_members(pipeline: object) -> list[str]:
    """Members of DiffusionPipeline that an object lacks."""
    return _lacking(pipeline, DiffusionPipeline)


def half_implemented(pipeline: object) -> dict[str, list[str]]:
    """By name of a capability of which a pipeline has some members: those that it lacks."""
    lacking = {each.__name__: (each, _lacking(pipeline, each)) for each in CAPABILITIES}
    return {name: missing for name, (each, missing) in lacking.items() if 0 < len(missing) < len(_members(each))}


# calls


def denoiser(pipeline: DiffusionPipeline) -> nn.Module:
    """The denoiser, which may be loaded now."""
    network = pipeline.denoiser
    _require(isinstance(network, nn.Module), pipeline, "denoiser", "is", network, "an mlx.nn.Module")
    return network


def skeleton(pipeline: capabilities.SupportsMemoryControl) -> nn.Module:
    """The denoiser's layers."""
    network = pipeline.skeleton()
    _require(isinstance(network, nn.Module), pipeline, "skeleton", "returned", network, "an mlx.nn.Module")
    return network


def footprint(pipeline: capabilities.SupportsMemoryControl, work: Workload) -> Footprint:
    """Estimate of a run."""
    found = pipeline.footprint(work)
    valid = isinstance(found, Footprint) and all(isinstance(phase, Phase) for phase in found.phases) and found.phases
    _require(bool(valid), pipeline, "footprint", "returned", found, "a footprint.Footprint with one or more phases")
    return found


def encoder_fingerprint(pipeline: capabilities.SupportsEncodingCache, use: capabilities.Use) -> str:
    """Text that differs whenever encodings do."""
    found = pipeline.encoder_fingerprint(use)
    _require(isinstance(found, str) and bool(found), pipeline, "encoder_fingerprint", "returned", found, "a text")
    return found


def lora_targets(pipeline: DiffusionPipeline) -> list[str]:
    """Patterns of the layers that LoRA adapts."""
    patterns = pipeline.lora_targets()
    valid = not isinstance(patterns, str | Mapping) and isinstance(patterns, Sequence | set | frozenset)
    valid = valid and bool(patterns) and all(isinstance(pattern, str) for pattern in patterns)
    _require(valid, pipeline, "lora_targets", "returned", patterns, "a list of patterns of layers' paths")
    return list(patterns)


def encode_images(pipeline: DiffusionPipeline, pixels: mx.array) -> mx.array:
    """Images (B, H, W, 3) -> latents."""
    latents = pipeline.encode_images(pixels)
    expected = f"a floating-point array ({len(pixels)}, ...)"
    _require(_is_batch(latents, len(pixels)), pipeline, "encode_images", "returned", latents, expected)
    return latents


def encode_prompts(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> Conditioning:
    """Prompts -> conditioning."""
    conditioning = pipeline.encode_prompts(prompts)
    valid = isinstance(conditioning, Mapping) and bool(conditioning)
    expected = f"a dict of arrays ({len(prompts)}, ...), one row for each prompt"
    _require(valid, pipeline, "encode_prompts", "returned", conditioning, expected)
    for name, array in conditioning.items():
        valid = isinstance(array, mx.array) and array.ndim > 0 and array.shape[0] == len(prompts)
        what = f"encode_prompts()[{name!r}]"
        _require(isinstance(name, str) and valid, pipeline, what, "is", array, f"an array ({len(prompts)}, ...)")
    return conditioning


def check_rows(pipeline: DiffusionPipeline, rows: Sequence[Conditioning]) -> None:
    """
    Raises:
        PluginError: encoded prompts, one row each, differ in names or shapes, so that they cannot be mixed.
    """
    shapes = [{name: array.shape for name, array in row.items()} for row in rows]
    for other in shapes:
        if other != shapes[0]:
            differing = next(name for name in {**shapes[0], **other} if shapes[0].get(name) != other.get(name))
            what = f"{type(pipeline).__name__}.encode_prompts()[{differing!r}]"
            one, two = (found.get(differing, "missing") for found in (shapes[0], other))
            raise PluginError(f"{what} is {one} for one prompt and {two} for another; expected one shape for all")


def loss(
    pipeline: DiffusionPipeline, latents: mx.array, conditioning: Conditioning, *, key: mx.array, guidance: float
) -> mx.array:
    """Loss of each sample (B,)."""
    losses = pipeline.loss(latents, conditioning, key=key, guidance=guidance)
    valid = _is_batch(losses, len(latents)) and losses.ndim == 1
    _require(valid, pipeline, "loss", "returned", losses, f"an array ({len(latents)},), one loss for each sample")
    return losses


def predict(
    pipeline: capabilities.SupportsPrediction,
    latents: mx.array,
    conditioning: Conditioning,
    *,
    key: mx.array,
    guidance: float,
    sampling: NoiseSampling | None = None,
) -> Prediction:
    """Prediction and target for noised latents."""
    predicted = pipeline.predict(latents, conditioning, key=key, guidance=guidance, sampling=sampling)
    _require(isinstance(predicted, Prediction), pipeline, "predict", "returned", predicted, "a noise.Prediction")
    shapes = {
        name: latents.shape if name in ("prediction", "target") else (len(latents),) for name in predicted._fields
    }
    for name, shape in shapes.items():
        array = getattr(predicted, name)
        valid = isinstance(array, mx.array) and array.shape == shape
        _require(valid, pipeline, f"predict().{name}", "is", array, f"an array {shape}")
    return predicted


def sample(
    pipeline: DiffusionPipeline,
    conditioning: Conditioning,
    *,
    size: tuple[int, int],
    steps: int,
    guidance: float,
    key: mx.array,
) -> mx.array:
    """Conditioning -> images (B, H, W, 3) in [-1, 1]."""
    images = pipeline.sample(conditioning, size=size, steps=steps, guidance=guidance, key=key)
    shape = (len(key), *size, 3)
    valid = _is_batch(images, len(key)) and images.shape == shape
    _require(valid, pipeline, "sample", "returned", images, f"an array {shape} in [-1, 1]")
    return images


def _require(valid: bool, pipeline: object, member: str, verb: str, value: Any, expected: str) -> None:
    if not valid:
        called = member if "(" in member or verb == "is" else f"{member}()"
        raise PluginError(f"{type(pipeline).__name__}.{called} {verb} {_text(value)}; expected {expected}")


def _is_batch(value: Any, count: int) -> bool:
    if not isinstance(value, mx.array) or not mx.issubdtype(value.dtype, mx.floating):
        return False
    return value.ndim > 0 and value.shape[0] == count


def _text(value: Any) -> str:
    """What a value is, in a few words."""
    if isinstance(value, mx.array):
        return f"an array {value.shape} of {str(value.dtype).removeprefix('mlx.core.')}"
    if value is None:
        return "None"
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple):
        return f"a {type(value).__module__.partition('.')[0]}.{kind} {shape}"
    if isinstance(value, str | bool | int | float):
        shown = repr(value)
        return f"the {kind} {shown if len(shown) <= 40 else shown[:37] + '...'}"
    return with_article(kind)


# members


def _members(protocol: Any) -> dict[str, Any]:
    """Members of a protocol by name: functions, properties, and for fields their type."""
    functions = {name: value for name, value in vars(protocol).items() if not name.startswith("_")}
    return {name: kind for name, kind in protocol.__annotations__.items() if not name.startswith("_")} | functions


def _lacking(pipeline: object, protocol: Any) -> list[str]:
    return sorted(name for name, member in _members(protocol).items() if not _has(pipeline, name, member))


def _has(pipeline: object, name: str, member: Any) -> bool:
    """Whether there is such a member. It is not read, because that might load or download a denoiser."""
    static = inspect.getattr_static(pipeline, name, _MISSING)
    if static is _MISSING:  # there may be a `__getattr__`
        return hasattr(pipeline, name)
    return static is not member  # a class that inherits the protocol's member does not implement it


def _expected(name: str) -> str:
    """A member as it is called: ``encode_images(pixels)``."""
    member = _members(DiffusionPipeline)[name]
    return _signature(name, member) if inspect.isfunction(member) else name


def _signature(name: str, function: Callable[..., Any]) -> str:
    """A method of a protocol as it is called."""
    return f"{name}({_text_of(list(inspect.signature(function).parameters.values())[1:])})"


def _text_of(parameters: Sequence[inspect.Parameter]) -> str:
    parts: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in parts:
            parts.append("*")
        text = str(parameter.replace(annotation=parameter.empty))
        parts.append(text)
    return ", ".join(parts)


def _kind_faults(pipeline: Any, name: str) -> list[str]:
    if name == "denoiser":
        static = inspect.getattr_static(pipeline, name, _MISSING)
        reads = static is _MISSING or (hasattr(type(static), "__get__") and not inspect.isfunction(static))
        valid = reads or isinstance(static, nn.Module)  # a property may load or download it
        return [] if valid else [f"denoiser is {_text(static)}, expected an mlx.nn.Module"]
    if inspect.isfunction(member := _members(DiffusionPipeline)[name]):
        return _call_faults(pipeline, name, member)
    try:
        value = getattr(pipeline, name)
    except Exception as error:  # any exception of foreign code
        return [f"{name} raises {type(error).__name__}: {error}"]
    if name == "recommended":
        return _recommended_faults(value)
    if not isinstance(value, str) or not value.strip():
        return [f"{name} is {_text(value)}, expected a text"]
    if name == "adapter_prefix" and "." in value:
        return [f"adapter_prefix is {value!r}, expected a name without dots"]
    return []


def _recommended_faults(value: Any) -> list[str]:
    if not isinstance(value, Recommended):
        return [f"recommended is {_text(value)}, expected a Recommended"]
    hints, found = typing.get_type_hints(Recommended), []
    for field in fields(Recommended):
        number, hint = getattr(value, field.name), hints[field.name]
        if hint not in (int, float):
            continue
        least = _LEAST.get(field.name)
        kind, noun = (Integral, "a whole number") if hint is int else (Real, "a number")
        valid = isinstance(number, kind) and not isinstance(number, bool) and math.isfinite(number)
        if field.name.startswith("learning_rate"):
            valid, noun = valid and number > 0, "a number above 0"
        elif field.name == "caption_dropout":
            valid, noun = valid and 0 <= number < 1, "a number from 0 to below 1"
        elif least is not None:
            valid, noun = valid and number >= least, f"{noun} of at least {least}"
        if not valid:
            found.append(f"recommended.{field.name} is {_text(number)}, expected {noun}")
    if not found and value.resolution % value.size_multiple:
        expected = f"a multiple of size_multiple, {value.size_multiple}"
        found.append(f"recommended.resolution is {value.resolution}, expected {expected}")
    if value.weighting_scheme not in (None, *SCHEMES):
        found.append(f"recommended.weighting_scheme is {_text(value.weighting_scheme)}, expected {', '.join(SCHEMES)}")
    return found


def _signature_faults(pipeline: Any, capability: Any) -> list[str]:
    functions = {name: value for name, value in _members(capability).items() if inspect.isfunction(value)}
    found = [fault for name, function in functions.items() for fault in _call_faults(pipeline, name, function)]
    return [f"{fault} (capabilities.{capability.__name__})" for fault in found]


def _call_faults(pipeline: Any, name: str, function: Callable[..., Any]) -> list[str]:
    """Whether a method can be called with the arguments of the protocol's."""
    expected, method = _signature(name, function), getattr(pipeline, name)
    if not callable(method):
        return [f"{name} is {_text(method)}, expected a method {expected}"]
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
        return [f"{name} is asynchronous, expected a plain method {expected}"]
    try:
        accepted = inspect.signature(method)
    except (TypeError, ValueError):  # a callable written in C
        return []
    parameters = list(inspect.signature(function).parameters.values())[1:]
    named = {one.name: None for one in parameters if one.kind is one.KEYWORD_ONLY}
    try:
        accepted.bind(*(None for one in parameters if one.kind is not one.KEYWORD_ONLY), **named)
    except TypeError as error:
        theirs = _text_of(list(accepted.parameters.values()))
        return [f"{name}({theirs}) cannot be called as {expected} ({error})"]
    return []
