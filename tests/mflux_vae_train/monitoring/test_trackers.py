"""TensorBoard, read back by its reader; Weights & Biases, against a fake module that records calls."""

from __future__ import annotations

import io
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mflux_vae.errors import SettingsError
from mflux_vae_train.monitoring import trackers
from mflux_vae_train.monitoring.trackers import open_tracker, requested_trackers
from mflux_vae_train.training.hooks import Record


def record(update: int, loss: float) -> Record:
    return Record(update=update, total=9, metrics={"loss": loss}, seconds=0.1)


PICTURE = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)


def opened(name: str, folder: Path, start: int = 0) -> trackers.Tracker:
    return open_tracker(name, folder, run="a | b", settings={"prompt": "x | y", "rank": 4}, start=start)


def test_requested_and_missing_trackers(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"tensorboard"}
    monkeypatch.setattr(trackers, "find_spec", lambda name: name if name in there else None)
    assert requested_trackers(None) == requested_trackers("none") == ()
    assert list(requested_trackers("tensorboard")) == list(requested_trackers("all")) == ["tensorboard"]
    with pytest.raises(SettingsError, match=r"mflux-vae\[wandb\]"):
        requested_trackers("wandb")
    there.clear()
    with pytest.raises(SettingsError, match="--report_to all"):
        requested_trackers("all")


@pytest.mark.filterwarnings("ignore")  # TensorBoard's own
def test_tensorboard_has_each_value_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with opened("tensorboard", tmp_path) as board:
        for update in (1, 2, 3):
            board(record(update, loss=float(update)))
        board.scalars("validation", 2, {"psnr": 20.0})
        board.image("preview", 2, PICTURE, "a dog")
    with opened("tensorboard", tmp_path, start=2) as board:
        board(record(3, loss=30.0))
    seen = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    seen.Reload()
    assert [(one.step, one.value) for one in seen.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [(one.step, one.value) for one in seen.Scalars("validation/psnr")] == [(2, 20.0)]
    (image,) = seen.Images("preview: a dog")
    found = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
    assert image.step == 2 and np.array_equal(found, PICTURE)
    (text, *_) = [one.tensor_proto.string_val[0].decode() for one in seen.Tensors("settings")]
    assert "| prompt | x \\| y |" in text and "| rank | 4 |" in text


class Board(types.ModuleType):
    """The part of wandb that is used."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.ended: list[int] = []
        self.error: Exception | None = None

    def init(self, **given: Any) -> Board:
        if self.error:
            raise self.error
        self.runs.append(given)
        return self

    def log(self, values: dict[str, Any], *, step: int) -> None:
        self.logged.append((step, values))

    def finish(self, *, exit_code: int) -> None:
        self.ended.append(exit_code)

    def Image(self, picture: np.ndarray, *, caption: str) -> tuple[str, tuple[int, ...]]:
        return caption, picture.shape


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Board:
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return board


def test_wandb_gets_settings_metrics_and_images(wandb: Board, tmp_path: Path) -> None:
    assert list(requested_trackers("wandb")) == ["wandb"]
    with opened("wandb", tmp_path) as tracker:
        tracker(record(1, loss=0.5))
        tracker.image("preview", 1, PICTURE, "a dog")
    (run,) = wandb.runs
    assert run["config"] == {"prompt": "x | y", "rank": 4} and run["name"] == "a | b"
    assert run["project"] == "dreambooth" and Path(run["dir"]) == tmp_path
    assert wandb.logged == [(1, {"train/loss": 0.5}), (1, {"preview": ("a dog", (4, 6, 3))})]
    assert wandb.ended == [0]


def test_a_resumed_run_keeps_its_id_and_a_new_one_gets_another(wandb: Board, tmp_path: Path) -> None:
    for start in (0, 4, 0):
        with opened("wandb", tmp_path, start=start):
            pass
    first, resumed, other = (run["id"] for run in wandb.runs)
    assert first == resumed != other


def test_a_failed_run_is_reported_as_failed(wandb: Board, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), opened("wandb", tmp_path):
        raise ZeroDivisionError
    assert wandb.ended == [1]


def test_the_environment_names_the_project(wandb: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    opened("wandb", tmp_path)
    assert "project" not in wandb.runs[0]


def test_an_error_of_wandb_is_one_line(wandb: Board, tmp_path: Path) -> None:
    wandb.error = RuntimeError("api_key not configured\n(no-tty)")
    with pytest.raises(SettingsError, match=r"api_key not configured \(no-tty\).*wandb login"):
        opened("wandb", tmp_path)
