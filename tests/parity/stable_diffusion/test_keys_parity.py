"""Single files of Stable Diffusion are read as diffusers converts them: random weights of small models, whole names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import mlx.core as mx  # noqa: E402
from diffusers.loaders import single_file_utils as utilities  # noqa: E402

from mflux_vae.weights.keymaps.diffusers import SAME_NAMES  # noqa: E402
from mflux_vae.weights.keymaps.rules import from_mlx, to_mlx  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion.files import keys  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion.files.single_file import open_single_file  # noqa: E402
from mflux_vae_train.pipelines.stable_diffusion.unet_config import UNetConfig  # noqa: E402
from tests.mflux_vae_train.pipelines.stable_diffusion.files.small_models import KINDS, small_configs  # noqa: E402
from tests.mflux_vae_train.pipelines.stable_diffusion.files.test_keys import FULL  # noqa: E402

PREFIX = "model.diffusion_model."


def their_unet(config: UNetConfig) -> Any:
    values = {name: value for name, value in config.to_dict().items() if not name.startswith("_")}
    return diffusers.UNet2DConditionModel(**values)


def to_torch(tensors: dict[str, mx.array], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{key}": torch.from_numpy(np.array(tensor)) for key, tensor in tensors.items()}


def text_models(kind: str) -> dict[str, Any]:
    configs = small_configs(kind)
    chosen = {"text_encoder": configs.text_encoder, "text_encoder_2": configs.text_encoder_2}
    classes = transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection
    return {
        part: cls(transformers.CLIPTextConfig(**config.to_dict()))
        for (part, config), cls in zip(chosen.items(), classes, strict=True)
        if config is not None
    }


@pytest.mark.parametrize("kind", FULL)
def test_the_published_unets_have_diffusers_names_and_shapes_in_both_namings(kind: str) -> None:
    with torch.device("meta"):
        theirs = their_unet(FULL[kind])
    expected = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    ours = to_mlx({key: mx.zeros(shape) for key, shape in expected.items()}, SAME_NAMES)
    file = from_mlx(ours, keys.original_unet(FULL[kind]))
    given = {f"{PREFIX}{key}": torch.empty(tensor.shape, device="meta") for key, tensor in file.items()}
    found = utilities.convert_ldm_unet_checkpoint(given, dict(theirs.config))
    assert {key: tuple(value.shape) for key, value in found.items()} == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_unet_is_read_as_diffusers_converts_it(kind: str) -> None:
    config = small_configs(kind).unet
    theirs = their_unet(config)
    expected = {key: value.numpy() for key, value in theirs.state_dict().items()}
    ours = to_mlx({key: mx.array(value) for key, value in expected.items()}, SAME_NAMES)
    file = from_mlx(ours, keys.original_unet(config))
    found = utilities.convert_ldm_unet_checkpoint(to_torch(file, PREFIX), dict(theirs.config))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key].numpy(), value) for key, value in expected.items())
    back = to_mlx(file, keys.original_unet(config))
    assert back.keys() == ours.keys() and all(mx.array_equal(back[key], ours[key]) for key in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_checkpoint_of_torch_is_read_as_diffusers_converts_it(kind: str, tmp_path: Path) -> None:
    """UNet and text encoders, with the number of updates and a layer that Stable Diffusion 2 drops."""
    configs, encoders = small_configs(kind), text_models(kind)
    unet = their_unet(configs.unet)
    state = to_torch(
        from_mlx(
            to_mlx({key: mx.array(value.numpy()) for key, value in unet.state_dict().items()}, SAME_NAMES),
            keys.original_unet(configs.unet),
        ),
        PREFIX,
    )
    expected = {}
    for part, model in encoders.items():
        start = "" if next(iter(model.state_dict())).startswith("text_model.") else "text_model."
        weights = {f"{start}{key}": mx.array(value.numpy()) for key, value in model.state_dict().items()}
        if kind == "sd2" or part == "text_encoder_2":
            prefix = "cond_stage_model.model." if kind == "sd2" else "conditioner.embedders.1.model."
            state |= to_torch(keys.to_open_clip(weights), prefix)
            state[f"{prefix}logit_scale"] = torch.tensor(4.6)
            converted = utilities.convert_open_clip_checkpoint(model, state, prefix=prefix)
        else:
            prefix = "cond_stage_model.transformer." if kind == "sd1" else "conditioner.embedders.0.transformer."
            state |= to_torch(weights, prefix)
            converted = utilities.convert_ldm_clip_checkpoint(state)
        expected[part] = {key: value.numpy() for key, value in converted.items()}
        assert {key: tuple(value.shape) for key, value in weights.items()} == {
            key: value.shape for key, value in expected[part].items()
        }
    torch.save({"state_dict": state, "global_step": 875000}, tmp_path / "a.ckpt")
    file = open_single_file(tmp_path / "a.ckpt", configs=configs)
    assert file.missing == ["vae"]
    for part, tensors in expected.items():
        found = file.read(part)
        assert found.keys() == tensors.keys()
        assert all(np.array_equal(found[key], value) for key, value in tensors.items()), part
    theirs = utilities.convert_ldm_unet_checkpoint(state, dict(unet.config))
    found = from_mlx(file.read("unet"), SAME_NAMES)
    assert found.keys() == theirs.keys()
    assert all(np.array_equal(found[key], value.numpy()) for key, value in theirs.items())
