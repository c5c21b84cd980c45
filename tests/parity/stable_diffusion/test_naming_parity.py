"""kohya's names of layers, at full size, are those that diffusers' converter reads; its old names are read here."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
utilities = pytest.importorskip("diffusers.loaders.lora_conversion_utils")

from mflux_vae_train.lora.dialects import A, LayerNames, renamed  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion import naming  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion.configs import SD_1, SD_2, SDXL, Configs  # noqa: E402


@pytest.mark.parametrize("configs", [SD_1, SD_2, SDXL], ids=["sd1", "sd2", "sdxl"])
def test_diffusers_finds_every_layer_of_a_file_of_kohyas_scripts(configs: Configs) -> None:
    modules = naming.kohya_naming(configs).modules
    paths = {prefix: [path for (path,) in names.values()] for prefix, names in modules.items()}
    numbered = [(f"{prefix}.{path}", name) for prefix, names in modules.items() for name, (path,) in names.items()]
    given = {}
    for number, (_, name) in enumerate(numbered):
        given |= {f"{name}.lora_{end}.weight": torch.full((1, 1), float(number)) for end in ("down", "up")}
    mapped = utilities._maybe_map_sgm_blocks_to_diffusers(given, SimpleNamespace(layers_per_block=2))
    theirs, _ = utilities._convert_non_diffusers_lora_to_diffusers(mapped)
    tensors, _ = renamed({key: mx.array(value.numpy()) for key, value in theirs.items()}, "")
    lookup, found = LayerNames(paths, {}), {}
    for key, value in tensors.items():
        prefix, (path,) = lookup.find(key.rpartition(".lora_")[0])
        found.setdefault(f"{prefix}.{path}", set()).add(int(value.item()))
    assert found == {layer: {number} for number, (layer, _) in enumerate(numbered)}
    assert sum(key.endswith(A) for key in tensors) == len(numbered)
