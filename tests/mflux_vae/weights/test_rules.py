"""Key tables go both ways, and loading is strict."""

from __future__ import annotations

import re

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mflux_vae import WeightsError
from mflux_vae.weights.keymaps.diffusers import AUTOENCODER_KL
from mflux_vae.weights.keymaps.rules import Rule, from_mlx, load_strict, to_mlx
from tests.mflux_vae.naming_samples import parameters, same
from tests.mflux_vae.small_models import small_kl, small_plain

OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


@pytest.mark.parametrize("build", [small_kl, small_plain])
def test_a_table_there_and_back_is_bitwise_the_same(build) -> None:
    ours = parameters(build())
    theirs = from_mlx(ours, AUTOENCODER_KL)
    assert same(to_mlx(theirs, AUTOENCODER_KL), ours)
    assert theirs["encoder.conv_in.weight"].shape[1:] == (3, 3, 3)
    for key, tensor in theirs.items():
        assert tensor.ndim != 4 or tensor.shape[2] == tensor.shape[3], f"{key} is not (O, I, kh, kw)"


def test_attention_names_of_the_first_releases_are_read_and_never_written() -> None:
    ours = parameters(small_kl())
    theirs = from_mlx(ours, AUTOENCODER_KL)
    assert not any(re.search(r"\.(query|key|value|proj_attn)\.", key) for key in theirs)
    old = {
        re.sub(r"\.(to_q|to_k|to_v|to_out\.0)\.", lambda found: f".{OLD_NAMES[found[1]]}.", key): tensor
        for key, tensor in theirs.items()
    }
    assert len(old.keys() - theirs.keys()) == 2 * 8  # weight and bias of four layers in two attentions
    assert same(to_mlx(old, AUTOENCODER_KL), ours)


def test_two_names_for_one_tensor_are_an_error() -> None:
    path = "decoder.mid_block.attentions.0"
    tensors = {f"{path}.query.weight": mx.ones((2, 2)), f"{path}.to_q.weight": mx.zeros((2, 2))}
    with pytest.raises(WeightsError, match=r"to_q.*query|query.*to_q"):
        to_mlx(tensors, AUTOENCODER_KL)


def test_rules_rename_transform_drop_and_leave_alone() -> None:
    table = (
        Rule("old.{i}.{rest}", "new.{i}.layers.{rest}", lambda x: x + 1, lambda x: x - 1),
        Rule("{any}.counter", None),
    )
    theirs = {"old.3.w.bias": mx.array(1), "x.counter": mx.array(2), "old.c.w": mx.array(3)}
    ours = to_mlx(theirs, table)
    assert {key: value.item() for key, value in ours.items()} == {"new.3.layers.w.bias": 2, "old.c.w": 3}
    back = from_mlx(ours, table)
    assert {key: value.item() for key, value in back.items()} == {"old.3.w.bias": 1, "old.c.w": 3}


names = st.text("abc.", min_size=1, max_size=6).filter(lambda name: "a" in name)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(before=names, after=names, numbers=st.lists(st.integers(0, 12), min_size=1, max_size=4, unique=True))
def test_any_renaming_can_be_undone(before: str, after: str, numbers: list[int]) -> None:
    table = (Rule(f"{before}.{{i}}.{{rest}}", f"{after}/{{i}}/{{rest}}"),)
    theirs = {f"{before}.{number}.w": mx.array(number) for number in numbers}
    ours = to_mlx(theirs, table)
    assert set(ours) == {f"{after}/{number}/w" for number in numbers}
    assert same(from_mlx(ours, table), theirs)


# strict loading


def test_one_error_lists_what_is_missing_unknown_and_misshapen() -> None:
    network = small_plain()
    before = parameters(network)
    tensors = dict(before)
    for key in ("encoder.mu.bias", "encoder.mu.weight"):
        del tensors[key]
    tensors["decoder.extra.weight"] = mx.zeros((1,))
    tensors["decoder.conv_out.bias"] = mx.zeros((7,))
    with pytest.raises(WeightsError) as caught:
        load_strict(network, tensors, where="some/folder")
    message = str(caught.value)
    assert message.startswith("some/folder: ") and "\n" not in message
    assert "2 missing: encoder.mu.bias, encoder.mu.weight" in message
    assert "1 unknown: decoder.extra.weight" in message
    assert "1 misshapen: decoder.conv_out.bias is (7,), expected (3,)" in message
    assert same(parameters(network), before)


@pytest.mark.parametrize("dtype", [None, mx.float16, mx.bfloat16, mx.float32])
def test_loading_converts_floating_point_tensors_only(dtype: mx.Dtype | None) -> None:
    module = nn.Module()
    module.weight, module.ids = mx.zeros((2,)), mx.zeros((3,), dtype=mx.int32)
    tensors = {"weight": mx.array([1.5, -2.0], dtype=mx.bfloat16), "ids": mx.array([1, 2, 3], dtype=mx.int32)}
    load_strict(module, tensors, where="here", dtype=dtype)
    assert module.weight.dtype == (dtype or mx.bfloat16) and module.weight.tolist() == [1.5, -2.0]
    assert module.ids.dtype == mx.int32 and module.ids.tolist() == [1, 2, 3]


@given(
    st.lists(st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=400), max_size=40),
    st.integers(0, 3000),
    st.sampled_from([mx.ones((1,)), mx.ones((3, 2)), mx.ones((3, 2), mx.uint8)]),
)
@settings(deadline=None, max_examples=20)
def test_the_error_for_another_networks_file_stays_short(names: list[str], count: int, value: mx.array) -> None:
    network = nn.Sequential(*[nn.Linear(2, 3) for _ in range(50)])
    tensors = {**dict.fromkeys(names, value), **{f"layers.{i}.weight": value for i in range(count)}}
    with pytest.raises(WeightsError) as caught:
        load_strict(network, tensors, where="a/file.safetensors")
    message = str(caught.value).removeprefix("a/file.safetensors")
    assert len(message) <= 300 and f"of {len(tensors)} match" in message and "Sequential" in message
