"""The loss on held-out images."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae_train.dreambooth.optimization import held_out_loss
from mflux_vae_train.dreambooth.optimization.held_out_loss import HeldOutLoss
from tests.contracts.fake import FakePipeline
from tests.mflux_vae_train.dreambooth.data.small_dataset import small_dataset


def measure(pipeline: Any, count: int = 3, **changes: Any) -> HeldOutLoss:
    latents = mx.random.normal((count, 4, 4, 3), key=mx.random.key(0))
    dataset = small_dataset(latents, None, pipeline.encode_prompts(["a sks dog", "a dog", ""]))
    options = {"guidance": 1.0, "sampling": None, "seed": 0, "batch_size": 2}
    return HeldOutLoss(pipeline, dataset, **{**options, **changes})


def test_equal_weights_have_equal_losses() -> None:
    pipeline = FakePipeline()
    loss = measure(pipeline)
    first = loss()
    assert np.isfinite(first) and loss() == first
    assert measure(pipeline, batch_size=1)() == pytest.approx(first, rel=1e-5)
    assert measure(pipeline, seed=1)() != first
    pipeline.denoiser.proj_out.weight = pipeline.denoiser.proj_out.weight * 2
    assert loss() != first


@pytest.mark.parametrize(("count", "levels"), [(1, 16), (3, 6), (8, 4)])
def test_levels_cover_the_distribution_evenly(count: int, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    quantiles = []

    def seen(pipeline: Any, arrays: Any, *, sampling: Any, **_: Any) -> Any:
        quantiles.extend([sampling.quantile] * len(arrays["latents"]))
        return mx.array(1.0), {}

    monkeypatch.setattr(held_out_loss, "dreambooth_loss", seen)
    assert measure(FakePipeline(), count)() == 1.0
    expected = [(level + 0.5) / levels for level in range(levels) for _ in range(count)]
    assert quantiles == pytest.approx(expected)


def test_every_process_gets_the_number_of_a_single_one() -> None:
    """Batches do not depend on the number of processes, and their sums are added in order."""
    pipeline = FakePipeline()
    loss = measure(pipeline)
    whole = loss()

    class Second:
        def map_in_rounds(self, items: Any, function: Any) -> Any:
            results = {index: function(item) for index, item in reversed([*enumerate(items)])}
            return ((item, results[index]) for index, item in enumerate(items))

    loss._processes = Second()  # type: ignore[assignment]
    assert loss() == whole


def test_a_pipeline_without_predict_and_a_compiled_pass() -> None:
    class Plain:
        recommended = FakePipeline.recommended

        def __init__(self) -> None:
            self.whole = FakePipeline()
            self.encode_prompts = self.whole.encode_prompts

        def loss(self, latents: mx.array, conditioning: Any, *, key: mx.array, guidance: float) -> mx.array:
            return mx.compile(
                lambda *arrays: self.whole.loss(*arrays[:1], {"embedding": arrays[1]}, key=arrays[2], guidance=guidance)
            )(latents, conditioning["embedding"], key)

    assert np.isfinite(measure(Plain())())
