"""The difference of two networks as an adapter: a fused adapter comes back, and nothing is lost silently."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae_train import lora
from mflux_vae_train.lora.editing.extraction import extract
from mflux_vae_train.lora.layers import changes
from tests.mflux_vae_train.lora.editing.random_changes import assert_equal, deltas
from tests.mflux_vae_train.lora.test_conv import Net, adapted


def base() -> Net:
    mx.random.seed(0)
    return Net()


def test_a_fused_adapter_comes_back_at_its_rank() -> None:
    tuned = adapted()
    expected = deltas({"unet": changes(tuned)})
    lora.fuse(tuned)
    found = extract({"unet": base()}, {"unet": tuned}, 2)
    assert_equal(found.changes, expected)
    assert found.kept.keys() == {"unet.down", "unet.block.1", "unet.out"} and not found.left_out
    assert found.kept_in_all == pytest.approx(1, abs=1e-6) and all(one > 0.999999 for one in found.kept.values())


def test_a_lower_rank_states_what_it_keeps() -> None:
    tuned = adapted()
    sizes = np.linalg.svd(deltas({"unet": changes(tuned)})["down"], compute_uv=False)
    lora.fuse(tuned)
    found = extract({"unet": base()}, {"unet": tuned}, 1)
    assert found.kept["unet.down"] == pytest.approx(sizes[0] ** 2 / np.sum(sizes**2), rel=1e-4)


def test_what_is_not_in_the_adapter_is_named() -> None:
    tuned = adapted()
    lora.fuse(tuned)
    tuned.out.bias = tuned.out.bias * 1.5
    found = extract({"unet": base()}, {"unet": tuned}, 2, patterns=["out"])
    assert found.changes["unet"].keys() == {"out"}
    assert found.left_out.keys() == {"unet.out.bias", "unet.down.weight", "unet.block.1.weight"}
    assert found.left_out["unet.out.bias"] == pytest.approx(0.5)


def test_layers_that_only_have_another_dtype_are_unchanged() -> None:
    tuned = base()
    tuned.out.weight = tuned.out.weight + 1.0
    for name, dtype in (("down", mx.float16), ("block", mx.bfloat16)):
        layer = tuned[name][1] if name == "block" else tuned[name]
        layer.weight = layer.weight.astype(dtype)
    found = extract({"unet": base()}, {"unet": tuned}, 2)
    assert found.changes["unet"].keys() == {"out"} and not found.left_out
    assert found.rounded == ["unet.block.1.weight", "unet.down.weight"]


def test_networks_that_have_no_such_difference_are_refused() -> None:
    quantized = nn.Sequential(nn.Linear(64, 64))
    nn.quantize(quantized)
    biased, wrong, broken = base(), base(), base()
    biased.out.bias = biased.out.bias + 1
    wrong.out.weight = mx.ones((4, 5))
    broken.out.weight = mx.full((3, 5), float("nan"))
    for tuned, error, word in (
        (base(), SettingsError, "equal"),
        (biased, SettingsError, "bias"),
        (wrong, SettingsError, "shapes"),
        (broken, WeightsError, "NaN"),
    ):
        with pytest.raises(error, match=word):
            extract({"unet": base()}, {"unet": tuned}, 2)
    with pytest.raises(SettingsError, match="quantized"):
        extract({"unet": nn.Sequential(nn.Linear(64, 64))}, {"unet": quantized}, 2)
    with pytest.raises(SettingsError, match="layers"):
        extract({"unet": base()}, {"unet": adapted()}, 2, patterns=["nothing"])


def test_the_networks_keep_no_weights() -> None:
    first, second = base(), base()
    second.out.weight = second.out.weight + 1
    extract({"unet": first}, {"unet": second}, 1)
    assert first.down.weight.size == second.down.weight.size == 1
