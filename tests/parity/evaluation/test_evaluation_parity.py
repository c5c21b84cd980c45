"""DINO, CLIP and their preprocessing against transformers, live, in float32."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import mlx.core as mx  # noqa: E402

from mflux_vae.weights.keymaps.rules import from_mlx  # noqa: E402
from mflux_vae_train.evaluation import clip  # noqa: E402
from mflux_vae_train.evaluation.clip import Clip  # noqa: E402
from mflux_vae_train.evaluation.dino import Dino  # noqa: E402
from mflux_vae_train.evaluation.vit import VisionConfig  # noqa: E402
from mflux_vae_train.tiny_world.tokenizers import build_clip_tokenizer  # noqa: E402
from tests.mflux_vae_train.evaluation.small_networks import PROMPTS, WORDS, noise_images  # noqa: E402
from tests.mflux_vae_train.evaluation.test_networks import parameters  # noqa: E402
from tests.parity.evaluation.make_golden import clip_pixels, dino_pixels  # noqa: E402
from tests.parity.make_golden import randomise  # noqa: E402
from tests.parity.test_text_parity import relative_error  # noqa: E402

SMALL = dict(hidden_size=48, intermediate_size=80, num_attention_heads=4, num_hidden_layers=3)
LARGE = dict(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24, patch_size=14)
LARGE_TEXT = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
SIZES = ((224, 224), (256, 256), (225, 300), (481, 640), (640, 427), (100, 333), (1000, 260), (257, 258), (61, 60))


def authors_names(state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of transformers' `convert_dino_to_pytorch.py`."""
    names = (
        ("embeddings.cls_token", "cls_token"),
        ("embeddings.position_embeddings", "pos_embed"),
        ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
        ("encoder.layer", "blocks"),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.output.dense", "attn.proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    )
    found: dict[str, Any] = {}
    for key, value in state.items():
        if match := re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.attention\.query\.(\w+)", key):
            rest = [state[key.replace("query", part)] for part in ("key", "value")]
            found[f"blocks.{match[1]}.attn.qkv.{match[2]}"] = torch.cat([value, *rest])
        elif "attention.attention" not in key:
            for old, new in names:
                key = key.replace(old, new)
            found[re.sub(r"^layernorm", "norm", key)] = value
    return found


@pytest.mark.parametrize("naming", ["transformers", "authors", "torch file"])
def test_dino_agrees(tmp_path: Path, naming: str) -> None:
    from safetensors.torch import load_file

    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, image_size=64, patch_size=16, layer_norm_eps=1e-6)
    theirs = transformers.ViTModel(config, add_pooling_layer=False).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    if naming != "transformers":
        state = load_file(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        torch.save(authors_names(state) if naming == "authors" else state, tmp_path / "pytorch_model.bin")
    pixels = torch.randn(3, 3, 64, 64)
    ours = Dino.from_pretrained(tmp_path)
    assert ours.config.layer_norm_eps == 1e-6
    with torch.no_grad():
        expected = theirs(pixels).last_hidden_state[:, 0]
    assert relative_error(ours(mx.array(pixels.permute(0, 2, 3, 1).numpy())), expected) <= 1e-4


@pytest.mark.parametrize(("act", "eos"), [("quick_gelu", 2), ("quick_gelu", None), ("gelu", None)])
def test_clip_agrees(tmp_path: Path, act: str, eos: int | None) -> None:
    """`eos_token_id` 2, as in the published config.json of ViT-B/32, or the true one."""
    torch.manual_seed(0)
    size = build_clip_tokenizer(WORDS, tmp_path, 12)
    text = dict(SMALL, vocab_size=size, max_position_embeddings=12, hidden_act=act, eos_token_id=eos or size - 1)
    vision = dict(SMALL, hidden_size=64, image_size=48, patch_size=16, hidden_act=act)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20)
    theirs = transformers.CLIPModel(config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours, images = Clip.from_pretrained(tmp_path), noise_images()
    ids = transformers.CLIPTokenizer.from_pretrained(tmp_path)(
        PROMPTS, padding=True, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        of_images = theirs.get_image_features(clip_pixels(images, 48)).pooler_output
        of_text = theirs.get_text_features(**ids).pooler_output
    pixels = mx.array(ours.preprocess(images))
    assert relative_error(ours.embed_images(pixels), of_images) <= 1e-4
    normalize = torch.nn.functional.normalize
    assert relative_error(mx.array(ours.image_features(images)), normalize(of_images)) <= 1e-4
    assert relative_error(mx.array(ours.text_features(PROMPTS)), normalize(of_text)) <= 1e-4


def test_pixels_are_equal_to_the_bit() -> None:
    images = noise_images(SIZES)
    for preprocess, expected in (
        (Dino().preprocess, dino_pixels(images, 256, 224)),
        (Clip(*clip.VIT_B32).preprocess, clip_pixels(images, 224)),
    ):
        np.testing.assert_array_equal(preprocess(images), expected.permute(0, 2, 3, 1).numpy())


def shapes(network: Any, table: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(one.shape) for name, one in from_mlx(parameters(network), table).items()}


@pytest.mark.parametrize("large", [False, True])
def test_clip_has_the_published_keys(large: bool) -> None:
    text = LARGE_TEXT if large else {}
    vision = LARGE if large else {}
    width = 768 if large else 512
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=width)
    with torch.device("meta"):
        state = transformers.CLIPModel(config).state_dict()
    ours = Clip(clip.CLIPTextConfigWithProjection(**text, projection_dim=width), VisionConfig(**vision))
    expected = {name: tuple(one.shape) for name, one in state.items()}
    assert shapes(ours, clip.TABLE) == {name: shape for name, shape in expected.items() if name != "logit_scale"}
