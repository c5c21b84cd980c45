from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae_train.dreambooth.optimization import loss_by_noise


def test_means_do_not_depend_on_the_micro_batches():
    draws = np.random.default_rng(0)
    errors, sigma = draws.uniform(size=24).astype(np.float32), draws.uniform(size=24).astype(np.float32)
    sigma[:2] = 0.0, 1.0
    sums: dict[str, float] = {}
    for part in np.split(np.arange(24), [3, 4, 15]):  # micro-batches count by their sizes
        for name, value in loss_by_noise.bin_sums(mx.array(errors[part]), mx.array(sigma[part])).items():
            sums[name] = sums.get(name, 0.0) + value.item() * len(part) / 24
    found = loss_by_noise.bin_means({"loss": 1.0, **sums})
    assert found.pop("loss") == 1.0 and len(found) == loss_by_noise.BINS
    for low in (0, 20, 40, 60, 80):
        inside = (sigma >= low / 100) & ((sigma < (low + 20) / 100) | (low == 80))
        assert found[f"loss_noise_{low}-{low + 20}"] == pytest.approx(errors[inside].mean(), rel=1e-5)


def test_bin_without_samples_is_left_out():
    found = loss_by_noise.bin_means(
        {name: x.item() for name, x in loss_by_noise.bin_sums(mx.array([2.0]), mx.array([0.5])).items()}
    )
    assert found == {"loss_noise_40-60": 2.0}
