"""What Stable Diffusion is estimated to take: beside what it took, and at full size the figures to plan with."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mflux_vae_train.pipelines.footprint import Phase, Precision, Workload
from mflux_vae_train.pipelines.quantization import quantize, stored_bytes
from mflux_vae_train.pipelines.stable_diffusion import memory
from mflux_vae_train.pipelines.stable_diffusion.configs import SD_1, SD_2, SDXL, UNET_1, UNET_XL, Configs
from mflux_vae_train.pipelines.stable_diffusion.files.parts import is_quantized_layer
from mflux_vae_train.pipelines.stable_diffusion.unet import UNet
from mflux_vae_train.pipelines.stable_diffusion.unet_config import UNetConfig
from tests.mflux_vae_train.pipelines.stable_diffusion.small_unet import CROSS_DOWN, CROSS_UP, DOWN, UP
from tests.mflux_vae_train.pipelines.stable_diffusion.unet_stack import Stack, estimated, measured

HALF = Precision(width=2, fused=True)
"""Metal and CUDA."""

SMALL = UNetConfig(
    block_out_channels=(64, 128),
    down_block_types=(CROSS_DOWN, DOWN),
    up_block_types=(UP, CROSS_UP),
    layers_per_block=1,
    cross_attention_dim=64,
    attention_head_dim=4,
)
WIDE = replace(
    UNET_1,
    block_out_channels=(320,),
    down_block_types=(CROSS_DOWN,),
    up_block_types=(CROSS_UP,),
    layers_per_block=1,
    mid_block_type=None,
)
WIDE_XL = replace(
    UNET_XL,
    block_out_channels=(320, 640),
    down_block_types=(DOWN, CROSS_DOWN),
    up_block_types=(CROSS_UP, UP),
    layers_per_block=1,
    attention_head_dim=(5, 10),
    transformer_layers_per_block=(1, 2),
    addition_embed_type=None,
)


def check(stack: Stack) -> None:
    found, expected = measured(stack), estimated(stack)
    print(f"{stack}: measured {found / 1e6:.0f} MB, estimated {expected / 1e6:.0f} MB")
    assert expected == pytest.approx(found, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"recompute": True}, {"recompute": True, "full": True}], ids=["plain", "checkpointing", "full"]
)
def test_memory_of_a_small_unet_matches_the_estimate(options: dict[str, bool]) -> None:
    check(Stack(config=SMALL, side=16, batch=2, **options))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("config", [WIDE, WIDE_XL], ids=["sd", "sdxl"])
def test_memory_of_full_width_matches_the_estimate(config: UNetConfig, recompute: bool) -> None:
    check(Stack(config=config, side=32, recompute=recompute))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("gpu_branch")
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_of_a_small_unet_on_a_gpu_matches_the_estimate(recompute: bool, full: bool) -> None:
    check(Stack(config=SMALL, side=32, recompute=recompute, full=full))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("gpu_branch")
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_of_full_width_on_a_gpu_matches_the_estimate(recompute: bool) -> None:
    check(Stack(config=WIDE, side=32, recompute=recompute))


@pytest.mark.parametrize("bits", [None, 4])
def test_estimated_weight_bytes_are_exact(bits: int | None) -> None:
    network = UNet(SMALL)
    if bits:
        quantize(network, bits, is_quantized_layer)
    held = sum(array.nbytes for _, array in tree_flatten(network.parameters()))
    assert stored_bytes(UNet(SMALL), 4, bits, is_quantized_layer) == held


@pytest.mark.parametrize(
    ("configs", "side", "teraflops"), [(SD_1, 512, 0.80), (SD_2, 768, 2.15), (SDXL, 512, 1.59), (SDXL, 1024, 6.76)]
)
def test_operations_of_published_models(configs: Configs, side: int, teraflops: float) -> None:
    assert memory.forward_operations(configs.unet, (side // 8,) * 2) / 1e12 == pytest.approx(teraflops, abs=0.01)


def training(configs: Configs, **changes) -> dict[str, Phase]:
    """Phases of a LoRA of rank 16 on a GPU."""
    of_rank = 1_451_520 if configs is SDXL else 199_296
    work = Workload(resolution=configs.recommended.resolution, trained=16 * of_rank, guidance=7.5, class_images=10)
    return {phase.name: phase for phase in memory.phases(configs, replace(work, **changes), precision=HALF)}


def test_phases_in_the_order_of_a_run() -> None:
    before = ["text encoding", "class images", "latents", "training", "previews"]
    assert [*training(SD_1)] == before
    assert [*training(SD_1, fuse=True)] == [*before, "fusing"]
    assert [*training(SD_1, class_images=0, previews=False)] == ["text encoding", "latents", "training"]


@pytest.mark.parametrize(("configs", "most"), [(SD_1, 4e9), (SDXL, 8e9)], ids=["sd1.5", "sdxl"])
def test_an_adapter_fits_into_small_machines(configs: Configs, most: float) -> None:
    found = training(configs, quantize=4, gradient_checkpointing=True)
    assert all(phase.peak < most for phase in found.values()), found


def test_each_memory_option_reduces_the_estimate() -> None:
    def peak(**changes) -> int:
        return training(SDXL, **changes)["training"].peak

    whole = peak()
    assert peak(gradient_checkpointing=True) < whole and peak(quantize=4) < whole and peak(resolution=512) < whole
    assert peak(quantize=4) < peak(quantize=8)
    assert peak(batch=2) > whole and peak(text_encoder=True) > whole and peak(shape=(1024, 1536)) > whole
    assert peak(adapter=False, trained=2_567_463_684) > 35e9


@pytest.mark.parametrize(("variant", "width"), [("fp16", 2), (None, 4)])
def test_published_bytes_are_those_of_the_variant(variant: str | None, width: int) -> None:
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    found = memory.published_bytes(SDXL, ["unet", "text_encoder", "text_encoder_2", "vae"], variant)
    assert found == width * (2_567_463_684 + 123_060_480 + 694_659_840 + 83_653_863)
    assert mx.get_peak_memory() - before < 2**20
