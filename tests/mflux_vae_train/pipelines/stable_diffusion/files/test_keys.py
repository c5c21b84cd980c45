"""Names in single files: as many as the published files have, and read back to the same tensors."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.weights.keymaps.rules import from_mlx, to_mlx
from mflux_vae_train.pipelines.stable_diffusion.configs import OPEN_CLIP_H, SD_1, SD_2, SDXL
from mflux_vae_train.pipelines.stable_diffusion.files import keys
from mflux_vae_train.pipelines.stable_diffusion.unet import UNet
from mflux_vae_train.pipelines.text import clip
from tests.mflux_vae_train.pipelines.stable_diffusion.files.small_models import KINDS, small_unet

SSD = replace(
    SDXL.unet,
    transformer_layers_per_block=((1,), (2, 2), (4, 4)),
    reverse_transformer_layers_per_block=((4, 4, 10), (2, 1, 1), 1),
    mid_block_type="UNetMidBlock2D",
)
FULL = {"sd1": SD_1.unet, "sd2": SD_2.unet, "sdxl": SDXL.unet, "ssd": SSD}
SOME = {
    "output_blocks.2.1.conv.weight": ["sd1", "sd2"],
    "output_blocks.2.2.conv.weight": ["sdxl", "ssd"],
    "input_blocks.11.0.emb_layers.1.bias": ["sd1", "sd2"],
    "input_blocks.8.1.transformer_blocks.9.attn2.to_out.0.weight": ["sdxl"],
    "label_emb.0.2.weight": ["sdxl", "ssd"],
    "middle_block.2.out_layers.3.weight": ["sd1", "sd2", "sdxl"],
    "output_blocks.2.1.transformer_blocks.9.ff.net.0.proj.bias": ["sdxl", "ssd"],
    "output_blocks.6.0.skip_connection.weight": list(FULL),
}
"""Keys of published files, and the models that have them."""


@pytest.mark.parametrize(("kind", "count"), [("sd1", 686), ("sd2", 686), ("sdxl", 1680), ("ssd", 944)])
def test_published_unets_have_their_original_names(kind: str, count: int) -> None:
    ours = dict(tree_flatten(UNet(FULL[kind]).parameters()))  # lazy: nothing is drawn
    theirs = from_mlx(ours, keys.original_unet(FULL[kind]))
    assert len(theirs) == len(ours) == count
    assert {key for key in SOME if key in theirs} == {key for key, kinds in SOME.items() if kind in kinds}
    assert not theirs.keys() & ours.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_unet_comes_back_to_the_bit(kind: str) -> None:
    config = small_unet(kind)
    ours = dict(tree_flatten(UNet(config).parameters()))
    back = to_mlx(from_mlx(ours, keys.original_unet(config)), keys.original_unet(config))
    assert back.keys() == ours.keys() and all(mx.array_equal(back[name], ours[name]) for name in ours)


def test_open_clip_stacks_projections_and_loses_its_last_layer() -> None:
    config = replace(OPEN_CLIP_H, hidden_size=8, num_attention_heads=2, num_hidden_layers=2, vocab_size=9)
    ours = dict(tree_flatten(clip.CLIPTextModel(config).parameters()))
    theirs = keys.to_open_clip(ours)
    stacked = theirs["transformer.resblocks.1.attn.in_proj_weight"]
    np.testing.assert_array_equal(stacked[8:16], ours["text_model.encoder.layers.1.self_attn.k_proj.weight"])
    last = {key.replace("resblocks.1", "resblocks.2"): tensor for key, tensor in theirs.items() if "resblocks.1" in key}
    extra = {"transformer.text_model.embeddings.position_ids": mx.arange(3), "logit_scale": mx.array(1.0)}
    extra |= {"text_projection": mx.arange(12.0).reshape(4, 3)}
    back = keys.from_open_clip(theirs | last | extra, 2)
    np.testing.assert_array_equal(back.pop("text_projection.weight"), extra["text_projection"].T)
    assert back.keys() == ours.keys() and all(mx.array_equal(back[name], ours[name]) for name in ours)
