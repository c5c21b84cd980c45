"""Stable Diffusion's UNet against diffusers, live, in float32."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae.weights.keymaps.rules import conv_from_mlx  # noqa: E402
from mflux_vae_train import lora  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion.unet import UNet  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion.unet_config import UNetConfig  # noqa: E402
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn  # noqa: E402
from tests.mflux_vae_train.pipelines.stable_diffusion.small_unet import (  # noqa: E402
    COUNTS,
    PUBLISHED,
    SIZES,
    SMALL,
    inputs,
)

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]


def settings_of(config: UNetConfig) -> dict:
    def lists(value):
        return [lists(item) for item in value] if isinstance(value, tuple) else value

    return {key: lists(value) for key, value in config.to_dict().items() if key != "_class_name"}


def theirs_of(ours: UNet):
    """diffusers' model with the same configuration and weights; strict, so the keys are the same, too."""
    model = diffusers.UNet2DConditionModel(**settings_of(ours.config))
    state = {key: torch.from_numpy(np.array(conv_from_mlx(value))) for key, value in tree_flatten(ours.parameters())}
    model.load_state_dict(state, strict=True)
    return model.eval()


def call_theirs(model, given: tuple, latents=None):
    """diffusers' prediction, NHWC; `latents` are NCHW."""
    first, timesteps, text, *added = (
        torch.from_numpy(np.array(array)) if isinstance(array, mx.array) else array for array in given
    )
    conditions = {}
    if added:
        pooled, time_ids = (torch.from_numpy(np.array(array)) for array in added[0])
        conditions = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
    latents = first.permute(0, 3, 1, 2) if latents is None else latents
    return model(latents, timesteps, text, return_dict=False, **conditions)[0].permute(0, 2, 3, 1)


def difference(found, expected) -> float:
    """Largest, relative to the largest expected number."""
    found, expected = np.array(found), expected.detach().numpy()
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", SMALL)
def test_prediction_and_input_gradient_agree(name: str) -> None:
    ours = drawn(UNet(SMALL[name]), 11)
    theirs = theirs_of(ours)
    first, *rest = given = inputs(SMALL[name], SIZES[name])
    latents = torch.from_numpy(np.array(first)).permute(0, 3, 1, 2).requires_grad_()
    expected = call_theirs(theirs, given, latents)
    (expected - 1).square().mean().backward()
    found, gradient = mx.value_and_grad(lambda x: mx.square(ours(x, *rest) - 1).mean())(first)
    assert found.item() == pytest.approx((expected - 1).square().mean().item(), rel=1e-4)
    assert difference(ours(*given), expected) <= 1e-4
    assert difference(gradient, latents.grad.permute(0, 2, 3, 1)) <= 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_adapter_gradients_agree(name: str) -> None:
    """An adapter with random matrices on every layer of `TARGETS`."""
    ours = drawn(UNet(SMALL[name]), 11)
    theirs = theirs_of(ours)
    theirs.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    adapted = lora.add_lora(ours, [f"*.{target}" for target in TARGETS], rank=4, alpha=8)
    layers, modules = lora.layers(ours), dict(theirs.named_modules())
    assert len(adapted) == sum(hasattr(module, "lora_A") for module in modules.values())
    draws = np.random.default_rng(0)
    parameters = {}
    for path, layer in layers.items():
        for matrix, module in (("lora_a", modules[path].lora_A), ("lora_b", modules[path].lora_B)):
            values = draws.normal(0, 0.05, layer[matrix].shape).astype(np.float32)
            layer[matrix] = mx.array(values)
            module.default.weight.data = torch.from_numpy(values.T.copy())
            parameters[f"{path}.{matrix}"] = module.default.weight
    given = inputs(SMALL[name], SIZES[name])
    (call_theirs(theirs, given) - 1).square().mean().backward()
    _, slopes = nn.value_and_grad(ours, lambda: mx.square(ours(*given) - 1).mean())()
    found = dict(tree_flatten(slopes))
    assert found.keys() == parameters.keys()
    largest = max(float(weight.grad.abs().max()) for weight in parameters.values())
    for key, weight in parameters.items():
        expected = weight.grad.numpy()
        # gradients of keys nearly cancel: their rounding is that of larger ones
        scale = max(np.abs(expected).max(), 0.01 * largest)
        assert np.abs(np.array(found[key]).T - expected).max() / scale <= 1e-4, key


@pytest.mark.parametrize("name", ["sd1", "ssd"])
def test_weight_gradients_agree(name: str) -> None:
    ours = drawn(UNet(SMALL[name]), 11)
    theirs = theirs_of(ours)
    given = inputs(SMALL[name], SIZES[name])
    (call_theirs(theirs, given) - 1).square().mean().backward()
    _, slopes = nn.value_and_grad(ours, lambda: mx.square(ours(*given) - 1).mean())()
    found = dict(tree_flatten(slopes))
    for key, parameter in theirs.named_parameters():
        if float(parameter.grad.abs().max()) > 1e-5:  # else rounding: a norm removes this bias
            assert difference(conv_from_mlx(found[key]), parameter.grad) <= 1e-4, key


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_has_the_published_keys_and_shapes(name: str) -> None:
    """No weight is computed: ours are lazy, theirs on the meta device."""
    settings = settings_of(PUBLISHED[name])
    with torch.device("meta"):
        theirs = diffusers.UNet2DConditionModel(**settings)
    ours = UNet(UNetConfig.from_dict(settings))
    shapes = {key: conv_shape(value.shape) for key, value in tree_flatten(ours.parameters())}
    assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert (sum(map(np.prod, shapes.values())), len(shapes)) == COUNTS[name]


def conv_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """OHWI -> OIHW."""
    return (shape[0], shape[3], *shape[1:3]) if len(shape) == 4 else tuple(shape)
