"""Z-Image's transformer by itself: padding, dtypes, gradient checkpointing and compilation."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mflux_vae.errors import ImageError, WeightsError
from mflux_vae_train import lora
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.pipelines.z_image.packing import pack, unpack
from mflux_vae_train.pipelines.z_image.transformer import ZImageTransformer, ZImageTransformerConfig
from mflux_vae_train.training.step import Arrays, MicroBatch, Step
from tests.helpers import gpu_branch
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn
from tests.mflux_vae_train.pipelines.z_image.small_z_image import small_config

LENGTHS = (40, 5, 33)


pytestmark = pytest.mark.usefixtures("uncompiled")
"""One test of updates compiles."""


def inputs(config: ZImageTransformerConfig, longest: int = 64, seed: int = 5) -> dict[str, mx.array]:
    keys, count = mx.random.split(mx.random.key(seed), 3), len(LENGTHS)
    return {
        "latents": mx.random.normal((count, 4, 6, config.in_channels), key=keys[0]),
        "timestep": mx.random.uniform(shape=(count,), key=keys[1]),
        "caption": mx.random.normal((count, longest, config.cap_feat_dim), key=keys[2]),
        "lengths": mx.array(LENGTHS),
    }


def trained(dtype: mx.Dtype, *, updates: int = 3, **attributes) -> dict[str, mx.array]:
    """Adapter after some updates on captions of changing lengths."""
    network = drawn(ZImageTransformer(small_config()), 0)
    network.set_dtype(dtype)
    lora.add_lora(network, ["*.attention.*", "*.feed_forward.*", "t_embedder.*"], rank=4)
    for name, value in attributes.items():
        setattr(network, name, value)

    def loss(model: nn.Module, given: Arrays) -> tuple[mx.array, dict[str, mx.array]]:
        wide = {name: given[name].astype(dtype) for name in ("latents", "caption")}
        velocity = model(**{**given, **wide}).astype(mx.float32)
        return mx.square(velocity - given["latents"]).mean(), {}

    step = Step(network, AdamW(), loss, compile=False)
    for update in range(updates):
        given = inputs(network.config, seed=update) | {"lengths": mx.roll(mx.array(LENGTHS), update)}
        step(update, [MicroBatch(arrays=given, weight=3)], 1e-2)
    return dict(tree_flatten(network.trainable_parameters()))


def difference(found: dict[str, mx.array], expected: dict[str, mx.array]) -> float:
    ours, theirs = (np.concatenate([np.array(each[name]).ravel() for name in expected]) for each in (found, expected))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def test_config_round_trip_and_refusals() -> None:
    config = small_config()
    assert ZImageTransformerConfig.from_dict(config.to_dict()) == config
    for change in ({"qk_norm": False}, {"n_kv_heads": 1}, {"siglip_feat_dim": 8}, {"axes_dims": (8, 4, 2)}):
        with pytest.raises(WeightsError, match=next(iter(change))):
            small_config(**change)


def test_latents_are_packed_into_patches_and_back() -> None:
    latents = mx.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    tokens = pack(latents)
    assert tokens[0, 1].tolist() == [latents[0, row, column].tolist()[c] for row, column, c in
                                     [(r, k, c) for r in (0, 1) for k in (2, 3) for c in range(3)]]  # fmt: skip
    assert mx.array_equal(unpack(tokens, 4, 6), latents)
    with pytest.raises(ImageError, match="16"):
        pack(latents[:, :3])


def test_length_of_padding_and_batch_mates_change_nothing() -> None:
    model = drawn(ZImageTransformer(small_config()), 3)
    given = inputs(model.config)
    together = model(**given)
    longer = mx.pad(given["caption"], [(0, 0), (0, 50), (0, 0)], constant_values=7.0)
    np.testing.assert_allclose(model(**given | {"caption": longer}), together, rtol=1e-4, atol=1e-5)
    alone = model(**{name: value[1:2] for name, value in given.items()} | {"caption": given["caption"][1:2, :20]})
    np.testing.assert_allclose(alone[0], together[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_an_adapter_in_float32_equals_that_of_a_cpu(gradient_checkpointing: bool, monkeypatch) -> None:
    gpu_branch.force(monkeypatch, cpu=True)
    expected = trained(mx.float32)
    gpu_branch.force(monkeypatch, dtype=mx.float32)
    found = trained(mx.float32, gradient_checkpointing=gradient_checkpointing)
    assert difference(found, expected) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_gradients_serve_captions_of_all_lengths() -> None:
    network = drawn(ZImageTransformer(small_config(n_layers=1)), 0)
    lora.add_lora(network, ["*.to_q"], rank=2)
    given, parameters = inputs(network.config), network.trainable_parameters()

    def loss(parameters: dict, lengths: mx.array) -> mx.array:
        network.update(parameters)
        return mx.square(network(**given | {"lengths": lengths})).mean()

    mx.enable_compile()
    for on in (False, True):
        network.gradient_checkpointing = on
        plain = mx.grad(loss)
        compiled = mx.compile(lambda parameters, lengths, plain=plain: plain(parameters, lengths))
        for lengths in (LENGTHS, LENGTHS[::-1]):
            both = [run(parameters, mx.array(lengths)) for run in (plain, compiled)]
            network.update(parameters)
            expected, found = (dict(tree_flatten(one)) for one in both)
            assert all(np.allclose(found[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)


@pytest.mark.usefixtures("gpu_branch")
def test_blocks_compute_in_bfloat16(monkeypatch) -> None:
    model = drawn(ZImageTransformer(small_config()), 3)
    given = inputs(model.config)
    exact = model(**given)
    model.set_dtype(mx.bfloat16)
    seen: set[mx.Dtype] = set()
    for kind in {type(module) for module in model.modules()} - {nn.Module}:
        call = kind.__call__

        def watched(self, x, *rest, call=call, **options):
            result = call(self, x, *rest, **options)
            seen.add(result.dtype)
            return result

        if kind is not ZImageTransformer:
            monkeypatch.setattr(kind, "__call__", watched)
    wide = {name: given[name].astype(mx.bfloat16) for name in ("latents", "caption")}
    half = model(**given | wide)
    assert half.dtype == mx.bfloat16 and seen == {mx.bfloat16}
    assert float(mx.abs(half - exact).max() / mx.abs(exact).max()) < 0.1
