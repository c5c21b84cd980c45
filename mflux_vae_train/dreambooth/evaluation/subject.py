"""The subject of a run: how prompts name it, and its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mflux_vae.errors import SettingsError
from mflux_vae.image_files.notes import ImageNotes
from mflux_vae.image_folder.scan import no_images, scan
from mflux_vae.images import load_image
from mflux_vae.utils.formatting import first_few
from mflux_vae.utils.prefetch import prefetch
from mflux_vae_train.dreambooth.planning.class_prompt import derive_class_prompt, name_subject, with_article
from mflux_vae_train.evaluation.evaluator import Subject


def read_subject(
    settings: Mapping[str, Any],
    *,
    instance_prompt: str | None = None,
    instance_data_dir: str | None = None,
    phrase: str | None = None,
    noun: str | None = None,
    live: bool | None = None,
) -> Subject:
    """The subject of a run. An argument replaces what the settings say.

    Args:
        instance_prompt: selects a subject of a run with several.
        phrase, noun, live: see `Subject`.

    Raises:
        SettingsError: several subjects and none is selected, or the prompt does not tell the class.
        ImageError: the images are gone, or one cannot be read.
    """
    concept = _select(settings, instance_prompt)
    prompt = concept["instance_prompt"]
    if phrase is None or noun is None:
        if (named := name_subject(prompt)) is None and not (phrase and noun):
            raise SettingsError(
                f"{prompt!r} does not tell how prompts name the subject: give --subject 'sks dog' --class_noun dog"
            )
        assert named is not None
        phrase, noun = phrase or named[0], noun or named[1]
    folder = scan(instance_data_dir or concept["instance_data_dir"], find_twins=True)
    if not folder.paths:
        raise no_images(folder)
    notes = ImageNotes()
    return Subject(
        phrase=phrase,
        noun=noun,
        instance_prompt=prompt,
        class_prompt=concept.get("class_prompt")
        or derive_class_prompt(prompt)[0]
        or f"a photo of {with_article(noun)}",
        images=list(prefetch(lambda path: load_image(path, notes=notes), folder.paths)),
        live=live,
    )


def _select(settings: Mapping[str, Any], instance_prompt: str | None) -> Mapping[str, Any]:
    """The settings of one subject."""
    concepts: Sequence[Mapping[str, Any]] = settings.get("concepts") or [settings]
    prompts = [one["instance_prompt"] for one in concepts]
    if instance_prompt is None and len(concepts) == 1:
        return concepts[0]
    if instance_prompt not in prompts:
        raise SettingsError(
            f"--instance_prompt {'is missing' if instance_prompt is None else repr(instance_prompt)}: the run's are"
            f" {first_few([repr(prompt) for prompt in prompts])}"
        )
    return concepts[prompts.index(instance_prompt)]
