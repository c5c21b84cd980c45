"""Messages about a file of another kind name the kind."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import WeightsError
from mflux_vae.pretrained import detect
from mflux_vae.weights.keymaps.rules import load_strict
from mflux_vae.weights.kinds import kind_of
from mflux_vae_train.pipelines import tiny
from tests.mflux_vae.small_models import small_kl, small_tiny

KEYS = {
    "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": "an adapter",
    "lora_unet_double_blocks_0_img_attn_qkv.alpha": "an adapter",
    "model.diffusion_model.double_blocks.0.img_attn.qkv.weight": "a denoiser",
    "down_blocks.0.attentions.0.proj_in.weight": "a denoiser",
    "text_model.encoder.layers.0.mlp.fc1.weight": "a text encoder",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "a text encoder",
    "encoder.conv_in.weight": "an autoencoder",
    "optimizer/step": "a checkpoint of a training",
    "x": "",
}


@pytest.mark.parametrize("key", KEYS)
def test_kinds_by_one_key(key: str) -> None:
    assert kind_of(["another", key]) == KEYS[key]


def test_the_embedded_parts_have_their_kinds() -> None:
    pipeline = tiny.load()
    for name, network in pipeline.parts.networks.items():
        expected = "a text encoder" if "text" in name else "a denoiser"
        assert kind_of(path for path, _ in tree_flatten(network.get().parameters())) == expected
    for network in (small_kl(), small_tiny()):
        assert kind_of(path for path, _ in tree_flatten(network.parameters())) == "an autoencoder"


def test_errors_name_the_kind() -> None:
    tensors = {"text_model.encoder.layers.0.mlp.fc1.weight": mx.zeros((1, 1))}
    with pytest.raises(WeightsError, match=r"0 of 1 match.*it holds a text encoder"):
        load_strict(nn.Linear(1, 1), tensors, where="a")
    with pytest.raises(WeightsError, match=r"no known autoencoder; it holds a text encoder"):
        detect.find(tensors, "a")
