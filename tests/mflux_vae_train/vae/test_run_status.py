"""The folder of a run: what is refused changes nothing, going back sticks, and refusals name what differs."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mflux_vae.errors import MfluxVaeError, SettingsError
from mflux_vae.images import save_image
from mflux_vae_train.training.hooks import read_metrics
from mflux_vae_train.training.step import Step
from mflux_vae_train.vae.config import settings_from_dict
from mflux_vae_train.vae.train import VAETrainer


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for number in range(6):
        save_image(tmp_path / "pictures" / f"{number}.png", np.full((12, 12, 3), 40 * number, np.uint8))
    return tmp_path / "pictures"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "run"


def train(pictures: Path, **changes: Any) -> Any:
    """Six updates in three epochs, with a checkpoint after each epoch."""
    given = {
        "data": str(pictures),
        "output_dir": str(pictures.parent),
        "experiment_name": "run",
        "image_size": 12,
        "hidden_dims": (4, 6),
        "latent_dim": 3,
        "val_share": 0.3,
        "batch_size": 2,
        "num_epochs": 3,
        "samples_every": 1,
        "lr_scheduler": "cosine",
    }
    return VAETrainer(settings_from_dict({**given, **changes})).train()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_refused_command_changes_nothing(pictures: Path, out: Path) -> None:
    train(pictures)
    before = content(out)
    for changes, words in (
        ({"learning_rate": 1e-5}, ["learning_rate was 0.001, is now 1e-05"]),
        ({"num_epochs": 5}, ["num_epochs", "--init_from", "--allow_changes"]),
        ({"num_epochs": 2, "allow_changes": True}, ["ends after 4"]),
        ({"learning_rate": 1e-5, "allow_changes": True}, ["nothing is left", "--num_epochs"]),
        ({"latent_dim": 4, "num_epochs": 5, "allow_changes": True}, ["network/"]),
        ({"resume_from_checkpoint": "checkpoint-1"}, ["checkpoint-6, checkpoint-4"]),
    ):
        for dry_run in (False, True):
            with pytest.raises(MfluxVaeError) as caught:
                train(pictures, dry_run=dry_run, **changes)
            message = str(caught.value).replace(str(pictures.parent), "")
            assert all(word in message for word in words) and len(message) <= 300, message
            assert content(out) == before
    assert train(pictures).updates == 0
    assert content(out) == before


def test_flags_that_shape_no_result_make_no_other_run(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(pictures)
    kept = {
        "samples_every": None,
        "save_every": 2,
        "log_images_every_n_steps": 3,
        "data_count": 9,
        "lr_step_epochs": 3,
        "free_bits": 0.0,
    }
    kept |= {"beta_end": 3.0, "layers_per_block": 1, "disc_weight": 2.0}
    assert train(pictures, **kept).updates == 0
    caplog.clear()
    with caplog.at_level(logging.INFO):
        train(pictures, dry_run=True)
    assert "already complete" in caplog.text


def test_the_file_that_differs_is_named(pictures: Path, out: Path) -> None:
    train(pictures)

    def refused(*words: str) -> None:
        with pytest.raises(SettingsError) as caught:
            train(pictures)
        assert all(word in str(caught.value) for word in ("images", *words)), str(caught.value)

    save_image(pictures / "new.png", np.zeros((12, 12, 3), np.uint8))
    refused("new.png is new")
    (pictures / "new.png").unlink()
    kept = (pictures / "3.png").read_bytes()
    save_image(pictures / "3.png", np.full((12, 12, 3), 9, np.uint8))
    refused("3.png has other content")
    (pictures / "3.png").unlink()
    refused("3.png is gone")
    (pictures / "3.png").write_bytes(kept)
    (pictures / "0.png").rename(pictures / "z.png")
    refused("order", "0.png is now called z.png")


def test_going_back_sticks(pictures: Path, out: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Stop(BaseException):
        pass

    step = Step.__call__

    def dies(self: Any, update: int, *rest: Any) -> Any:
        if update == 5:
            raise Stop
        return step(self, update, *rest)

    train(pictures)
    back: dict[str, Any] = {"learning_rate": 0.01, "allow_changes": True}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Step, "__call__", dies)
        train(pictures, resume_from_checkpoint="checkpoint-4", **back)
    assert "checkpoint-6" in caplog.text and "abandoned" in caplog.text
    moved = {path.name for path in (out / "abandoned").iterdir()}
    assert {"checkpoint-6", "best_model.safetensors", "samples-000006.png", "metrics.jsonl"} <= moved
    assert train(pictures, **back).updates == 2
    rates = [line["learning_rate"] for line in read_metrics(out / "metrics.jsonl")]
    assert len(rates) == 6 and rates[3] < 0.001 < rates[4]
    assert json.loads((out / "run.json").read_text())["branch"]["update"] == 4
    assert (out / "best_model.safetensors").is_file()
    assert train(pictures, resume_from_checkpoint="checkpoint-4", **back).updates == 0


def test_weights_of_unknown_origin_are_not_overwritten(pictures: Path, out: Path) -> None:
    train(pictures)
    for path in [*out.glob("checkpoint-*"), out / "samples"]:
        shutil.rmtree(path)
    before = content(out)
    assert train(pictures).updates == 0
    with pytest.raises(SettingsError, match="learning_rate"):
        train(pictures, learning_rate=1e-5)
    (out / "run.json").unlink()
    before.pop("run.json")
    with pytest.raises(SettingsError, match=r"best_model\.safetensors"):
        train(pictures, learning_rate=1e-5)
    assert content(out) == before


def test_a_longer_schedule_that_jumps_is_announced(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(pictures)
    train(pictures, num_epochs=9, allow_changes=True, dry_run=True)
    assert "jumps from" in caplog.text
