"""Whether the class is kept alive, and by what: decided from what the user said and from the prompts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from mflux_vae.errors import SettingsError
from mflux_vae_train.dreambooth.config import Concept, DreamBoothSettings
from mflux_vae_train.dreambooth.planning.class_prompt import derive_class_prompt

Kind = Literal["class_images", "dop", "none"]

OUTPUT_WEIGHT = 1.0
"""Weight of the prior term for dop, where nothing is said. It begins at zero and does not pull at the subject as class
pictures do, so that it need not be held back: on the embedded pipeline more of the class and of other prompts was kept
with 1 than with the 0.3 that is recommended for class pictures, and as much learnt of the subject.
"""


@dataclass(frozen=True, kw_only=True)
class Preservation:
    """What was decided.

    Attributes:
        kind: class_images: class pictures are trained on beside the subject's; dop: the model's output for the class
            prompt is held at the base model's; none: neither.
        concepts: with class prompts, folders of class pictures, and repeats; without the first two where they are of
            no use.
        notes: what to say about it, one line each.
    """

    kind: Kind
    concepts: tuple[Concept, ...]
    notes: list[str]


def choose_preservation(settings: DreamBoothSettings) -> Preservation:
    """
    Raises:
        SettingsError: prior preservation is asked for, and a class prompt is neither given nor clear.
    """
    asked = _asked(settings)
    plain = tuple(
        replace(one, class_prompt=None, class_data_dir=None, repeats=one.repeats or settings.repeats)
        for one in settings.subjects
    )
    if asked == "none":
        return Preservation(kind="none", concepts=plain, notes=["prior preservation is off, as asked"])
    notes, prompts = [], []
    for one in settings.subjects:
        prompt, why = (one.class_prompt, "") if one.class_prompt else derive_class_prompt(one.instance_prompt)
        if prompt is None and asked is None:
            return Preservation(
                kind="none",
                concepts=plain,
                notes=[f"prior preservation is off: {why}; give --class_prompt to turn it on"],
            )
        if prompt is None:
            named = "--with_prior_preservation" if settings.prior_preservation is None else "--prior_preservation"
            raise SettingsError(f"{named} needs --class_prompt: {why}")
        prompts.append(prompt)
        notes.append(f"class prompt: {prompt!r}" + (f" ({why})" if why else ""))
    kind: Kind = "dop" if asked == "dop" else "class_images"
    if kind == "dop":
        notes.append("the model's output for the class prompt is preserved: no class pictures")
    folders = _folders(settings, prompts) if kind == "class_images" else [None] * len(prompts)
    return Preservation(
        kind=kind,
        concepts=tuple(
            replace(one, class_prompt=prompt, class_data_dir=folder)
            for one, prompt, folder in zip(plain, prompts, folders, strict=True)
        ),
        notes=notes,
    )


def _asked(settings: DreamBoothSettings) -> str | None:
    if settings.prior_preservation is not None or settings.with_prior_preservation is None:
        return settings.prior_preservation
    return "class_images" if settings.with_prior_preservation else "none"


def _folders(settings: DreamBoothSettings, prompts: list[str]) -> list[str | None]:
    """Where the class pictures of each concept lie: in the output folder, where nothing is said, one folder for each
    class prompt."""
    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts), start=1)}
    names = [f"class_images-{numbers[prompt]}" if numbers[prompt] > 1 else "class_images" for prompt in prompts]
    return [
        one.class_data_dir or str(Path(settings.output_dir) / name)
        for one, name in zip(settings.subjects, names, strict=True)
    ]
