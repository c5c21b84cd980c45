"""The checker as evaluator: a perfect, a forgetful and an untrained model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mflux_vae.errors import ImageError, SettingsError
from mflux_vae_train.evaluation.evaluator import Evaluator, Prompt, Subject
from mflux_vae_train.evaluation.registry import registered
from mflux_vae_train.tiny_world import world
from mflux_vae_train.tiny_world.evaluate import CheckerEvaluator, other_prompts
from mflux_vae_train.tiny_world.world import Scene

STAR = world.SUBJECTS[0]
SUBJECT = Subject(
    phrase="sks star",
    noun="star",
    instance_prompt="a photo of sks star",
    class_prompt="a photo of a star",
    images=world.subject_images(STAR, 5, size=96),
)


def drawn(prompts: list[Prompt], *, named: Scene, of_class: Scene, other: Scene | None = None) -> list[np.ndarray]:
    """Scenes of each kind of prompt; None: what the prompt says."""
    rng, truths = np.random.default_rng(0), dict(other_prompts("star"))
    scenes = {"subject": named, "class": of_class}
    return [
        world.render(world.place(scenes.get(prompt.kind) or other or truths[prompt.text], rng))
        for prompt in prompts
        for _ in range(prompt.count)
    ]


def test_scores_of_known_images() -> None:
    evaluator = registered("tiny")
    assert isinstance(evaluator, Evaluator)
    prompts = list(evaluator.prompts(SUBJECT, images=1, quick=True))
    assert [prompt.text for prompt in prompts[:2]] == [SUBJECT.instance_prompt, SUBJECT.class_prompt]
    subject = Scene(shape="star", colour=STAR.colour, core=STAR.core, background="grass")
    star = Scene(shape="star", colour="red", background="sand")

    def values(**scenes: Scene) -> dict[str, float]:
        features = evaluator.features(SUBJECT, prompts, drawn(prompts, **scenes))
        scores = evaluator.scores(SUBJECT, prompts, features, evaluator.reference(SUBJECT))
        assert set(scores) == {measure.name for measure in evaluator.measures}
        return {name: score.value for name, score in scores.items()}

    perfect = values(named=subject, of_class=star)
    assert [perfect[name] for name in ("subject_fidelity", "prompt_fidelity", "prior_preservation")] == [1, 1, 1]
    forgetful = values(named=subject, of_class=subject, other=subject)
    assert [forgetful[name] for name in ("subject_fidelity", "prompt_fidelity", "prior_preservation")] == [1, 0, 0]
    assert values(named=star, of_class=replace(subject, core=None))["prior_preservation"] == 0  # its colour leaked
    assert values(named=star, of_class=star)["subject_fidelity"] == 0


def test_refuses_what_it_cannot_judge() -> None:
    evaluator = CheckerEvaluator()
    with pytest.raises(SettingsError, match="dog"):
        evaluator.prompts(replace(SUBJECT, noun="dog"), images=4, quick=False)
    with pytest.raises(ImageError, match="--dino"):
        evaluator.prompts(replace(SUBJECT, images=[np.zeros((64, 80, 3), np.uint8)]), images=4, quick=False)
