"""What FLUX is estimated to take: beside what it took, and at full size the figures that people plan with."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from benchmarks.gpu.flux_stack import Stack, estimated, measured
from mflux_vae import kernels
from mflux_vae.pretrained.loading import new_network
from mflux_vae.runtime import device
from mflux_vae.tiling import plan as tiling_plan
from mflux_vae.weights.formats.files import convert_safetensors
from mflux_vae_train import lora
from mflux_vae_train.pipelines import flux1
from mflux_vae_train.pipelines.capabilities import SupportsMemoryControl
from mflux_vae_train.pipelines.flow.files import open_part
from mflux_vae_train.pipelines.flux1 import memory, naming
from mflux_vae_train.pipelines.flux1.configs import CLIP_L, published
from mflux_vae_train.pipelines.flux1.family import FAMILY, is_quantized_layer
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer
from mflux_vae_train.pipelines.footprint import Precision, Workload, clip_bytes
from mflux_vae_train.pipelines.quantization import quantize, stored_bytes
from mflux_vae_train.pipelines.text.clip import CLIPTextModel
from tests.helpers import gpu_branch
from tests.helpers.peak_memory import peak_of
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn, small_config

HALF = Precision(width=2, fused=True)
"""Metal and CUDA."""

SMALL = {"heads": 2, "side": 16, "text": 32}
FULL = [
    Stack(double=double, single=single, bits=bits, recompute=recompute, side=16)
    for double, single in ((1, 1), (2, 2))
    for bits in (None, 4)
    for recompute in (False, True)
]


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_of_a_small_stack_matches_the_estimate(recompute: bool) -> None:
    stack = Stack(**SMALL, double=1, single=2, recompute=recompute)
    assert estimated(stack) == pytest.approx(measured(stack), rel=0.15)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("gpu_branch")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("double", "single"), [(1, 1), (3, 1), (1, 3)])
def test_memory_of_a_stack_on_a_gpu_matches_the_estimate(double: int, single: int, recompute: bool) -> None:
    stack = Stack(heads=4, double=double, single=single, recompute=recompute)
    found, expected = measured(stack), estimated(stack)
    print(f"{stack}: measured {found / 1e6:.0f} MB, estimated {expected / 1e6:.0f} MB")
    assert expected == pytest.approx(found, rel=0.15)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dtype", "side", "text"), [("bfloat16", 16, 64), ("float32", 64, 256)])
def test_memory_of_full_width_on_a_gpu_matches_the_estimate(
    dtype: str, side: int, text: int, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_branch.force(monkeypatch, dtype=gpu_branch.DTYPES[dtype])
    assert os.environ.get("MLX_BFS_MAX_WIDTH", "20") == "20", "the order of evaluation on Metal"
    stack = Stack(double=1, single=2, side=side, text=text, recompute=recompute)
    found, expected = measured(stack), estimated(stack)
    print(f"{dtype}, {stack}: measured {found / 1e6:.0f} MB, estimated {expected / 1e6:.0f} MB")
    assert expected == pytest.approx(found, rel=0.15)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("stack", FULL, ids=str)
def test_memory_of_a_full_width_stack_matches_the_estimate(stack: Stack) -> None:
    found, expected = measured(stack), estimated(stack)
    print(f"{stack}: measured {found / 1e6:.0f} MB, estimated {expected / 1e6:.0f} MB")
    assert expected == pytest.approx(found, rel=0.15)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quantizing_a_stored_full_width_stack_needs_two_blocks_at_most(tmp_path: Path) -> None:
    config = Stack(double=3, single=3).config
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    convert_safetensors(file, dict(tree_flatten(FluxTransformer(config).parameters())), mx.float32)
    opened = []

    def quantised() -> dict:
        opened.append(open_part(FAMILY, "transformer", config, tmp_path))
        quantize(opened[0], 4, is_quantized_layer)
        return opened[0].parameters()

    peak = peak_of(quantised)
    held = sum(array.nbytes for _, array in tree_flatten(opened[0].parameters()))
    outline = FluxTransformer(config).transformer_blocks[0]
    block = sum(array.nbytes for _, array in tree_flatten(outline.parameters()))
    print(f"{file.stat().st_size / 1e9:.2f} GB stored, {held / 1e9:.2f} GB quantised, peak {peak / 1e9:.2f} GB")
    assert peak < held + 2 * block


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_estimated_weight_bytes_are_exact(bits: int | None) -> None:
    network = drawn(FluxTransformer(small_config(num_attention_heads=4)), 0)
    if bits:
        quantize(network, bits, is_quantized_layer)
    held = sum(array.nbytes for _, array in tree_flatten(network.parameters()))
    skeleton = FluxTransformer(small_config(num_attention_heads=4))
    assert stored_bytes(skeleton, 4, bits, is_quantized_layer) == held


def training(**changes) -> Workload:
    """A LoRA of rank 16 on every block of the published models, at 512 pixels."""
    matched = lora.matching(FluxTransformer(published(True).transformer), naming.PRESETS["attention+mlp"])
    return replace(Workload(resolution=512, trained=16 * sum(matched.values()), class_images=10), **changes)


needs_extension = pytest.mark.skipif(
    kernels.native() is None, reason="MLX alone takes more on a CPU: gathered windows, scores"
)


@needs_extension
@pytest.mark.parametrize(("embeds", "tokens"), [(False, 256), (True, 512)], ids=["schnell", "dev"])
def test_four_bit_flux_trains_within_12_gb(embeds: bool, tokens: int) -> None:
    work = training(quantize=4, gradient_checkpointing=True, batch=2, images=4)
    phases = memory.phases(published(embeds), work, text_tokens=tokens, precision=HALF)
    assert [phase.name for phase in phases] == [*("text encoding", "class images", "latents", "training", "previews")]
    assert all(phase.peak <= 12e9 for phase in phases), {phase.name: phase.peak / 1e9 for phase in phases}
    # and not by a mistake: six billion bytes of weights are there
    assert phases[3].weights > 6e9


def test_images_are_decoded_in_tiles_on_a_gpu_where_memory_is_short() -> None:
    whole = new_network(published(True).vae)
    with device.assuming(cpu=False):
        *_, latents, _, previews = memory.phases(published(True), training(resolution=1024), text_tokens=512)
        encoding, decoding = (tiling_plan.peak_bytes(whole, what, 1, 1024, 1024) for what in ("encode", "decode"))
    assert latents.name == "latents" and latents.work < encoding / 3
    assert decoding > 7e9 and previews.work < decoding / 3


def test_fusing_takes_less_than_training_and_no_second_network() -> None:
    *_, learning, _, fusing = memory.phases(published(True), training(fuse=True), text_tokens=512, precision=HALF)
    assert (learning.name, fusing.name) == ("training", "fusing")
    assert fusing.weights < learning.weights and fusing.work < 0.1 * fusing.weights


def test_each_memory_option_reduces_the_estimate() -> None:
    def peak(**changes) -> int:
        phases = memory.phases(published(True), training(**changes), text_tokens=512, precision=HALF)
        return max(phase.peak for phase in phases)

    whole = peak()
    assert whole > 30e9
    assert peak(quantize=8) < whole and peak(gradient_checkpointing=True) < whole and peak(resolution=256) < whole
    assert (
        peak(quantize=4, gradient_checkpointing=True)
        < peak(quantize=8, gradient_checkpointing=True)
        < peak(gradient_checkpointing=True)
    )
    assert peak(batch=2) > whole and peak(state_bytes=2) < whole
    assert peak(adapter=False, trained=12_000_000_000) > 100e9


def test_estimate_grows_with_image_size_prompt_length_and_text_encoder_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tiling_plan, "available_bytes", lambda: 64 << 30)  # tiles depend on it
    pipeline = flux1.load("dev")

    def peaks(**changes) -> dict[str, int]:
        return {phase.name: phase.peak for phase in pipeline.footprint(training(**changes)).phases}

    plain = peaks()
    assert peaks(shape=(512, 512)) == plain
    wide = peaks(shape=(512, 1024))
    assert wide["training"] > plain["training"] and wide["latents"] >= plain["latents"]
    assert wide["previews"] == plain["previews"] and wide["class images"] == plain["class images"]
    short = peaks(prompt_tokens=64)
    assert short["training"] < plain["training"] and short["text encoding"] < plain["text encoding"]
    assert peaks(prompt_tokens=4096) == plain, "no more than the model reads"
    learning, clip = peaks(text_encoder=True), stored_bytes(CLIPTextModel(CLIP_L), Precision.here().width)
    assert learning["previews"] - plain["previews"] == clip < learning["training"] - plain["training"] < 1.2 * clip
    assert learning["text encoding"] == plain["text encoding"]


@needs_extension
def test_memory_of_clip_matches_the_estimate() -> None:
    def peak(layers: int) -> int:
        network = CLIPTextModel(replace(CLIP_L, vocab_size=99, num_hidden_layers=layers))
        lora.add_lora(network, naming.CLIP_ATTENTION, rank=4)
        mx.eval(network.parameters())
        slopes = nn.value_and_grad(network, lambda net: net(mx.ones((4, 77), mx.int32))[1].sum())
        return peak_of(lambda: slopes(network))

    expected = clip_bytes(replace(CLIP_L, num_hidden_layers=2), 4)
    assert peak(3) - peak(1) == pytest.approx(expected, rel=0.15)


def test_estimating_a_published_model_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = flux1.load("schnell")
    monkeypatch.setattr(pipeline._snapshot, "is_cached", lambda: False)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    footprint = pipeline.footprint(training())
    assert mx.get_peak_memory() - before < 2**20
    assert footprint.download == pytest.approx(33.7e9, rel=0.02)  # what the repository's files have
    assert isinstance(footprint.cache, Path)


def test_flux_supports_memory_control() -> None:
    pipeline = flux1.load("dev")
    assert isinstance(pipeline, SupportsMemoryControl)
