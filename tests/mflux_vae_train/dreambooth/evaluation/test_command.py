"""mflux-dreambooth evaluate on a run of the fake pipeline: output, report, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae_train.dreambooth.commands import main
from mflux_vae_train.dreambooth.drawing import adapted
from mflux_vae_train.dreambooth.evaluation.subject import read_subject
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.evaluation import registry
from tests.contracts.fake import FakePipeline
from tests.helpers.html import Page
from tests.mflux_vae_train.dreambooth.evaluation.brightness import Brightness
from tests.mflux_vae_train.evaluation.small_networks import CLIP, DINO

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command with the fake pipeline; returns exit status, standard output and standard error."""
    monkeypatch.setattr(adapted, "open_pipeline", lambda model, **_: FakePipeline())
    monkeypatch.setattr(registry, "registered", lambda pipeline: Brightness() if pipeline == "fake" else None)

    def run(*words: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(["evaluate", *map(str, words)])
        return status, *capsys.readouterr()

    return run


def test_a_run_is_evaluated_from_training_to_report(short_run: Any, tmp_path: Path, command: Command) -> None:
    DreamBooth(FakePipeline()).train(short_run(max_train_steps=4, checkpointing_steps=2, num_class_images=0))
    out = tmp_path / "out"
    status, text, err = command(out, "--images", 1, "--json", "--scale", 1, 0.5)
    assert status == 0, err
    document = json.loads(text)
    assert [(row["checkpoint"], row["scale"]) for row in document["rows"]] == [
        ("2", 0.5),
        ("2", 1),
        ("4", 0.5),
        ("4", 1),
    ]
    assert "15 images to draw" in err and document == json.loads((out / "evaluation" / "evaluation.json").read_text())
    report = (out / "report.html").read_text(encoding="utf-8")
    status, text, err = command(out, "--images", 1)
    assert status == 0 and "0 images to draw" in err and "recommended" in text
    again = (out / "report.html").read_text(encoding="utf-8")
    for html in (report, again):
        page = Page(html)
        assert [kind.get("id") for tag, kind in page.elements if tag == "section"].count("evaluation") == 1
        assert ("a", {"href": "#evaluation"}) in page.elements
    assert "at 0.5" in report and "at 0.5" not in again

    status, text, err = command(out, "--images", 2, "--quick", "--checkpoint", "last", "--dino", DINO, "--clip", CLIP)
    assert status == 0 and "CLIP-T" in text and "PRES" in text, err
    status, _, err = command(out / "pytorch_lora_weights.safetensors", "--images", 0)
    assert status == 2 and "--images" in err
    status, _, err = command(out, "--scale", "nan")
    assert status == 2 and "--scale" in err
    status, _, err = command(out, "--subject", "\udcff dog")
    assert status == 2 and "UTF-8" in err
    status, text, err = command(out, "--images", 1, "--kind", "live")
    assert status == 0 and "warning: --kind" in err and "0 images to draw" in err
    status, _, err = command(out, "--checkpoint", 3)
    assert status == 2 and "--checkpoint" in err


def test_networks_are_looked_for_before_anything_is_drawn(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="nowhere"):
        registry.open_evaluator("tiny", dino=str(tmp_path / "nowhere"))
    with pytest.raises(SettingsError, match="--lpips"):
        registry.open_evaluator("tiny", lpips=["a", "b", "c"])


def test_subject_is_read_from_the_settings(instance_dir: Path) -> None:
    settings = {"instance_prompt": "a photo of sks dog", "instance_data_dir": str(instance_dir)}
    found = read_subject(settings)
    assert (found.phrase, found.noun, found.class_prompt, len(found.images)) == (
        "sks dog",
        "dog",
        "a photo of a dog",
        5,
    )
    assert read_subject(settings, phrase="sks puppy").phrase == "sks puppy"
    unclear = {**settings, "instance_prompt": "my friend"}
    with pytest.raises(SettingsError, match="--class_noun"):
        read_subject(unclear)
    assert read_subject(unclear, phrase="my friend", noun="man").class_prompt == "a photo of a man"
    cat = {**settings, "instance_prompt": "a photo of ohwx cat"}
    several = {**settings, "concepts": [settings, cat]}
    with pytest.raises(SettingsError, match="--instance_prompt"):
        read_subject(several)
    assert read_subject(several, instance_prompt=cat["instance_prompt"]).noun == "cat"


def test_a_fully_trained_pipeline_has_the_evaluator_of_the_model(
    short_run: Any, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    """The pipeline in the run's folder has another name."""
    settings = short_run(train_mode="full", max_train_steps=1, prior_preservation="none", num_class_images=0)
    DreamBooth(FakePipeline()).train(settings)
    (Path(settings.output_dir) / "pipeline").mkdir()
    trained = FakePipeline()
    trained.name = "pipeline"
    monkeypatch.setattr(adapted, "open_pipeline", lambda model, **_: FakePipeline() if model == "fake" else trained)
    status, text, err = command(settings.output_dir, "--images", 1)
    assert status == 0 and "brightness of others" in text, err
