"""Runs with held-out images: the loss on them, and the adapter that it is lowest for."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mflux_vae.errors import SettingsError
from mflux_vae.images import save_image
from mflux_vae.weights.formats.files import read_safetensors
from mflux_vae_train import lora
from mflux_vae_train.dreambooth.best_adapter import read_best
from mflux_vae_train.dreambooth.config import Concept, DreamBoothSettings
from mflux_vae_train.dreambooth.optimization.held_out_loss import HeldOutLoss
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.training.hooks import read_metrics
from tests.contracts.fake import FakePipeline
from tests.faults.runs import left, same
from tests.helpers.crash_copies import states
from tests.mflux_vae_train.dreambooth.conftest import subject
from tests.mflux_vae_train.dreambooth.runs.test_train import Stop, interrupted_after

Make = Callable[..., DreamBoothSettings]
ADAPTER = "pytorch_lora_weights.safetensors"
METRIC = "held_out_loss"


@pytest.fixture
def settings(short_run: Make) -> Make:
    """A run of six updates that measures two held-out images every second one, and keeps the best adapter."""
    given = {"validation_share": 0.4, "validation_loss_steps": 2, "keep_best": True, "learning_rate": 0.05}
    given |= {"num_class_images": 2, "checkpointing_steps": 2, "checkpoints_total_limit": None}
    return lambda **changes: short_run(**{**given, **changes})


def train(settings: DreamBoothSettings) -> Any:
    return DreamBooth(FakePipeline()).train(settings)


def losses(out: Path) -> dict[int, float]:
    return {line["update"]: line[METRIC] for line in read_metrics(out / "metrics.jsonl") if METRIC in line}


def scripted(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """Let measurements give these numbers."""
    numbers = iter(values)
    monkeypatch.setattr(HeldOutLoss, "__call__", lambda self: next(numbers))


def test_the_loss_is_logged_shown_and_its_best_adapter_kept(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scripted(monkeypatch, 2.0, 1.5, 1.25, 1.75)
    with caplog.at_level(logging.INFO):
        train(settings(train_batch_size=2))
    out = tmp_path / "out"
    assert losses(out) == {0: 2.0, 2: 1.5, 4: 1.25, 6: 1.75}
    assert "so far" in caplog.text and "no held-out loss was below" not in caplog.text
    assert "2.0000 untrained, 1.2500 at its lowest, after update 4, 1.7500 at the end" in caplog.text
    best = read_best(out / "best" / ADAPTER)
    assert best is not None and (best.update, best.loss) == (4, 1.25)
    kept, then = (read_safetensors(out / name / ADAPTER)[0] for name in ("best", "checkpoint-4"))
    assert kept.keys() == then.keys() and all((kept[name] == then[name]).all() for name in kept)
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert "<h3>Held-out loss</h3>" in page and "2 held out" in page and "1.25 at its lowest" in page
    assert f"best/{ADAPTER}" in card and "(1.2500)" in card
    assert lora.adapter_file(out / "best") == out / "best" / ADAPTER


def test_a_lowest_loss_above_the_untrained_one_is_named_so(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scripted(monkeypatch, 1.0, 1.5, 1.25, 1.75)
    with caplog.at_level(logging.INFO):
        train(settings())
    assert "so far" not in caplog.text and caplog.text.count("(untrained: 1.0000)") == 2
    assert "no held-out loss was below" in caplog.text and "--learning_rate" in caplog.text
    page, card = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    assert "1 untrained" in page and "(1.2500)" in card and "(1.0000)" in card


def test_training_does_not_depend_on_measurements(settings: Make, tmp_path: Path, instance_dir: Path) -> None:
    for index in range(2):
        save_image(tmp_path / "more" / f"{index}.png", subject(40 + index))
    off = {"validation_share": None, "validation_loss_steps": None, "keep_best": False, "lora_dropout": 0.2}
    train(settings(**off))
    before = (tmp_path / "out" / ADAPTER).read_bytes()
    on = {**off, "validation_data_dir": str(tmp_path / "more"), "keep_best": True}
    assert train(settings(**on)).updates == 0, "the finished run is the same run"
    train(settings(**on, output_dir=str(tmp_path / "measured")))
    assert (tmp_path / "measured" / ADAPTER).read_bytes() == before
    assert len(losses(tmp_path / "measured")) == 7, "as often as previews"


def test_a_run_killed_before_any_file_operation_keeps_the_same_best(settings: Make, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    short = settings(max_train_steps=3, validation_loss_steps=1, prior_preservation="none")
    taken = states(out, tmp_path / "states", lambda: train(short), every=23)
    expected = left(Path(shutil.move(out, whole)))
    assert len(taken) > 2 and f"best/{ADAPTER}" in expected
    for state in taken:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(state, out)
        train(short)
        same(out, expected)


def test_going_back_leaves_the_best_of_later_updates_behind(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    scripted(monkeypatch, 2.0, 1.5, 1.25, 1.0, 1.75, 1.5)
    train(settings())
    train(settings(resume_from_checkpoint="checkpoint-2"))
    assert losses(out) == {0: 2.0, 2: 1.5, 4: 1.75, 6: 1.5}
    abandoned, best = read_best(out / "abandoned" / "best" / ADAPTER), read_best(out / "best" / ADAPTER)
    assert abandoned is not None and best is not None
    assert (abandoned.update, abandoned.loss, best.update, best.loss) == (6, 1.0, 6, 1.5)


def test_the_best_of_other_held_out_images_is_not_compared(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    scripted(monkeypatch, 2.0, 1.0, 1.75, 1.75)
    for index in range(2):
        save_image(tmp_path / str(index) / "held out.png", subject(50 + index))
    options = {"validation_share": None, "validation_data_dir": str(tmp_path / "0")}
    with monkeypatch.context() as patch, pytest.raises(Stop):
        interrupted_after(3, patch)
        train(settings(**options))
    train(settings(**{**options, "validation_data_dir": str(tmp_path / "1")}))
    best = read_best(tmp_path / "out" / "best" / ADAPTER)
    assert best is not None and best.update == 4 and "other held-out images" in caplog.text
    assert "do not count any more" in caplog.text and "untrained" not in caplog.text
    page = (tmp_path / "out" / "report.html").read_text()
    assert "1.75 at its lowest" in page and "2 untrained" not in page


def test_every_kind_of_run_is_measured(settings: Make, tmp_path: Path, instance_dir: Path) -> None:
    rng = np.random.default_rng(0)
    for index, size in enumerate([(16, 40), (40, 16), (24, 20)]):
        save_image(instance_dir / f"other-{index}.png", rng.integers(0, 255, (*size, 3), dtype=np.uint8))
    save_image(instance_dir / "other-1-mask.png", np.full((40, 16, 1), 200, np.uint8))
    shapes = {"use_aspect_ratio_buckets": True, "random_flip": True, "center_crop": False, "masked_loss": True}
    ways = {
        "dop": {**shapes, "prior_preservation": "dop", "validation_share": 0.7},
        "full": {**shapes, "train_mode": "full", "keep_best": False, "learning_rate": 1e-3},
        "concepts": {
            "concepts": (
                Concept(instance_data_dir=str(instance_dir), instance_prompt="a photo of sks dog", repeats=3),
                Concept(instance_data_dir=str(instance_dir), instance_prompt="a photo of xyz cat"),
            )
        },
    }
    for name, way in ways.items():
        train(settings(**way, output_dir=str(tmp_path / name), max_train_steps=1))
        assert [*losses(tmp_path / name)] == [0, 1] and all(map(np.isfinite, losses(tmp_path / name).values()))


def test_refused_settings(settings: Make, tmp_path: Path, instance_dir: Path) -> None:
    with pytest.raises(SettingsError, match="--keep_best"):
        settings(train_mode="full")
    with pytest.raises(SettingsError, match="--validation_share"):
        settings(validation_share=None)
    with pytest.raises(SettingsError, match="exclude"):
        settings(validation_data_dir=str(tmp_path))
    with pytest.raises(SettingsError, match="same folder"):
        settings(validation_share=None, validation_data_dir=str(instance_dir))
