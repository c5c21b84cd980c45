"""DINO and CLIP against stored answers of transformers, and how their files are read."""

from __future__ import annotations

import logging
import math
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import ImageError, SettingsError, WeightsError
from mflux_vae.pretrained import hub
from mflux_vae.weights.formats.files import read_json, read_safetensors, write_json, write_safetensors
from mflux_vae.weights.keymaps.rules import from_mlx, to_mlx
from mflux_vae_train.evaluation import clip, dino, features
from mflux_vae_train.evaluation.clip import Clip
from mflux_vae_train.evaluation.dino import Dino
from mflux_vae_train.evaluation.vit import VisionConfig
from mflux_vae_train.pipelines.loading.fused_layers import QKV, join_fused
from tests.mflux_vae_train.evaluation.small_networks import CLIP, DINO, PROMPTS, SIZES

Change = Callable[[dict[str, mx.array]], object]


def golden(folder: Path) -> tuple[dict[str, np.ndarray], list[np.ndarray]]:
    stored = {name: np.array(one) for name, one in read_safetensors(folder / "golden.safetensors")[0].items()}
    return stored, [stored[f"image.{index}"] for index in range(len(SIZES))]


def parameters(network: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(network.parameters()))


def copied(folder: Path, target: Path, change: Change = lambda tensors: None) -> Path:
    """A copy of a small network whose tensors are changed."""
    shutil.copytree(folder, target)
    tensors = dict(read_safetensors(target / "model.safetensors")[0])
    change(tensors)
    write_safetensors(target / "model.safetensors", tensors)
    return target


def test_dino_gives_the_features_of_transformers() -> None:
    expected, images = golden(DINO)
    found = Dino.from_pretrained(DINO).features(images)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected["image_features"], atol=1e-5)


def test_clip_gives_the_features_of_transformers(caplog: pytest.LogCaptureFixture) -> None:
    expected, images = golden(CLIP)
    network = Clip.from_pretrained(CLIP)
    np.testing.assert_allclose(network.image_features(images), expected["image_features"], atol=1e-5)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_allclose(network.text_features(PROMPTS), expected["text_features"], atol=1e-5)
    (record,) = caplog.records
    assert "12 tokens" in record.getMessage()  # the last prompt is too long


@pytest.mark.usefixtures("gpu_branch")
def test_gpu_branch_computes_in_float32() -> None:
    expected, images = golden(CLIP)
    network = Clip.from_pretrained(CLIP)
    assert {one.dtype for one in parameters(network).values()} == {mx.float32}
    np.testing.assert_allclose(network.image_features(images), expected["image_features"], atol=1e-5)
    np.testing.assert_allclose(network.text_features(PROMPTS), expected["text_features"], atol=1e-5)


def test_pixels_are_those_of_transformers() -> None:
    for network, folder in ((Dino.from_pretrained(DINO), DINO), (Clip.from_pretrained(CLIP), CLIP)):
        expected, images = golden(folder)
        np.testing.assert_array_equal(network.preprocess(images), expected["pixels"])


def test_batches_do_not_change_features(monkeypatch: pytest.MonkeyPatch) -> None:
    _, images = golden(DINO)
    network = Dino.from_pretrained(DINO)
    together = network.features(images)
    monkeypatch.setattr(features, "BATCH", 1)
    np.testing.assert_allclose(network.features(images), together, atol=1e-6)
    assert network.features([]).shape == (0, 24)


def test_features_in_another_thread() -> None:
    expected, images = golden(CLIP)
    network, found = Clip.from_pretrained(CLIP), []
    thread = threading.Thread(target=lambda: found.append(network.image_features(images)))
    thread.start()
    thread.join()
    np.testing.assert_allclose(found[0], expected["image_features"], atol=1e-5)


@pytest.mark.parametrize("image", [np.zeros((8, 8, 2), np.uint8), np.full((8, 8, 3), 300.0)])
def test_other_arrays_are_refused(image: np.ndarray) -> None:
    with pytest.raises(ImageError, match="image 0"):
        Dino.from_pretrained(DINO).features([image])


def test_published_sizes() -> None:
    """Weights are not computed. The published CLIP has one more parameter, the temperature."""
    vision = VisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )
    text = clip.CLIPTextConfigWithProjection(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768
    )
    counts = [
        sum(math.prod(one.shape) for one in parameters(network).values())
        for network in (Dino(), Clip(*clip.VIT_B32), Clip(text, vision))
    ]
    assert counts == [21_665_664, 151_277_313 - 1, 427_616_513 - 1]


def test_names_go_both_ways() -> None:
    for network, table, folder in (
        (Dino.from_pretrained(DINO), dino.TABLE, DINO),
        (Clip.from_pretrained(CLIP), clip.TABLE, CLIP),
    ):
        mine, theirs = parameters(network), read_safetensors(folder / "model.safetensors")[0]
        written = from_mlx(mine, table)
        assert written.keys() == theirs.keys() - {"logit_scale"}
        assert all(np.array_equal(theirs[name].astype(mx.float32), one) for name, one in written.items())
        again = to_mlx(written, table)
        assert again.keys() == mine.keys() and all(mx.array_equal(one, mine[name]) for name, one in again.items())


def test_authors_file_needs_no_config(tmp_path: Path) -> None:
    """ViT of 64 wide heads with twelve layers; names and fused projections of the authors' program."""
    config = dino.DinoConfig(
        hidden_size=64, intermediate_size=256, num_attention_heads=1, patch_size=56, layer_norm_eps=1e-6
    )
    network = Dino(config)
    network.embeddings.class_embedding = mx.random.normal((64,))
    theirs = join_fused(from_mlx(parameters(network), dino.AUTHORS), {"qkv": QKV})
    assert "blocks.11.attn.qkv.weight" in theirs
    write_safetensors(tmp_path / "dino.safetensors", theirs)
    again = Dino.from_pretrained(tmp_path / "dino.safetensors")
    assert again.config == config
    assert all(mx.array_equal(one, parameters(again)[name]) for name, one in parameters(network).items())


def test_fault_of_a_file_is_one_message(tmp_path: Path) -> None:
    def change(tensors: dict[str, mx.array]) -> None:
        del tensors["visual_projection.weight"]
        tensors["extra"] = mx.zeros(3)
        tensors["text_projection.weight"] = mx.zeros((2, 2))

    with pytest.raises(WeightsError) as caught:
        Clip.from_pretrained(copied(CLIP, tmp_path / "clip", change))
    for part in ("1 missing: visual_projection.weight", "1 unknown: extra", "1 misshapen: text_projection.weight"):
        assert part in str(caught.value)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def change(tensors: dict[str, mx.array]) -> None:
        tensors["layernorm.weight"] = mx.full((24,), math.nan)

    with pytest.raises(WeightsError, match="NaN"):
        Dino.from_pretrained(copied(DINO, tmp_path / "dino", change))


def test_pooler_and_position_ids_are_dropped(tmp_path: Path) -> None:
    extra = {"pooler.dense.weight": mx.zeros((24, 24)), "pooler.dense.bias": mx.zeros(24)}
    Dino.from_pretrained(copied(DINO, tmp_path / "dino", lambda tensors: tensors.update(extra)))
    ids = {f"{tower}_model.embeddings.position_ids": mx.arange(12)[None] for tower in ("text", "vision")}
    Clip.from_pretrained(copied(CLIP, tmp_path / "clip", lambda tensors: tensors.update(ids)))


def test_older_configs_count(tmp_path: Path) -> None:
    folder = copied(CLIP, tmp_path / "clip")
    config = read_json(folder / "config.json")
    parts = {f"{part}_config_dict": config[f"{part}_config"] for part in ("text", "vision")}
    wrong = {f"{part}_config": {"hidden_size": 48} for part in ("text", "vision")}
    write_json(folder / "config.json", {**config, **parts, **wrong})
    Clip.from_pretrained(folder)


@pytest.mark.parametrize(("network", "folder"), [(Clip, DINO), (Dino, CLIP)])
def test_another_kind_of_model_is_named(network: type[Clip] | type[Dino], folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"config\.json"):
        network.from_pretrained(folder)


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = copied(CLIP, tmp_path / "clip")
    config = read_json(folder / "config.json")
    config["text_config"]["vocab_size"] -= 1
    write_json(folder / "config.json", config)
    with pytest.raises(WeightsError, match="tokenizer"):
        Clip.from_pretrained(folder)


@pytest.mark.parametrize("source", ["nowhere", "./no/folder", "owner/name/inside"])
def test_missing_source(source: str) -> None:
    with pytest.raises(WeightsError, match="no such file or folder"):
        Dino.from_pretrained(source)


def test_unreachable_hub_names_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object) -> Path:
        raise WeightsError("facebook/dino-vits16: not cached")

    monkeypatch.setattr(hub, "download", offline)
    with pytest.raises(WeightsError, match="hf download facebook/dino-vits16"):
        Dino.from_pretrained("facebook/dino-vits16")


def test_hub_prefers_safetensors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def download(name: str, patterns: list[str]) -> Path:
        asked.append(patterns)
        return tmp_path

    monkeypatch.setattr(hub, "download", download)
    with pytest.raises(WeightsError, match=r"pytorch_model\.bin"):
        Dino.from_pretrained("owner/name")
    assert "model.safetensors" in asked[0] and "pytorch_model.bin" in asked[1]
    assert not any(pattern.endswith((".h5", ".msgpack")) for patterns in asked for pattern in patterns)
    expected, images = golden(DINO)
    shutil.copytree(DINO, tmp_path, dirs_exist_ok=True)
    np.testing.assert_allclose(
        Dino.from_pretrained("owner/name").features(images), expected["image_features"], atol=1e-5
    )
