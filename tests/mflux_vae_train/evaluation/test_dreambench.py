"""DreamBench's prompts, and its scores with networks whose features are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mflux_vae.errors import PluginError, SettingsError
from mflux_vae_train.evaluation import registry
from mflux_vae_train.evaluation.dreambench import DreamBench, is_live, templates
from mflux_vae_train.evaluation.evaluator import Evaluator, Measure, Subject

DOG = Subject(
    phrase="sks dog",
    noun="dog",
    instance_prompt="a photo of sks dog",
    class_prompt="a photo of a dog",
    images=[np.full((8, 8, 3), level, np.uint8) for level in (0, 0, 90)],
)


class Angles:
    """Stands for DINO and CLIP: an image of brightness b has the direction b degrees, and each text 0 degrees."""

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        angles = np.radians([image.mean() for image in images])
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

    image_features = features

    def __init__(self) -> None:
        self.texts: list[str] = []

    def text_features(self, prompts: Sequence[str]) -> np.ndarray:
        self.texts += prompts
        return np.tile(np.float32([1, 0]), (len(prompts), 1))


def test_there_are_25_prompts_of_each_kind() -> None:
    for live in (True, False):
        prompts = templates(live)
        assert len({*prompts}) == len(prompts) == 25 and all(prompt.count("{}") == 1 for prompt in prompts)
    assert len({*templates(True)} & {*templates(False)}) == 15
    assert templates(True)[13] == "a {} wearing a black top hat and a monocle"
    assert templates(False)[-1] == "a cube shaped {}"


@pytest.mark.parametrize(
    ("noun", "live"),
    [("dog", True), ("old man", True), ("backpack", False), ("stuffed animal", False), ("dog toy", False)],
)
def test_nouns_of_animals_and_persons(noun: str, live: bool) -> None:
    assert is_live(noun) == live


def test_prompts_follow_the_subject() -> None:
    bench = DreamBench(lambda: pytest.fail("no network is needed for prompts"), diverse=False)
    members = {name for name in dir(Evaluator) if not name.startswith("_")}
    assert members - {*dir(bench)} == set()
    prompts = bench.prompts(DOG, images=4, quick=False)
    assert [one.count for one in prompts] == [4] * 25 + [16] and prompts[10].text == "a sks dog wearing a red hat"
    assert "mirror" in " ".join(one.text for one in bench.prompts(replace(DOG, live=False), images=4, quick=False))
    quick = [one.text for one in bench.prompts(DOG, images=4, quick=True)]
    assert len(quick) == 6 and {*quick} < {one.text for one in prompts}


def test_diversity_needs_two_images_of_a_prompt() -> None:
    with pytest.raises(SettingsError, match="--images 2"):
        DreamBench(lambda: pytest.fail("nothing is measured"), diverse=True).prompts(DOG, images=1, quick=False)


def test_an_evaluator_needs_a_measure_of_each_role(monkeypatch: pytest.MonkeyPatch) -> None:
    methods = dict.fromkeys(("prompts", "features", "reference", "scores", "goals"), len)
    measures = [Measure(name="gain", heading="gain", text="in [0, 1]", role="gained")]
    mine = SimpleNamespace(name="mine", fingerprint="1", measures=measures, **methods)
    entry = SimpleNamespace(name="mine", value="mine:Evaluator", load=lambda: lambda: mine)
    monkeypatch.setattr(registry, "entry_points", lambda **_: [entry])
    with pytest.raises(PluginError, match="kept"):
        registry.registered("mine")


def test_scores_of_known_features() -> None:
    network: Any = Angles()
    bench = DreamBench(lambda: (network, network, None), diverse=False)
    prompts = bench.prompts(DOG, images=2, quick=True)
    of_subject, of_class = 2 * 5, 8
    images = [np.full((8, 8, 3), level, np.uint8) for level in [0] * of_subject + [60, 90] * (of_class // 2)]
    features, reference = bench.features(DOG, prompts, images), bench.reference(DOG)
    assert "a dog in the jungle" in network.texts and "a red dog" in network.texts
    scores = bench.scores(DOG, prompts, features, reference)
    values = {name: score.value for name, score in scores.items()}
    to_60, to_90 = (0.5 + 0.5 + np.cos(np.radians(30))) / 3, 1 / 3  # mean cosine to the real images
    expected = {
        "subject_fidelity": 2 / 3,
        "image_fidelity": 2 / 3,
        "prompt_fidelity": 1,
        "prior_preservation": (to_60 + to_90) / 2,
    }
    assert values == pytest.approx(expected, abs=1e-5)
    assert scores["subject_fidelity"].error == pytest.approx(0, abs=1e-6) and scores["prior_preservation"].error > 0.01
    assert bench.goals(reference)["subject_fidelity"] == pytest.approx(1 / 3, abs=1e-5)
