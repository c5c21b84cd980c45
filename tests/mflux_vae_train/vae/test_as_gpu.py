"""Training autoencoders with the code for Metal and CUDA (`pytest --as-gpu` only): losses are those of a CPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae_train.vae.losses.adversarial import PatchDiscriminator
from tests.helpers import gpu_branch
from tests.mflux_vae_train.vae.test_train import ADVERSARIAL, RICH, SPATIAL, lines, trained

JOBS: dict[str, dict[str, Any]] = {
    "vectors": RICH,
    "total correlation, Muon": {"loss_type": "tc", "optimizer": "muon"},
    "adversarial": ADVERSARIAL,
    "checkpointed": {**SPATIAL, "gradient_checkpointing": True},
    "mixed precision": {**SPATIAL, "mixed_precision": True},
}


pytestmark = pytest.mark.usefixtures("uncompiled")


@pytest.mark.parametrize("job", JOBS)
def test_training_learns_as_on_a_cpu(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu_dtype) -> None:
    mixed = "mixed_precision" in JOBS[job]
    if mixed and gpu_dtype != mx.bfloat16:
        pytest.skip("mixed precision is bfloat16")
    monkeypatch.setattr("mflux_vae_train.vae.build.PatchDiscriminator", partial(PatchDiscriminator, width=4))

    def losses(name: str, **changes: Any) -> list[float]:
        result = trained(tmp_path / name, **{**JOBS[job], "num_epochs": 2, **changes})
        return [line["loss"] for line in lines(result.folder / "metrics.jsonl")]

    found = losses("gpu")
    gpu_branch.force(monkeypatch, cpu=True)
    expected = losses("cpu", **({"mixed_precision": False} if mixed else {}))
    print(f"{job}: losses differ by {np.max(np.abs(np.subtract(found, expected) / expected)):.1e}")
    np.testing.assert_allclose(found, expected, rtol=0.05 if mixed else 2e-3)
