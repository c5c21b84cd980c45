"""Prompts of Stable Diffusion and SDXL: joined states, the empty prompt, skipped layers, encoders in the step."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import SettingsError
from mflux_vae_train.pipelines.loading.lazy import Lazy
from mflux_vae_train.pipelines.stable_diffusion.prompts import SDPrompts
from tests.mflux_vae_train.pipelines.stable_diffusion.small_text import LAYOUTS, LENGTH, small_prompts

PROMPTS = ["a photo of a red circle", "", "a blue dog on a star"]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SUBSETS = [("text_encoder",), ("text_encoder_2",), ("text_encoder", "text_encoder_2")]


def assert_equal(found: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    assert found.keys() == expected.keys()
    for name, array in found.items():
        np.testing.assert_allclose(array, expected[name], **CLOSE, err_msg=name)


@pytest.mark.parametrize("model", LAYOUTS)
def test_shapes_and_states(tmp_path: Path, model: str) -> None:
    prompts = small_prompts(tmp_path, model)
    found = prompts.encode(PROMPTS)
    first = prompts.encoders["text_encoder"].get()
    tokens = prompts._tokenizers["text_encoder"].get().encode(PROMPTS)
    if model != "sdxl":
        assert found.keys() == {"prompt_embeds"}
        np.testing.assert_allclose(found["prompt_embeds"], first(tokens)[0], **CLOSE)
        return
    assert {name: array.shape for name, array in found.items()} == {
        "prompt_embeds": (3, LENGTH, 20 + 24),
        "pooled": (3, 14),
    }
    np.testing.assert_allclose(found["prompt_embeds"][::2, :, :20], first.hidden_state(tokens, skip=1)[::2], **CLOSE)


def test_the_empty_prompt_of_sdxl_is_zero_if_its_index_says_so(tmp_path: Path) -> None:
    zeros, encoded = (small_prompts(tmp_path / str(on), "sdxl", zeros_for_empty=on) for on in (True, False))
    for name, array in zeros.encode(PROMPTS).items():
        assert not array[1].any() and array[0].any() and array[2].any(), name
        assert bool(encoded.encode(PROMPTS)[name][1].any())
        np.testing.assert_allclose(array[::2], encoded.encode(PROMPTS)[name][::2], **CLOSE)
    assert_equal(zeros.encode(["", " "]), zeros.encode(["", ""]))


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("names", [(), *SUBSETS])
def test_unconditional_rows_come_first(tmp_path: Path, zeros: bool, names: tuple[str, ...]) -> None:
    prompts = small_prompts(tmp_path, "sdxl", zeros_for_empty=zeros)
    expected = prompts.encode(["", "", PROMPTS[0], PROMPTS[2]])
    prompts.in_step = names
    found = prompts.with_unconditional(prompts.encode([PROMPTS[0], PROMPTS[2]]))
    assert_equal(prompts.finish(found), expected)


def test_zeros_need_no_encoder(tmp_path: Path) -> None:
    prompts = small_prompts(tmp_path, "sdxl")
    conditioning = {name: array.astype(mx.float16) for name, array in prompts.encode(PROMPTS[:1]).items()}
    prompts.encoders = {}
    found = prompts.with_unconditional(conditioning)
    assert all(array.dtype == mx.float16 and not array[0].any() and array[1].any() for array in found.values())


@pytest.mark.parametrize("names", SUBSETS)
def test_encoders_in_the_step_give_the_same_and_learn(tmp_path: Path, names: tuple[str, ...]) -> None:
    prompts = small_prompts(tmp_path, "sdxl")
    expected = prompts.encode(PROMPTS)
    prompts.in_step = names
    late = prompts.encode(PROMPTS)
    assert {name for name in late if late[name].dtype == mx.int32} == {f"{name}_tokens" for name in names}
    assert_equal(prompts.finish(late), expected)

    def loss(encoder: nn.Module, rows: mx.array) -> mx.array:
        finished = prompts.finish({name: array[rows] for name, array in late.items()})
        return finished["prompt_embeds"].square().sum() + finished["pooled"].square().sum()

    for name in names:
        encoder = prompts.encoders[name].get()
        layer = "text_model.encoder.layers.0.self_attn.v_proj.weight"
        for row, learns in ((0, True), (1, False)):  # zeros teach nothing
            _, gradients = nn.value_and_grad(encoder, loss)(encoder, mx.array([row]))
            assert bool(dict(tree_flatten(gradients))[layer].any()) == learns


@pytest.mark.parametrize("model", LAYOUTS)
def test_skipped_layers(tmp_path: Path, model: str) -> None:
    prompts = small_prompts(tmp_path, model, zeros_for_empty=False)
    usual, empty = prompts.encode(PROMPTS), prompts.unconditional()
    fingerprints = {prompts.fingerprint()}
    prompts.clip_skip = 0
    assert_equal(prompts.encode(PROMPTS), usual)
    assert prompts.fingerprint() in fingerprints
    for skip in (1, 2):
        prompts.clip_skip = skip
        found = prompts.encode(PROMPTS)
        first = prompts.encoders["text_encoder"].get()
        tokens = prompts._tokenizers["text_encoder"].get().encode(PROMPTS)
        states = first.hidden_state(tokens, skip=skip + (model == "sdxl"), final_norm=model != "sdxl")
        np.testing.assert_allclose(found["prompt_embeds"][..., :20], states, **CLOSE)
        assert float(mx.abs(prompts.unconditional()["prompt_embeds"] - empty["prompt_embeds"]).max()) > 1e-3
        if model == "sdxl":
            np.testing.assert_allclose(found["pooled"], usual["pooled"], **CLOSE)
        fingerprints.add(prompts.fingerprint())
    assert len(fingerprints) == 3
    for wrong in (-1, 4 + (model != "sdxl")):
        with pytest.raises(SettingsError, match="clip_skip"):
            prompts.clip_skip = wrong


def test_fingerprints_differ_by_setting(tmp_path: Path) -> None:
    prompts = small_prompts(tmp_path / "a", "sdxl")
    found = {prompts.fingerprint(), small_prompts(tmp_path / "b", "sdxl", zeros_for_empty=False).fingerprint()}
    for names in SUBSETS:
        prompts.in_step = names
        found.add(prompts.fingerprint())
    assert len(found) == 5


@pytest.mark.parametrize("model", LAYOUTS)
def test_long_prompts_are_cut_where_they_are_inspected(tmp_path: Path, model: str) -> None:
    prompts = small_prompts(tmp_path, model)
    long = "a photo of a red circle and a blue star on a dog and a photo of a star"
    found = prompts.inspect([long, "a star"], None)
    assert list(found) == ["CLIP"], "tokenizers that read alike are one"
    cut, short = found["CLIP"]
    assert cut.is_cut and cut.limit == len(cut.ids) == LENGTH and not short.is_cut
    rows = prompts.encode([long, f"{long[: cut.end]} and more"])
    np.testing.assert_allclose(rows["prompt_embeds"][0], rows["prompt_embeds"][1], **CLOSE)
    assert prompts.inspect([long], 6)["CLIP"][0].limit == 6
    if model == "sdxl":
        assert list(prompts.inspect(["a star!"], None)) == ["CLIP", "OpenCLIP"]  # "!" is padding of the second one


def test_encoders_that_are_loaded_for_the_empty_prompt_are_freed(tmp_path: Path) -> None:
    prompts = small_prompts(tmp_path, "sd1")
    encoder = prompts.encoders["text_encoder"].get()
    prompts.encoders = {"text_encoder": Lazy(lambda: encoder)}
    first = prompts.unconditional()
    assert prompts.encoders["text_encoder"].loaded is None
    assert prompts.unconditional() is first
    prompts.clip_skip = 1
    assert prompts.unconditional() is not first


def test_an_encoder_of_the_caller_is_run_again(tmp_path: Path) -> None:
    prompts: SDPrompts = small_prompts(tmp_path, "sd2")
    first = prompts.unconditional()["prompt_embeds"]
    norm = prompts.encoders["text_encoder"].get().text_model.final_layer_norm
    norm.bias = norm.bias + 1
    np.testing.assert_allclose(prompts.unconditional()["prompt_embeds"], first + 1, **CLOSE)
