"""Round trips through PEFT's and kohya's naming: the same change, alpha, kind, dtype and metadata."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.weights.formats.files import read_safetensors, write_safetensors
from mflux_vae_train import lora
from mflux_vae_train.lora.editing.adapter import open_adapter
from mflux_vae_train.lora.editing.writing import check_target, write_adapter
from mflux_vae_train.lora.metadata import METADATA_KEY, other_metadata
from tests.mflux_vae_train.lora.editing.random_changes import MODEL, assert_equal, change, deltas, loaded, saved
from tests.mflux_vae_train.lora.test_conv import X

LAYERS = {"down": change("down", 3, scale=2.0), "block.1": change("block.1", 2, scale=0.3), "out": change("out", 2)}


@pytest.mark.parametrize("dora", [False, True])
def test_a_file_goes_through_both_namings(dora: bool, tmp_path: Path) -> None:
    layers = {path: replace(one, magnitudes=change(path, 2, dora=True).magnitudes) for path, one in LAYERS.items()}
    given = {"unet": layers if dora else LAYERS}
    first = saved(tmp_path / "peft.safetensors", given)
    second = saved(tmp_path / "kohya.safetensors", first.changes, naming="kohya")
    third = saved(tmp_path / "back.safetensors", second.changes)
    for one in (first, second, third):
        assert_equal(one.changes, deltas(given))
        assert one.dora == dora and one.unstated == 0
    assert {path: one.alpha for path, one in first.changes["unet"].items()} == {"down": 6.0, "block.1": 0.6, "out": 2.0}
    if dora:
        assert mx.array_equal(third.changes["unet"]["down"].magnitudes, layers["down"].magnitudes)
        assert read_safetensors(tmp_path / "kohya.safetensors")[0]["lora_unet_out.dora_scale"].shape == (3, 1)
    else:
        outputs = [loaded(tmp_path / f"{name}.safetensors")(X) for name in ("peft", "kohya", "back")]
        np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(outputs[2], outputs[0], rtol=1e-5, atol=1e-5)


def test_without_a_model_names_and_kernels_are_those_of_the_file(tmp_path: Path) -> None:
    for naming in ("peft", "kohya"):
        path = tmp_path / f"{naming}.safetensors"
        saved(path, {"unet": LAYERS}, naming=naming)
        found = open_adapter(path)
        assert found.naming == naming
        write_adapter(tmp_path / "again.safetensors", found.changes, naming=naming, targets=found.targets)
        (before, stated), (after, again) = (read_safetensors(one) for one in (path, tmp_path / "again.safetensors"))
        assert {key: one.shape for key, one in before.items()} == {key: one.shape for key, one in after.items()}
        assert all(mx.array_equal(before[key], after[key]) for key in before)
        if naming == "peft":
            assert json.loads(stated[METADATA_KEY]) == json.loads(again[METADATA_KEY])


def test_other_names_are_kept_with_the_scale_in_the_weights(tmp_path: Path) -> None:
    tensors = {
        "diffusion_model.a.lora_down.weight": mx.ones((2, 4)),
        "diffusion_model.a.lora_up.weight": mx.ones((3, 2)),
        "diffusion_model.a.alpha": mx.array(1.0),
    }
    write_safetensors(tmp_path / "a.safetensors", tensors)
    found = open_adapter(tmp_path / "a.safetensors")
    assert found.naming == "other"
    write_adapter(tmp_path / "b.safetensors", found.changes, naming="other")
    written, metadata = read_safetensors(tmp_path / "b.safetensors")
    assert METADATA_KEY not in metadata and mx.all(written["diffusion_model.a.lora_B.weight"] == 0.5)


def test_fused_layers_of_kohya_are_read_without_their_model(tmp_path: Path) -> None:
    tensors = {"lora_qkv.lora_down.weight": mx.ones((6, 4)), "lora_qkv.lora_up.weight": mx.ones((9, 6))}
    write_safetensors(tmp_path / "a.safetensors", tensors, {"ss_network_dim": "2", "ss_network_alpha": "2"})
    ((name, found),) = open_adapter(tmp_path / "a.safetensors").layers()
    assert name == "lora_qkv" and found.rank == 6


def test_magnitudes_of_a_part_of_a_fused_layer_are_refused(tmp_path: Path) -> None:
    fused = replace(MODEL, kohya={"unet": {"lora_unet_both": ("down", "out")}})
    with pytest.raises(SettingsError, match="magnitudes"):
        saved(tmp_path / "a.safetensors", {"unet": {"out": change("out", 2, dora=True)}}, naming="kohya", model=fused)


def test_the_dtype_is_kept_where_it_is_exact(tmp_path: Path) -> None:
    half = {path: replace(one, a=one.a.astype(mx.float16), b=one.b.astype(mx.float16)) for path, one in LAYERS.items()}
    names = {}
    for naming in ("peft", "kohya"):  # whose scale of 0.3 is in the weights
        names[naming] = write_adapter(
            tmp_path / "a.safetensors", {"unet": half}, naming=naming, model=MODEL, given=mx.float16
        )
    assert names == {"peft": "float16", "kohya": "float32"}
    large = {"unet": {"out": replace(change("out", 2), scale=1e6)}}
    with pytest.raises(SettingsError, match="float16"):
        saved(tmp_path / "b.safetensors", large, naming="kohya", dtype="float16")
    assert not (tmp_path / "b.safetensors").exists()


def test_layers_without_a_name_at_kohya_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="out"):
        saved(tmp_path / "a.safetensors", {"unet": LAYERS}, naming="kohya", model=replace(MODEL, kohya={}))


def test_a_file_that_exists_or_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    check_target(tmp_path / "a.safetensors", overwrite=True)
    for target, word in ((tmp_path / "a.safetensors", "overwrite"), (tmp_path, "safetensors")):
        with pytest.raises(SettingsError, match=word):
            check_target(target, overwrite=False)


def test_incomplete_files_and_values_are_refused_without_a_model(tmp_path: Path) -> None:
    pair = {"unet.a.lora_A.weight": mx.ones((2, 4)), "unet.a.lora_B.weight": mx.ones((3, 2))}
    wrong = {
        "missing": {"unet.a.lora_A.weight": pair["unet.a.lora_A.weight"]},
        "shapes": {**pair, "unet.a.lora_B.weight": mx.ones((3, 3))},
        "unknown": {**pair, "unet.b.weight": mx.ones(3)},
        "NaN": {**pair, "unet.a.lora_B.weight": mx.full((3, 2), float("nan"))},
    }
    for word, tensors in wrong.items():
        write_safetensors(tmp_path / "a.safetensors", tensors)
        with pytest.raises(WeightsError, match=word):
            open_adapter(tmp_path / "a.safetensors")


def test_metadata_about_the_training_is_kept_and_about_ranks_is_not() -> None:
    stated = {"ss_network_dim": "4", "lora_alpha": "2", "unet.r": "4", "sshs_model_hash": "0", "ss_seed": "1"}
    assert other_metadata({**stated, "format": "pt", METADATA_KEY: "{}"}) == {"ss_seed": "1"}


def test_an_adapter_trained_here_is_read_without_its_model(tmp_path: Path) -> None:
    net = loaded_with_text(tmp_path)
    found = open_adapter(tmp_path / "a.safetensors")
    assert {*found.changes} == {"mine", "text_encoder"} and found.naming == "peft"
    assert found.targets["mine"] == lora.files.target_modules(net, sorted(found.changes["mine"]))


def loaded_with_text(folder: Path):
    from tests.mflux_vae_train.lora.test_lora import adapted

    nets = {"mine": adapted(), "text_encoder": adapted()}
    lora.save_adapter(nets, folder / "a.safetensors")
    return nets["mine"]


def test_layers_of_clip_are_named_as_all_versions_of_transformers_find_them(tmp_path: Path) -> None:
    layers = {f"text_model.encoder.layers.{i}.q": change("out", 2 + i) for i in range(2)}
    write_adapter(tmp_path / "a.safetensors", {"text_encoder": layers}, naming="peft")
    config = json.loads(read_safetensors(tmp_path / "a.safetensors")[1][METADATA_KEY])
    assert config["text_encoder.target_modules"] == ["encoder.layers.0.q", "encoder.layers.1.q"]
    assert config["text_encoder.rank_pattern"] == {"encoder.layers.1.q": 3}
    assert {name: one.alpha for name, one in open_adapter(tmp_path / "a.safetensors").layers()} == {
        f"text_encoder.{path}": float(one.rank) for path, one in layers.items()
    }
