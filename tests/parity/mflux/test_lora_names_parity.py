"""mflux's loader of adapters finds a layer for the keys of ours, in models of full size that are never computed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mflux_vae_train import lora

pytestmark = pytest.mark.parity
pytest.importorskip("mflux", reason="extra `mflux` is not installed")


def flux1() -> tuple[Any, Any, Any, Any]:
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.flux.model.flux_transformer.transformer import Transformer
    from mflux.models.flux.weights.flux_lora_mapping import FluxLoRAMapping

    from mflux_vae_train.pipelines.flux1 import naming
    from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer, FluxTransformerConfig

    theirs = Transformer(ModelConfig.dev())
    return theirs, FluxLoRAMapping, FluxTransformer(FluxTransformerConfig(guidance_embeds=True)), naming.PRESETS


def klein() -> tuple[Any, Any, Any, Any]:
    from mflux.models.flux2.model.flux2_transformer.transformer import Flux2Transformer as Theirs
    from mflux.models.flux2.weights.flux2_lora_mapping import Flux2LoRAMapping

    from mflux_vae_train.pipelines.flux2 import naming
    from mflux_vae_train.pipelines.flux2.transformer import Flux2Transformer, Flux2TransformerConfig

    return Theirs(), Flux2LoRAMapping, Flux2Transformer(Flux2TransformerConfig()), naming.PRESETS


def z_image() -> tuple[Any, Any, Any, Any]:
    from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer as Theirs
    from mflux.models.z_image.weights.z_image_lora_mapping import ZImageLoRAMapping

    from mflux_vae_train.pipelines.z_image import naming
    from mflux_vae_train.pipelines.z_image.transformer import ZImageTransformer, ZImageTransformerConfig

    return Theirs(), ZImageLoRAMapping, ZImageTransformer(ZImageTransformerConfig()), naming.PRESETS


@pytest.mark.parametrize("build", [flux1, klein, z_image])
def test_the_keys_of_first_and_last_blocks_are_mapped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], build: Any
) -> None:
    from mflux.models.common.lora.layer.linear_lora_layer import LoRALinear
    from mflux.models.common.lora.mapping.lora_loader import LoRALoader

    theirs, mapping, ours, presets = build()
    patterns = sorted({pattern for preset in presets.values() for pattern in preset})
    every = list(lora.matching(ours, patterns))
    blocks = [re.search(r"\.(\d+)\.", path) for path in every]
    ends = {0, *(int(found[1]) for found in blocks if found)}
    ends -= {index for index in ends if index > 0 and index + 1 in ends}  # the mapping of the others is the same
    chosen = [path for path, found in zip(every, blocks, strict=True) if not found or int(found[1]) in ends]
    layers = lora.add_lora(ours, chosen, rank=1)
    lora.save_adapter({"transformer": ours}, tmp_path / "adapter.safetensors")
    LoRALoader.load_and_apply_lora(
        mapping.get_mapping(), theirs, [str(tmp_path / "adapter.safetensors")], [1.0], bake_lora=False
    )
    adapted = [path for path, layer in theirs.named_modules() if isinstance(layer, LoRALinear)]
    assert len(adapted) == len(layers) > 10
    assert "unmatched" not in capsys.readouterr().out.lower()
