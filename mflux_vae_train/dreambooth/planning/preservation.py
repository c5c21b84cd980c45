"""Whether prior preservation is on, and by which method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mflux_vae.errors import SettingsError
from mflux_vae_train.dreambooth.config import Concept, DreamBoothSettings
from mflux_vae_train.dreambooth.data.identifier import find_identifiers, split_words
from mflux_vae_train.dreambooth.planning.class_prompt import derive_class_prompt

Kind = Literal["class_images", "dop", "none"]
"""class_images: train on class images beside the instance images. dop (differential output preservation): keep the
prediction for the class prompt at the base model's. none: neither."""

DOP_WEIGHT = 1.0
"""Default weight of the prior term for dop. The term starts at zero and does not pull at the subject as class images
do: on the embedded pipeline 1 kept more of the class and of other prompts than the 0.3 recommended for class images,
and the subject was learned as well."""


@dataclass(frozen=True, kw_only=True)
class Preservation:
    """
    Attributes:
        concepts: with class prompts and folders of class images, each None where `kind` does not use it.
        notes: reasons, one line each.
        warnings: why it is off although nobody turned it off.
    """

    kind: Kind
    concepts: tuple[Concept, ...]
    notes: list[str]
    warnings: tuple[str, ...] = ()


def resolve_preservation(settings: DreamBoothSettings) -> Preservation:
    """
    Raises:
        SettingsError: prior preservation is requested, and a class prompt is neither given nor can be derived, or no
            class images are wanted.
    """
    requested = _requested(settings)
    unpreserved = tuple(replace(one, class_prompt=None, class_data_dir=None) for one in settings.subjects)
    if requested == "none":
        why = ": --num_class_images 0" if settings.num_class_images == 0 else ", as requested"
        return Preservation(kind="none", concepts=unpreserved, notes=[f"prior preservation is off{why}"])
    notes, prompts = [], []
    for one in settings.subjects:
        prompt, reason = (one.class_prompt, "") if one.class_prompt else derive_class_prompt(one.instance_prompt)
        if prompt is None and requested is None:
            cure = "give --class_prompt to turn it on"
            if not find_identifiers(split_words(one.instance_prompt)):
                cure = f"put a rare word such as sks before the class word, or {cure}"
            line = f"prior preservation is off: {reason}; {cure}"
            return Preservation(kind="none", concepts=unpreserved, notes=[], warnings=(line,))
        if prompt is None:
            flag = "--with_prior_preservation" if settings.prior_preservation is None else "--prior_preservation"
            raise SettingsError(f"{flag} needs --class_prompt: {reason}")
        prompts.append(prompt)
        notes.append(f"class prompt: {prompt!r}" + (f" ({reason})" if reason else ""))
    kind: Kind = "dop" if requested == "dop" else "class_images"
    if kind == "dop":
        notes.append("prior preservation compares predictions for the class prompt: no class images")
    folders = _folders(settings, prompts) if kind == "class_images" else [None] * len(prompts)
    concepts = tuple(
        replace(one, class_prompt=prompt, class_data_dir=folder)
        for one, prompt, folder in zip(settings.subjects, prompts, folders, strict=True)
    )
    return Preservation(kind=kind, concepts=concepts, notes=notes)


def _requested(settings: DreamBoothSettings) -> str | None:
    requested = settings.prior_preservation
    if requested is None and settings.with_prior_preservation is not None:
        requested = "class_images" if settings.with_prior_preservation else "none"
    if settings.num_class_images > 0 or requested == "dop":
        return requested
    if requested == "class_images":
        raise SettingsError(
            "--num_class_images 0: prior preservation by class images needs some; give a number, or"
            " --prior_preservation none or dop"
        )
    return "none"


def _folders(settings: DreamBoothSettings, prompts: list[str]) -> list[str | None]:
    """Folder of each concept's class images; by default one in the output folder for each class prompt."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts), start=1)}
    names = [f"class_images-{numbers[prompt]}" if numbers[prompt] > 1 else "class_images" for prompt in prompts]
    return [
        one.class_data_dir or str(Path(settings.output_dir) / name)
        for one, name in zip(settings.subjects, names, strict=True)
    ]
