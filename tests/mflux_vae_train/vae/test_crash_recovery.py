"""A training that ends at any moment resumes to the same files, bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mflux_vae.errors import SettingsError, TrainingError
from mflux_vae.images import save_image
from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.checkpointing.lock import Lock
from mflux_vae_train.distributed.interrupts import Interrupted
from mflux_vae_train.training import step
from mflux_vae_train.vae.config import settings_from_dict
from mflux_vae_train.vae.data.sources import Arrays
from mflux_vae_train.vae.fingerprint import run_identity
from mflux_vae_train.vae.train import VAETrainer
from tests.faults.runs import left, same
from tests.helpers.crash_copies import states


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    draws = np.random.default_rng(0)
    for number in range(6):
        save_image(tmp_path / "pictures" / f"{number}.png", draws.integers(0, 256, (14, 12, 3)).astype(np.uint8))
    return tmp_path / "pictures"


def train(pictures: Path, out: Path, **changes: Any) -> Any:
    given = {
        "data": str(pictures),
        "output_dir": str(out),
        "experiment_name": "run",
        "image_size": 12,
        "hidden_dims": (4, 6),
        "latent_dim": 3,
        "val_share": 0.3,
        "batch_size": 1,
        "gradient_accumulation_steps": 2,
        "num_epochs": 3,
        "ema_decay": 0.9,
        "early_stopping": 9,
        "samples_every": 1,
    }
    return VAETrainer(settings_from_dict({**given, **changes})).train()


def run_of(out: Path) -> Path:
    return out / "checkpoints" / "run"


def test_killed_before_any_file_change_resumes_to_the_same_result(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    taken = states(out, tmp_path / "states", lambda: train(pictures, out), every=13)
    expected = left(run_of(Path(shutil.move(out, tmp_path / "whole"))))
    assert len(taken) > 3 and {"validation.jsonl", "best_model.safetensors"} <= expected.keys()
    for state in taken:
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(state, out)
        train(pictures, out)
        same(run_of(out), expected)


@pytest.mark.parametrize(("update", "number"), [(1, signal.SIGINT), (2, signal.SIGTERM), (6, signal.SIGTERM)])
def test_a_signal_skips_no_validation(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, update: int, number: int
) -> None:
    """An epoch has two updates: a validation is due when the signal arrives during the second."""
    train(pictures, tmp_path / "whole")
    original = step.Step.__call__

    def sends(self: Any, index: int, *rest: Any) -> Any:
        if index + 1 == update:
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        return original(self, index, *rest)

    with monkeypatch.context() as patch, pytest.raises(Interrupted) as caught:
        patch.setattr(step.Step, "__call__", sends)
        train(pictures, tmp_path / "out")
    assert (caught.value.exit_code, caught.value.update) == (128 + number, update)
    train(pictures, tmp_path / "out")
    same(run_of(tmp_path / "out"), left(run_of(tmp_path / "whole")))


def test_a_second_process_and_a_full_disk_are_errors(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(pictures, tmp_path / "whole")
    original = mx.save_safetensors

    def full(file: str, *rest: Any) -> None:
        if "checkpoint-4" in file:
            raise RuntimeError("[write] Unable to write 8 bytes to file.")
        original(file, *rest)

    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="checkpoint-4"):
        patch.setattr(mx, "save_safetensors", full)
        train(pictures, tmp_path / "out")
    with Lock(run_of(tmp_path / "out")), pytest.raises(SettingsError, match="process"):
        train(pictures, tmp_path / "out")
    train(pictures, tmp_path / "out")
    same(run_of(tmp_path / "out"), left(run_of(tmp_path / "whole")))


def test_changed_images_are_rejected(pictures: Path, tmp_path: Path) -> None:
    train(pictures, tmp_path / "out", num_epochs=1, lr_scheduler="constant")
    moved = Path(shutil.copytree(pictures, tmp_path / "elsewhere"))
    train(moved, tmp_path / "out", num_epochs=2, lr_scheduler="constant")  # same images, longer run
    save_image(pictures / "3.png", np.zeros((14, 12, 3), np.uint8))
    changed = {"num_epochs": 3, "lr_scheduler": "constant", "learning_rate": 1e-5}
    with pytest.raises(SettingsError, match=r"images.*learning_rate.*--allow_changes"):
        train(pictures, tmp_path / "out", **changed)
    assert train(pictures, tmp_path / "out", allow_changes=True, **changed).updates == 2
    assert checkpoint.latest(run_of(tmp_path / "out")) == run_of(tmp_path / "out") / "checkpoint-6"


def test_the_content_of_files_counts_not_their_path(tmp_path: Path) -> None:
    """Trains with a list of videos; compares only the identity for the large weights of LPIPS."""
    for video in ("a", "b", "c"):
        for number in range(3):
            shade = np.full((12, 12, 3), 60 * ord(video) % 250 + number, np.uint8)
            save_image(tmp_path / "videos" / video / f"{number}.png", shade)
    (tmp_path / "list.txt").write_text("a\nb\n")
    given: dict[str, Any] = {"lr_scheduler": "constant", "samples_every": None, "val_share": 0.5}
    videos, out = tmp_path / "videos", tmp_path / "out"
    updates = train(videos, out, data_list=str(tmp_path / "list.txt"), num_epochs=1, **given).updates
    moved = shutil.move(tmp_path / "list.txt", tmp_path / "moved.txt")
    assert train(videos, out, data_list=str(moved), num_epochs=2, **given).updates == updates
    (tmp_path / "moved.txt").write_text("a\nc\n")
    with pytest.raises(SettingsError, match=r"data_list.*--allow_changes"):
        train(videos, out, data_list=str(moved), num_epochs=3, **given)

    source = Arrays(np.zeros((4, 12, 12, 3), np.uint8), size=12, channels=3)

    def compared(*files: Path) -> Any:
        settings = settings_from_dict({"lpips": [str(file) for file in files] or None})
        return run_identity(settings, nn.Module(), source, source)["lpips"]

    (tmp_path / "one").write_bytes(b"one")
    (tmp_path / "two").write_bytes(b"two")
    known = compared(tmp_path / "one", tmp_path / "two")
    shutil.copytree(tmp_path, tmp_path.with_name("elsewhere"))
    assert compared(*(tmp_path.with_name("elsewhere") / name for name in ("one", "two"))) == known
    assert compared(tmp_path / "two", tmp_path / "one") != known and compared() is None
    (tmp_path / "two").write_bytes(b"three")
    assert compared(tmp_path / "one", tmp_path / "two") != known
    with pytest.raises(SettingsError, match="three"):
        compared(tmp_path / "three")


def test_changed_initial_weights_are_rejected(pictures: Path, tmp_path: Path) -> None:
    first = train(pictures, tmp_path / "first").best
    other = train(pictures, tmp_path / "other", seed=1).best
    options = {"samples_every": None, "lr_scheduler": "constant"}
    train(pictures, tmp_path / "out", init_from=str(first), num_epochs=1, **options)
    with pytest.raises(SettingsError, match="initial weights"):
        train(pictures, tmp_path / "out", init_from=str(other), num_epochs=2, **options)
    copied = shutil.copy(first, tmp_path / "copied.safetensors")
    assert train(pictures, tmp_path / "out", init_from=str(copied), num_epochs=2, **options).updates == 2
