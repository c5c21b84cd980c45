"""Signals during a validation or its previews: stop at once, repeat on resume."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.images import save_image
from mflux_vae_train.checkpointing import checkpoint
from mflux_vae_train.vae.config import settings_from_dict
from mflux_vae_train.vae.evaluation import validation
from mflux_vae_train.vae.train import VAETrainer
from tests.faults.runs import intact, left, same
from tests.helpers.signals import signalled_within


def train(tmp_path: Path, name: str) -> Any:
    """Six updates in three epochs, with averaged weights, which are validated."""
    pictures = tmp_path / "pictures"
    if not pictures.exists():
        draws = np.random.default_rng(0)
        for number in range(8):
            save_image(pictures / f"{number}.png", draws.integers(0, 256, (12, 12, 3)).astype(np.uint8))
    given = {
        "data": str(pictures),
        "output_dir": str(tmp_path / name),
        "experiment_name": "run",
        "image_size": 12,
        "hidden_dims": (4, 6),
        "latent_dim": 3,
        "val_share": 0.5,
        "batch_size": 1,
        "gradient_accumulation_steps": 2,
        "num_epochs": 3,
        "ema_decay": 0.9,
        "samples_every": 1,
    }
    return VAETrainer(settings_from_dict(given)).train()


# Four images are held out and encoded one by one. Two previews are written after each validation.
MOMENTS = {
    "the first validation": ("sample_latents", 3, 2),
    "the second validation": ("sample_latents", 5, 4),
    "the last validation": ("sample_latents", 12, 6),
    "previews": ("save_image", 2, 2),
    "the last previews": ("save_image", 5, 6),
}
"""Function of the module, number of the call, completed updates."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_interrupted_hooks_run_on_resume(moment: str, number: int, tmp_path: Path) -> None:
    name, call, update = MOMENTS[moment]
    out = tmp_path / "out" / "checkpoints" / "run"
    whole = train(tmp_path, "whole")
    with signalled_within(validation, name, call, number):
        train(tmp_path, "out")
    intact(out)
    assert checkpoint.latest(out) == out / f"checkpoint-{update}"
    assert not (out / "samples" / f"samples-{update:06}.png").exists()
    _assert_same_arrays(out / f"checkpoint-{update}", tmp_path / "whole/checkpoints/run")
    again = train(tmp_path, "out")
    assert again.updates == 6 - update and again.metrics == whole.metrics
    same(out, left(whole.folder))


def _assert_same_arrays(folder: Path, whole: Path) -> None:
    """The checkpoint has the trained weights, not the averaged ones used by the validation."""
    other = whole / folder.name
    if other.exists():  # only the last two are kept
        ours, theirs = (mx.load(str(one / checkpoint.ARRAYS)) for one in (folder, other))
        assert isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys()
        for path, array in ours.items():
            assert mx.array_equal(array, theirs[path]), path


def test_a_signal_before_the_first_update(tmp_path: Path) -> None:
    train(tmp_path, "whole")
    with signalled_within(VAETrainer, "_train", 1, signal.SIGTERM):
        train(tmp_path, "out")
    assert train(tmp_path, "out").updates == 6
    same(tmp_path / "out/checkpoints/run", left(tmp_path / "whole/checkpoints/run"))
