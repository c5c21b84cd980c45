"""Edited adapters in diffusers: each result loads there and draws what it draws here; sums are diffusers' sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),  # of diffusers, with numpy 2
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
]
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from mflux_vae_train import lora  # noqa: E402
from mflux_vae_train.dreambooth import commands  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion.pipeline import StableDiffusionPipeline  # noqa: E402
from tests.mflux_vae_train.pipelines.stable_diffusion.small_sd import small_pipeline  # noqa: E402
from tests.parity.stable_diffusion.test_pipeline_parity import (  # noqa: E402
    LEVELS,
    draw_ours,
    draw_theirs,
    noise_of,
    open_theirs,
)

CONVOLUTIONS = ["*.resnets.*.conv1", "*.proj_in"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, and adapters `a` (of convolutions, too) and `b` for UNet and text encoder, and `dora`.

    transformers 5 drops the magnitudes of text encoders.
    """
    folder = tmp_path_factory.mktemp("sd")
    small_pipeline(folder / "parts", "sd1").save_pretrained(folder / "model", "float32")
    for name, rank, dora in (("a", 3, False), ("b", 2, False), ("dora", 3, True)):
        pipeline = StableDiffusionPipeline.from_pretrained(folder / "model")
        adapted = {prefix: one for prefix, one in _networks(pipeline).items() if prefix == "unet" or not dora}
        targets = {"unet": pipeline.lora_targets(), **pipeline.text_encoder_targets()}
        for prefix, network in adapted.items():
            patterns = [*targets[prefix], *(CONVOLUTIONS if name == "a" else ())]
            lora.add_lora(network, patterns, rank=rank, alpha=6.0, dora=dora)
            for number, layer in enumerate(lora.layers(network).values()):
                layer.lora_b = 0.15 * mx.random.normal(layer.lora_b.shape, key=mx.random.key(number + rank))
                if dora:
                    layer.m = 1.2 * layer.m
        lora.save_adapter(adapted, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    return open_theirs(folder / "model")


def _networks(pipeline: StableDiffusionPipeline) -> dict[str, Any]:
    return {"unet": pipeline.denoiser, **pipeline.text_encoders_to_train()}


def edit(*arguments: object) -> None:
    assert commands.main(["adapter", *map(str, arguments)]) == 0


def drawn_there(theirs: Any, *files: Path, weights: tuple[float, ...] = (1.0,)) -> np.ndarray:
    names = [file.stem for file in files]
    for file in files:
        theirs.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=file.stem)
    theirs.set_adapters(names, [*weights])
    try:
        return draw_theirs(theirs, noise_of(4, 4))
    finally:
        theirs.delete_adapters(names)


def drawn_here(folder: Path, file: Path | None) -> np.ndarray:
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "model")
    if file is not None:
        naming = pipeline.kohya_naming()
        lora.load_adapter(_networks(pipeline), file, naming.modules)
    return draw_ours(pipeline, noise_of(4, 4))


@pytest.mark.parametrize("name", ["a", "dora"])
def test_both_namings_draw_the_same(name: str, folder: Path, theirs: Any, tmp_path: Path) -> None:
    expected = drawn_here(folder, folder / f"{name}.safetensors")
    assert np.abs(expected - drawn_here(folder, None)).max() > 0.05, "the adapter hardly changes the image"
    kohya, peft = tmp_path / "kohya.safetensors", tmp_path / "peft.safetensors"
    edit("convert", folder / f"{name}.safetensors", "--to", "kohya", "--model", folder / "model", "--output", kohya)
    edit("convert", kohya, "--to", "peft", "--model", folder / "model", "--output", peft)
    for file in (kohya, peft) if name == "a" else (peft,):  # diffusers drops magnitudes in kohya's naming
        assert np.abs(drawn_there(theirs, file) - expected).max() * LEVELS <= 2, file.name


def test_a_sum_is_that_of_diffusers(folder: Path, theirs: Any, tmp_path: Path) -> None:
    first, second = folder / "a.safetensors", folder / "b.safetensors"
    edit("merge", first, second, "--weights", 0.7, 0.4, "--output", tmp_path / "sum.safetensors")
    expected = drawn_there(theirs, first, second, weights=(0.7, 0.4))
    for found in (drawn_there(theirs, tmp_path / "sum.safetensors"), drawn_here(folder, tmp_path / "sum.safetensors")):
        assert np.abs(found - expected).max() * LEVELS <= 2


def test_extracted_and_resized_adapters_load(folder: Path, theirs: Any, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "model")
    lora.load_adapter(_networks(pipeline), folder / "a.safetensors")
    for network in _networks(pipeline).values():
        lora.fuse(network)
    pipeline.save_pretrained(tmp_path / "tuned", "float32")
    extracted, resized = tmp_path / "extracted.safetensors", tmp_path / "resized.safetensors"
    edit("extract", folder / "model", tmp_path / "tuned", "--rank", 3, "--output", extracted)
    assert np.abs(drawn_there(theirs, extracted) - draw_ours(pipeline, noise_of(4, 4))).max() * LEVELS <= 2
    edit("resize", extracted, "--keep", 0.7, "--scale", 1.2, "--output", resized)
    assert np.abs(drawn_there(theirs, resized) - drawn_here(folder, resized)).max() * LEVELS <= 2
