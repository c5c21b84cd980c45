"""A LoRA of FLUX.1 in bfloat16, with the code for Metal and CUDA: losses follow those of diffusers and peft."""

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

from mflux_vae_train import lora  # noqa: E402
from mflux_vae_train.optimizers.adam import AdamW  # noqa: E402
from mflux_vae_train.pipelines.flux1.packing import image_ids, text_ids  # noqa: E402
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer  # noqa: E402
from mflux_vae_train.training.step import Arrays, MicroBatch, Step  # noqa: E402
from tests.helpers import gpu_branch  # noqa: E402
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn, small_config  # noqa: E402

UPDATES, RATE, DECAY, RANK = 50, 2e-3, 1e-2, 4
SIDE, TEXT, BATCH = 8, 6, 2
PATTERNS = ("*transformer_blocks.*.attn.to_*", "*transformer_blocks.*.proj_*", "*transformer_blocks.*.ff*")
CONFIG = small_config(attention_head_dim=32, axes_dims_rope=(8, 12, 12))


def batch(update: int) -> dict[str, np.ndarray]:
    """The same images and prompts each time, at other noise levels."""
    fixed, changing = np.random.default_rng(0), np.random.default_rng(update + 1)
    tokens = (BATCH, SIDE**2 // 4, CONFIG.in_channels)
    latents, noise = fixed.standard_normal(tokens), changing.standard_normal(tokens)
    sigma = changing.uniform(0.1, 0.9, BATCH)
    given = {
        "hidden_states": latents + sigma[:, None, None] * (noise - latents),
        "encoder_hidden_states": fixed.standard_normal((BATCH, TEXT, CONFIG.joint_attention_dim)),
        "pooled_projections": fixed.standard_normal((BATCH, CONFIG.pooled_projection_dim)),
        "timestep": sigma,
        "target": noise - latents,
    }
    return {name: array.astype(np.float32) for name, array in given.items()}


def network() -> FluxTransformer:
    """Random weights, rounded to bfloat16, and adapters in float32."""
    model = drawn(FluxTransformer(CONFIG), 11)
    model.set_dtype(mx.bfloat16)
    lora.add_lora(model, PATTERNS, rank=RANK)
    return model


def our_losses() -> list[float]:
    def loss(model: nn.Module, arrays: Arrays) -> tuple[mx.array, dict[str, mx.array]]:
        inputs = {name: arrays[name].astype(mx.bfloat16) for name in arrays if name not in ("timestep", "target")}
        ids = {"img_ids": image_ids(SIDE, SIDE), "txt_ids": text_ids(TEXT)}
        velocity = model(**inputs, timestep=arrays["timestep"], **ids).astype(mx.float32)
        return mx.square(velocity - arrays["target"]).mean(), {}

    step = Step(network(), AdamW(weight_decay=DECAY), loss, compile=False)
    losses = []
    for update in range(UPDATES):
        arrays = {name: mx.array(array) for name, array in batch(update).items()}
        losses.append(step(update, [MicroBatch(arrays=arrays, weight=BATCH)], RATE)["loss"])
    return losses


def their_losses() -> list[float]:
    """As diffusers' script with `--mixed_precision bf16`: weights in bfloat16, adapters in float32, autocast."""
    ours = network()
    adapted = lora.layers(ours)
    with lora.disabled(ours):
        weights = {name: np.array(value.astype(mx.float32)) for name, value in tree_flatten(ours.parameters())}
    settings = {name: value for name, value in CONFIG.to_dict().items() if name != "_class_name"}
    model = diffusers.FluxTransformer2DModel(**settings)
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    model.requires_grad_(False)
    model.to(torch.bfloat16)
    model.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(adapted)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for path, layer in adapted.items():
            model.get_submodule(path).lora_A["default"].weight.copy_(torch.from_numpy(np.array(layer.lora_a.T)))
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=DECAY)
    ids = {"img_ids": image_ids(SIDE, SIDE), "txt_ids": text_ids(TEXT)}
    ids = {name: torch.from_numpy(np.array(value)) for name, value in ids.items()}
    losses = []
    for update in range(UPDATES):
        given = {name: torch.from_numpy(array) for name, array in batch(update).items()}
        target = given.pop("target")
        inputs = {name: array if name == "timestep" else array.bfloat16() for name, array in given.items()}
        with torch.autocast("cpu", torch.bfloat16):
            velocity = model(**inputs, **ids, return_dict=False)[0]
        loss = (velocity.float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_losses_in_bfloat16_follow_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_branch.force(monkeypatch)
    mx.disable_compile()
    try:
        ours, theirs = our_losses(), their_losses()
    finally:
        mx.enable_compile()
    difference = np.abs(np.subtract(ours, theirs)) / theirs
    print(f"loss {theirs[0]:.4f} -> {np.mean(theirs[-5:]):.4f}, difference {100 * difference.mean():.3f} %")
    assert np.mean(theirs[-5:]) < 0.9 * np.mean(theirs[:5])
    assert difference.mean() < 0.02
