"""Stable Diffusion's UNet in float32 against diffusers, live."""

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

LINEAR = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj", "proj_in", "proj_out"]
CONVOLUTIONS = ["conv_in", "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_out"]
TARGETS = [*LINEAR, *CONVOLUTIONS]


def settings_of(config: UNetConfig) -> dict:
    def lists(value):
        return [lists(item) for item in value] if isinstance(value, tuple) else value

    return {key: lists(value) for key, value in config.to_dict().items() if key != "_class_name"}


def theirs_of(ours: UNet):
    """diffusers' model with the same configuration and weights; strict, so the keys are the same, too.

    In float64: in float32 its gradients have errors of 1e-4, too, with the two channels of `small_unet.SDXL`.
    """
    model = diffusers.UNet2DConditionModel(**settings_of(ours.config))
    state = {key: torch.from_numpy(np.array(conv_from_mlx(value))) for key, value in tree_flatten(ours.parameters())}
    model.load_state_dict(state, strict=True)
    return model.double().eval()


def tensor(array: mx.array):
    return torch.from_numpy(np.array(array)).double()


def nchw(array: mx.array):
    return tensor(array).permute(0, 3, 1, 2)


def call_theirs(model, given: tuple, latents=None):
    """diffusers' prediction, NHWC; `latents` are NCHW."""
    first, timesteps, text, *added = given
    conditions = {}
    if added:
        pooled, time_ids = map(tensor, added[0])
        conditions = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
    latents = nchw(first) if latents is None else latents
    return model(latents, tensor(timesteps), tensor(text), return_dict=False, **conditions)[0].permute(0, 2, 3, 1)


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
    latents = nchw(first).requires_grad_()
    expected = call_theirs(theirs, given, latents)
    (expected - 1).square().mean().backward()
    found, gradient = mx.value_and_grad(lambda x: mx.square(ours(x, *rest) - 1).mean())(first)
    assert found.item() == pytest.approx((expected - 1).square().mean().item(), rel=1e-4)
    assert difference(ours(*given), expected) <= 1e-4
    assert difference(gradient, latents.grad.permute(0, 2, 3, 1)) <= 1e-4


@pytest.mark.parametrize("name", SMALL)
def test_adapter_gradients_agree(name: str) -> None:
    """An adapter with random matrices on every layer of `TARGETS`, given to PEFT in its files' shapes."""
    ours = drawn(UNet(SMALL[name]), 11)
    theirs = theirs_of(ours)
    theirs.add_adapter(peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    adapted = lora.add_lora(ours, [p for one in TARGETS for p in (one, f"*.{one}")], rank=4, alpha=8)
    draws = np.random.default_rng(0)
    for layer in lora.layers(ours).values():
        for matrix in ("lora_a", "lora_b"):
            layer[matrix] = mx.array(draws.normal(0, 0.03, layer[matrix].shape), mx.float32)
    tensors = {key.replace(".weight", ".default.weight"): value for key, value in tensors_of(ours).items()}
    parameters = {name: value for name, value in theirs.named_parameters() if "lora_" in name}
    assert tensors.keys() == parameters.keys() and len(tensors) == 2 * len(adapted)
    for key, value in tensors.items():
        parameters[key].data.copy_(torch.from_numpy(np.array(value)))
        assert tuple(value.shape) == tuple(parameters[key].shape)
    given = inputs(SMALL[name], SIZES[name])
    expected = call_theirs(theirs, given)
    (expected - 1).square().mean().backward()
    _, slopes = nn.value_and_grad(ours, lambda: mx.square(ours(*given) - 1).mean())()
    assert difference(ours(*given), expected) <= 1e-4
    trained = ours.trainable_parameters()
    ours.update(slopes)
    found = tensors_of(ours)
    ours.update(trained)
    largest = max(float(weight.grad.abs().max()) for weight in parameters.values())
    for key, weight in parameters.items():
        gradient = weight.grad.numpy()
        # gradients of keys nearly cancel: their rounding is that of larger ones; Winograd adds 1e-5 per convolution
        scale = max(np.abs(gradient).max(), 0.01 * largest)
        assert np.abs(np.array(found[key.replace(".default", "")]) - gradient).max() / scale <= 2e-4, key
    lora.fuse(ours)
    assert difference(ours(*given), expected) <= 1e-4


def tensors_of(unet: UNet) -> dict[str, mx.array]:
    """Tensors of an adapter's file, without prefix."""
    return {key.removeprefix("unet."): value for key, value in lora.adapter_tensors(unet, "unet").items()}


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
