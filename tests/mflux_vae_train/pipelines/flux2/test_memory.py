"""The estimate of FLUX.2 klein's memory beside what a run took, and at full size."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mflux_vae_train import lora
from mflux_vae_train.pipelines import flux2
from mflux_vae_train.pipelines.flux2 import memory, naming
from mflux_vae_train.pipelines.flux2.configs import BASE_4B, BASE_9B, PUBLISHED
from mflux_vae_train.pipelines.flux2.family import is_quantized_layer
from mflux_vae_train.pipelines.flux2.transformer import Flux2Transformer
from mflux_vae_train.pipelines.footprint import Phase, Precision, Workload
from mflux_vae_train.pipelines.quantization import quantize, stored_bytes
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn
from tests.mflux_vae_train.pipelines.flux2.klein_stack import Stack, estimated, measured
from tests.mflux_vae_train.pipelines.flux2.small_klein import small_config

HALF = Precision(width=2, fused=True)
"""Metal and CUDA."""


@pytest.mark.parametrize("recompute", [pytest.param(False, marks=pytest.mark.slow), True])
def test_memory_of_a_small_stack_matches_the_estimate(recompute: bool) -> None:
    stack = Stack(heads=2, single=2, recompute=recompute)
    assert estimated(stack) == pytest.approx(measured(stack), rel=0.15)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("gpu_branch")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("double", "single"), [(1, 1), (3, 1), (1, 3)])
def test_memory_of_a_stack_on_a_gpu_matches_the_estimate(double: int, single: int, recompute: bool) -> None:
    stack = Stack(heads=4, double=double, single=single, text=64, recompute=recompute)
    found, expected = measured(stack), estimated(stack)
    print(f"{stack}: measured {found / 1e6:.0f} MB, estimated {expected / 1e6:.0f} MB")
    assert expected == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("bits", [None, 4])
def test_estimated_weight_bytes_are_exact(bits: int | None) -> None:
    config = small_config(num_attention_heads=4)
    network = drawn(Flux2Transformer(config), 0)
    if bits:
        quantize(network, bits, is_quantized_layer)
    held = sum(array.nbytes for _, array in tree_flatten(network.parameters()))
    assert stored_bytes(Flux2Transformer(config), 4, bits, is_quantized_layer) == held


def phases(repository: str, **changes) -> dict[str, Phase]:
    """A LoRA of rank 16 at 512 pixels with the default settings."""
    configs = PUBLISHED[repository]
    matched = lora.matching(Flux2Transformer(configs.transformer), naming.PRESETS["attention"])
    work = Workload(resolution=512, trained=16 * sum(matched.values()), guidance=4.0, steps=50)
    found = memory.phases(configs, replace(work, **changes), text_tokens=512, precision=HALF)
    return {phase.name: phase for phase in found}


def test_four_bit_klein_trains_within_6_gb() -> None:
    found = phases(BASE_4B, quantize=4, gradient_checkpointing=True)
    assert list(found) == ["text encoding", "latents", "training", "previews"]
    assert found["training"].peak <= 6e9 and found["text encoding"].peak <= 6e9
    # and not by a mistake: two billion bytes of weights are there
    assert found["training"].weights > 2e9
    large = phases(BASE_9B, quantize=4, gradient_checkpointing=True)
    assert found["training"].peak < large["training"].peak <= 10e9


def test_estimating_a_published_model_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = flux2.load("flux2-klein-9b")
    monkeypatch.setattr(pipeline._snapshot, "is_cached", lambda: False)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    footprint = pipeline.footprint(Workload(resolution=512, trained=1))
    assert mx.get_peak_memory() - before < 2**20
    assert footprint.download == pytest.approx(18.16e9 + 16.38e9 + 0.17e9, rel=0.01)
    assert "licence" in (footprint.access or "")
