"""Whole runs with the code for Metal and CUDA (`pytest --as-gpu` only): losses are those of a CPU."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.train import DreamBooth
from mflux_vae_train.pipelines import tiny
from mflux_vae_train.training.hooks import read_metrics
from tests.helpers import gpu_branch

EXAMPLE = Path(tiny.__file__).parent / "example"
JOBS = {
    "class images": {"prior_preservation": "class_images", "num_class_images": 2},
    "output preservation": {"prior_preservation": "dop"},
    "4 bits, checkpointed": {"quantize": 4, "gradient_checkpointing": True},
    "DoRA, 8 bits": {"use_dora": True, "quantize": 8},
    "text encoder": {"train_text_encoder": True},
    "all weights": {"train_mode": "full", "optimizer": "adamw8bit", "learning_rate": 1e-4},
}
LIMIT = {mx.float32: 2e-3, mx.bfloat16: 0.05}
"""Relative difference of a loss."""


pytestmark = pytest.mark.usefixtures("uncompiled")
"""`test_compiled_update` covers compilation."""


@pytest.mark.parametrize("job", JOBS)
def test_a_run_learns_as_on_a_cpu(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_dtype) -> None:
    def losses(name: str) -> list[float]:
        settings = {
            "model": "tiny",
            "instance_data_dir": str(EXAMPLE),
            "instance_prompt": "a photo of xyz star",
            "output_dir": str(tmp_path / name),
            "resolution": 32,
            "max_train_steps": 3,
            "lr_warmup_steps": 0,
            "gradient_accumulation_steps": 2,
            "prior_preservation": "none",
            "num_validation_images": 0,
        }
        DreamBooth(tiny.load()).train(DreamBoothSettings(**(settings | JOBS[job])))
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        assert all(line["update_size"] > 0 for line in lines)
        return [line["loss"] for line in lines]

    found = losses("gpu")
    gpu_branch.force(monkeypatch, cpu=True)
    expected = losses("cpu")
    print(f"{job}: losses differ by {np.max(np.abs(np.subtract(found, expected)) / expected):.1e}")
    np.testing.assert_allclose(found, expected, rtol=LIMIT[gpu_dtype])
