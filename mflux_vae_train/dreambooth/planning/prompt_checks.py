"""Check that the model can read the prompts: not cut, no unknown words, no syntax of other tools."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mflux_vae.errors import SettingsError
from mflux_vae.utils.formatting import first_names, shortened
from mflux_vae_train.dreambooth.config import Concept, DreamBoothSettings
from mflux_vae_train.dreambooth.data.dataset import InstanceDataset
from mflux_vae_train.dreambooth.data.identifier import identifier_of
from mflux_vae_train.dreambooth.data.placeholders import contains, cure_without_identifier, replace_placeholders
from mflux_vae_train.pipelines.capabilities import PromptTokens, SupportsPromptInspection, SupportsTrimming
from mflux_vae_train.pipelines.protocol import DiffusionPipeline

_SYNTAX = re.compile(
    r"\([^()]*:\s*-?\d*\.?\d+\s*\)"  # (word:1.3)
    r"|\(\([^()]*\)\)|\[\[[^\[\]]*\]\]"  # ((word)), [[word]]
    r"|\[[^\[\]]*:[^\[\]]*:\s*[\d.]+\s*\]|\[[^\[\]]*\|[^\[\]]*\]"  # [cat:dog:0.5], [cat|dog]
    r"|\{[^{}]*\|[^{}]*\}|__[\w/.-]+__"  # {a|b}, __file__
    r"|<(?:lora|lyco|locon|hypernet|embedding)s?:[^<>]*>|\bembedding:[\w.-]+"
    r"|(?<!\S)(?:BREAK|AND|ADDCOMM|ADDROW|ADDCOL|ADDBASE)(?!\S)"
    r"|\{\{[^{}]*\}\}|\)[+-]+(?![^\s,])|(?<![cC])(?<=\w)\+{2,}(?!\w)|\)\d\.\d+"  # NovelAI, compel
    r"|(?<!\S)--(?:ar|no|niji|seed|stylize|style|v|q|s|neg|n|d|w|h|l|g)\b"  # Midjourney, kohya's sample prompts
    r"|\\[()]|\|\|\|"
)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """
    Attributes:
        where: file or flag, for messages.
        identifier: that of its subject, if known and in the prompt.
    """

    where: str
    text: str
    identifier: str | None = None


def prompts_of(settings: DreamBoothSettings, dataset: InstanceDataset) -> list[Prompt]:
    """Each different prompt of a run: those of the images, the class, and the previews."""
    found = [
        Prompt(where="--instance_prompt", text=one.instance_prompt, identifier=_identifier(one))
        for one in settings.subjects
    ]
    found += [
        Prompt(where=image.path.name, text=image.caption, identifier=found[image.concept].identifier)
        for image in dataset.all_images
    ]
    used = {image.caption for image in dataset.all_images}
    found = [one for one in found if not used or one.text in used]  # captions may replace an instance prompt
    found += [Prompt(where="--class_prompt", text=one.class_prompt) for one in settings.subjects if one.class_prompt]
    found += [Prompt(where="--validation_prompt", text=prompt) for prompt in settings.validation_prompt or ()]
    different: dict[str, Prompt] = {}
    for one in found:
        different.setdefault(one.text, one)
    return list(different.values())


def _identifier(concept: Concept) -> str | None:
    return identifier_of(concept.instance_prompt, concept.class_prompt)


def fill_placeholders(settings: DreamBoothSettings) -> tuple[DreamBoothSettings, list[str]]:
    """Settings with the identifier in place of words such as ``[trigger]`` in the validation prompts, and a warning.

    Raises:
        SettingsError: such a word in a class prompt, or in a validation prompt without a known identifier.
    """
    for one in settings.subjects:
        replace_placeholders(one.class_prompt or "", None, "--class_prompt")
    if settings.validation_prompt is None:
        return settings, []
    known = {_identifier(one) for one in settings.subjects}
    identifier = known.pop() if len(known) == 1 else None
    single = len(settings.subjects) == 1
    options = {"cure": cure_without_identifier(settings.subjects[0].instance_prompt)} if single else {}
    filled = [
        replace_placeholders(prompt, identifier, "--validation_prompt", **options)
        for prompt in settings.validation_prompt
    ]
    words = list(dict.fromkeys(word for _, found in filled for word in found))
    lines = [f"{first_names(words)} in --validation_prompt is replaced by {identifier!r}"] if words else []
    return replace(settings, validation_prompt=tuple(prompt for prompt, _ in filled)), lines


def identifier_warnings(settings: DreamBoothSettings) -> list[str]:
    """Lines about identifiers that do not separate a subject from its class or from the other subjects."""
    lines = []
    subjects: dict[str, list[str]] = defaultdict(list)
    for one in settings.subjects:
        if identifier := _identifier(one):
            subjects[identifier.lower()].append(one.instance_prompt)
            if one.class_prompt and contains(one.class_prompt, identifier):
                shown = shortened(one.class_prompt, 120)
                lines.append(f"--class_prompt {shown!r} has the identifier {identifier!r}: leave it out there")
    words = [identifier for one in settings.subjects if (identifier := _identifier(one))]
    without = [one for one in settings.validation_prompt or () if not any(contains(one, word) for word in words)]
    if without and len(words) == len(settings.subjects):
        lines.append(f"--validation_prompt {shortened(without[0], 120)!r} has no identifier ({first_names(words)})")
    for identifier, names in subjects.items():
        if len(names) > 1:
            lines.append(f"the identifier {identifier!r} stands for {len(names)} subjects ({first_names(names)})")
    return lines


def syntax_warnings(prompts: Sequence[Prompt]) -> list[str]:
    """One line if prompts have the syntax of other tools, which is text here."""
    places: dict[str, list[str]] = defaultdict(list)
    for one in prompts:
        if not one.text.isupper():
            for match in dict.fromkeys(match[0].strip() for match in _SYNTAX.finditer(one.text)):
                places[match[:60]].append(one.where)
    if not places:
        return []
    listed = first_names([f"{match!r} in {first_names(where, 1)}" for match, where in places.items()])
    return [f"weights, wildcards and other syntax of other tools are read as text: {listed}"]


def longest_prompt(pipeline: DiffusionPipeline, resolved: DreamBoothSettings, dataset: InstanceDataset) -> int | None:
    """Tokens of the longest prompt if others need not be padded further; None if they do, or if it is not known."""
    if not isinstance(pipeline, SupportsTrimming):
        return None
    texts = ["", *(one.text for one in prompts_of(resolved, dataset))]
    tokens = _inspect(pipeline, texts, resolved.max_sequence_length)
    if tokens is None:
        return None
    return max(min(one.count, one.limit) for each in tokens.values() for one in each)


def check_prompts(
    pipeline: DiffusionPipeline | None, resolved: DreamBoothSettings, dataset: InstanceDataset
) -> list[str] | None:
    """`reading_warnings` of all prompts of a run.

    Args:
        pipeline: None if it is not known.

    Raises:
        SettingsError: with prior preservation, the model reads the same in the class prompt of a concept and in the
            prompts of all its images.
    """
    limit = resolved.max_sequence_length
    for concept, one in enumerate(resolved.subjects):
        if one.class_prompt is not None:
            captions = {image.caption for image in dataset.images if image.concept == concept}
            _check_class_prompt(pipeline, one.class_prompt, captions or {one.instance_prompt}, limit)
    return reading_warnings(pipeline, prompts_of(resolved, dataset), limit)


def reading_warnings(
    pipeline: DiffusionPipeline | None, prompts: Sequence[Prompt], limit: int | None
) -> list[str] | None:
    """Lines about prompts that are cut, become equal, or hold words that a text encoder does not know.

    Args:
        limit: as `SupportsPromptLimit.prompt_limit`.

    Returns:
        None if the pipeline cannot tell, or only after a download.
    """
    tokens = _inspect(pipeline, [one.text for one in prompts], limit)
    if tokens is None:
        return None
    lines = [*_cut(prompts, tokens), *_equal(prompts, tokens), *_unknown(prompts, tokens)]
    most = max(each[0].limit for each in tokens.values())
    if limit is not None and limit > most:
        lines.append(f"--max_sequence_length {limit} has no effect: the model reads {most} tokens")
    return lines


def _check_class_prompt(
    pipeline: DiffusionPipeline | None, class_prompt: str, captions: Collection[str], limit: int | None
) -> None:
    texts = [class_prompt, *captions]
    read = _read_alike(_inspect(pipeline, texts, limit), len(texts)) or texts
    if len({*read}) == 1:
        cut = "" if len({*texts}) == 1 else " in the tokens that the model reads"
        raise SettingsError(
            f"--class_prompt {class_prompt[:80]!r} equals --instance_prompt{cut}: prior preservation would undo the"
            " training; give a shorter prompt, another --class_prompt, or --prior_preservation none"
        )


def _inspect(
    pipeline: DiffusionPipeline | None, prompts: Sequence[str], limit: int | None
) -> Mapping[str, Sequence[PromptTokens]] | None:
    if not isinstance(pipeline, SupportsPromptInspection):
        return None
    return pipeline.inspect_prompts(prompts, limit=limit)


def _read_alike(tokens: Mapping[str, Sequence[PromptTokens]] | None, count: int) -> list[tuple[tuple[int, ...], ...]]:
    """What all text encoders together receive of each prompt."""
    if tokens is None:
        return []
    return [tuple(each[index].ids for each in tokens.values()) for index in range(count)]


def _cut(prompts: Sequence[Prompt], tokens: Mapping[str, Sequence[PromptTokens]]) -> Iterator[str]:
    parts = []
    for name, each in tokens.items():
        cut = [index for index, one in enumerate(each) if one.is_cut]
        if cut:
            first = f"first {prompts[cut[0]].where} of {each[cut[0]].count}"
            parts.append(f"{name} reads {each[0].limit} tokens and cuts {len(cut)} of {len(each)} prompts ({first})")
    if not parts:
        return
    lost: dict[tuple[str, ...], list[Prompt]] = defaultdict(list)
    for index, one in enumerate(prompts):
        start = one.text.lower().find(one.identifier.lower()) if one.identifier else -1
        if one.identifier and start >= 0:
            end = start + len(one.identifier)
            lost[tuple(name for name, each in tokens.items() if each[index].end < end)].append(one)
    for names, found in sorted(lost.items()):
        if names:
            of = "" if len(names) == len(tokens) else f" for {' and '.join(names)}"
            where = first_names([one.where for one in found])
            parts.append(f"the identifier {found[0].identifier!r} is lost{of} in {len(found)} ({where})")
    if lost and not any(lost):
        parts.append("the identifier is kept")
    yield "; ".join(parts)


def _equal(prompts: Sequence[Prompt], tokens: Mapping[str, Sequence[PromptTokens]]) -> Iterator[str]:
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = defaultdict(list)
    for index, read in enumerate(_read_alike(tokens, len(prompts))):
        groups[read].append(index)
    equal = [
        index
        for indices in groups.values()
        if len({" ".join(prompts[index].text.casefold().split()) for index in indices}) > 1
        for index in indices
    ]
    if equal:
        where = first_names([prompts[index].where for index in equal])
        yield f"{len(equal)} different prompts are equal in the tokens that the model reads ({where})"


def _unknown(prompts: Sequence[Prompt], tokens: Mapping[str, Sequence[PromptTokens]]) -> Iterator[str]:
    for name, each in tokens.items():
        words: dict[str, str] = {}
        for prompt, one in zip(prompts, each, strict=True):
            inside = {place for start, end in one.unknown for place in range(start, end)}
            for match in re.finditer(r"\S+", prompt.text):
                if inside.issuperset(range(*match.span())):
                    words.setdefault(match[0], prompt.where)
        if words:
            listed = first_names([f"{word!r} in {where}" for word, where in words.items()])
            yield f"{name} does not know {listed}: it reads every such word as the same token <unk>"
