"""Weights of FLUX.1 as others name them, at full size: diffusers' own converter, and mflux's own networks and saver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from diffusers import AutoencoderKL  # noqa: E402
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae.pretrained.loading import new_network  # noqa: E402
from mflux_vae.weights.keymaps.diffusers import SAME_NAMES  # noqa: E402
from mflux_vae.weights.keymaps.rules import from_mlx, to_mlx  # noqa: E402
from mflux_vae_train.pipelines.flow import files  # noqa: E402
from mflux_vae_train.pipelines.flux1 import keys  # noqa: E402
from mflux_vae_train.pipelines.flux1.configs import CLIP_L, T5_XXL, published  # noqa: E402
from mflux_vae_train.pipelines.flux1.family import FAMILY  # noqa: E402
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer, FluxTransformerConfig  # noqa: E402
from mflux_vae_train.pipelines.text import clip, t5  # noqa: E402

MODELS = {"schnell": False, "dev": True}


def shapes(tensors: Any) -> dict[str, tuple[int, ...]]:
    tensors = dict(tree_flatten(tensors.parameters())) if isinstance(tensors, nn.Module) else tensors
    return {key: tuple(value.shape) for key, value in tensors.items()}


@pytest.mark.parametrize("embeds", MODELS.values(), ids=MODELS.keys())
def test_a_single_file_is_read_as_diffusers_converts_it(embeds: bool) -> None:
    """Every tensor of 19 + 38 blocks with all of its rows, and one column."""
    ours = shapes(FluxTransformer(FluxTransformerConfig(guidance_embeds=embeds)))
    file = shapes(keys.to_bfl({name: mx.zeros((shape[0], 1)[: len(shape)]) for name, shape in ours.items()}))
    draws = np.random.default_rng(0)
    stored = {name: draws.standard_normal(shape, dtype=np.float32) for name, shape in file.items()}
    found = keys.from_bfl({name: mx.array(value) for name, value in stored.items()})
    theirs = convert_flux_transformer_checkpoint_to_diffusers(
        {f"model.diffusion_model.{name}": torch.from_numpy(value) for name, value in stored.items()}
    )
    assert found.keys() == theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)
    back = keys.to_bfl(found)
    assert back.keys() == stored.keys()
    assert all(np.array_equal(back[name], value) for name, value in stored.items())


def test_the_autoencoder_has_the_published_keys_and_shapes() -> None:
    config = {name: value for name, value in published(True).vae.items() if name != "_class_name"}
    with torch.device("meta"):
        theirs = AutoencoderKL(**config)
    network = new_network("flux1")
    turned = from_mlx(dict(tree_flatten(network.parameters())), SAME_NAMES)
    assert shapes(turned) == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}


def mflux_networks(embeds: bool) -> dict[str, nn.Module]:
    pytest.importorskip("mflux.models.flux.model.flux_transformer.transformer")
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.flux.model.flux_text_encoder.clip_encoder.clip_encoder import CLIPEncoder
    from mflux.models.flux.model.flux_text_encoder.t5_encoder.t5_encoder import T5Encoder
    from mflux.models.flux.model.flux_transformer.transformer import Transformer
    from mflux.models.flux.model.flux_vae.vae import VAE

    config = ModelConfig.dev() if embeds else ModelConfig.schnell()
    return {
        "transformer": Transformer(config),
        "text_encoder_2": T5Encoder(),
        "text_encoder": CLIPEncoder(),
        "vae": VAE(),
    }


@pytest.mark.parametrize("embeds", MODELS.values(), ids=MODELS.keys())
def test_mfluxs_networks_have_our_keys_and_shapes_once_renamed(embeds: bool) -> None:
    theirs = {name: dict(tree_flatten(network.parameters())) for name, network in mflux_networks(embeds).items()}
    tables = {
        "transformer": (keys.MFLUX_TRANSFORMER, FluxTransformer(FluxTransformerConfig(guidance_embeds=embeds))),
        "text_encoder_2": (keys.MFLUX_T5, t5.T5Encoder(T5_XXL)),
        "text_encoder": ((), clip.CLIPTextModel(CLIP_L)),
        "vae": (keys.MFLUX_VAE, new_network("flux1")),
    }
    for name, (rules, ours) in tables.items():
        assert shapes(to_mlx(theirs[name], rules)) == shapes(ours), name


def test_what_mfluxs_saver_wrote_is_read_quantised(tmp_path: Path) -> None:
    """Its transformer at full width with one single block, its autoencoder, both in 8 bits."""
    pytest.importorskip("mflux.models.flux.model.flux_transformer.transformer")
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.common.weights.saving.model_saver import ModelSaver
    from mflux.models.flux.model.flux_transformer.transformer import Transformer
    from mflux.models.flux.model.flux_vae.vae import VAE

    mx.random.seed(0)
    parts = {"transformer": Transformer(ModelConfig.dev(), 0, 1), "vae": VAE()}
    before = dict(tree_flatten(parts["vae"].parameters()))
    for name, network in parts.items():
        nn.quantize(network, bits=8)
        ModelSaver._save_weights(str(tmp_path), 8, network, name)
    saved = dict(tree_flatten(parts["transformer"].parameters()))

    config = files.config_from_weights(FAMILY, tmp_path)
    assert (config.guidance_embeds, config.num_layers, config.num_single_layers) == (True, 0, 1)
    transformer = files.open_part(FAMILY, "transformer", config, tmp_path)
    proj = transformer.single_transformer_blocks[0].proj_mlp
    assert isinstance(proj, nn.QuantizedLinear) and proj.bits == 8
    found = dict(tree_flatten(transformer.parameters()))
    assert all(mx.array_equal(found[name], value.astype(found[name].dtype)) for name, value in saved.items())

    vae = files.open_autoencoder(FAMILY, published(True).vae, tmp_path)
    renamed = to_mlx(before, keys.MFLUX_VAE)
    for name, value in tree_flatten(vae.network.parameters()):
        assert float(mx.abs(value - renamed[name]).max()) <= 0.01 * float(mx.abs(renamed[name]).max()) + 1e-6, name
