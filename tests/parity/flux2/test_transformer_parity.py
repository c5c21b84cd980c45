"""FLUX.2's transformer against diffusers, live, in float32."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
if not hasattr(diffusers, "Flux2KleinPipeline"):
    pytest.skip("diffusers without FLUX.2 klein", allow_module_level=True)

import mlx.core as mx  # noqa: E402
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae_train.pipelines.flux1 import keys as flux1_keys  # noqa: E402
from mflux_vae_train.pipelines.flux2 import keys  # noqa: E402
from mflux_vae_train.pipelines.flux2.transformer import (  # noqa: E402
    Flux2Transformer,
    Flux2TransformerConfig,
    image_ids,
    text_ids,
)
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn  # noqa: E402
from tests.mflux_vae_train.pipelines.flux2.small_klein import small_config  # noqa: E402

CONFIGS = {
    "plain": small_config(),
    "deeper": small_config(
        num_layers=3, num_single_layers=4, attention_head_dim=32, num_attention_heads=3, axes_dims_rope=(8, 8, 8, 8)
    ),
    "double blocks only": small_config(num_layers=2, num_single_layers=0),
    "single blocks only": small_config(num_layers=0, num_single_layers=2, mlp_ratio=2.5),
}
PARAMETERS = {"4B": 3_875_544_576, "9B": 9_078_581_248}
SIZES = {
    "4B": {},
    "9B": {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
}


def theirs_of(ours: Flux2Transformer):
    """diffusers' model with the same configuration and weights; strict, so the keys are the same, too."""
    settings = {key: value for key, value in ours.config.to_dict().items() if key != "_class_name"}
    model = diffusers.Flux2Transformer2DModel(**settings)
    state = {key: torch.from_numpy(np.array(value)) for key, value in tree_flatten(ours.parameters())}
    model.load_state_dict(state, strict=True)
    return model.eval()


def inputs(config: Flux2TransformerConfig, size: tuple[int, int]) -> list[np.ndarray]:
    draws = np.random.default_rng(0)
    given = [
        draws.standard_normal((2, size[0] * size[1], config.in_channels)),
        draws.standard_normal((2, 7, config.joint_attention_dim)),
        np.array([0.97, 0.13]),
        np.array(image_ids(*size)),
        np.array(text_ids(7)),
    ]
    return [array.astype(np.float32) for array in given]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("size", [(2, 2), (1, 5), (6, 3)])
def test_transformer_agrees(config: Flux2TransformerConfig, size: tuple[int, int]) -> None:
    ours = drawn(Flux2Transformer(config), 11)
    given = inputs(config, size)
    with torch.no_grad():
        expected = theirs_of(ours)(*map(torch.from_numpy, given), return_dict=False)[0].numpy()
    found = np.array(ours(*map(mx.array, given)))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() / np.abs(expected).max() <= 1e-4


@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_agree(recompute: bool) -> None:
    ours = drawn(Flux2Transformer(CONFIGS["deeper"]), 11)
    ours.gradient_checkpointing = recompute
    theirs = theirs_of(ours)
    latents, prompt, *rest = inputs(ours.config, (2, 3))

    def objective(parameters: dict, latents: mx.array, prompt: mx.array) -> mx.array:
        ours.update(parameters)
        return mx.square(ours(latents, prompt, *map(mx.array, rest)) - 1).mean()

    of_weights, *of_inputs = mx.grad(objective, argnums=(0, 1, 2))(
        ours.trainable_parameters(), mx.array(latents), mx.array(prompt)
    )
    leaves = [torch.from_numpy(array).requires_grad_() for array in (latents, prompt)]
    (theirs(*leaves, *map(torch.from_numpy, rest), return_dict=False)[0] - 1).square().mean().backward()
    found = dict(tree_flatten(of_weights)) | dict(zip(("latents", "prompt"), of_inputs, strict=True))
    parameters = dict(theirs.named_parameters()) | dict(zip(("latents", "prompt"), leaves, strict=True))
    assert found.keys() == parameters.keys()
    for name, parameter in parameters.items():
        expected = parameter.grad.numpy()
        assert np.abs(np.array(found[name]) - expected).max() / np.abs(expected).max() <= 1e-4, name


@pytest.mark.parametrize("name", PARAMETERS)
def test_full_size_has_the_published_keys_and_shapes(name: str) -> None:
    """No parameter is computed: ours are lazy, theirs on the meta device."""
    config = Flux2TransformerConfig(**SIZES[name])
    with torch.device("meta"):
        theirs = diffusers.Flux2Transformer2DModel(
            **{key: value for key, value in config.to_dict().items() if key != "_class_name"}
        )
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    shapes = {key: tuple(value.shape) for key, value in tree_flatten(Flux2Transformer(config).parameters())}
    assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == PARAMETERS[name]
    assert mx.get_peak_memory() - before < 2**20


def test_positions_agree() -> None:
    pipeline = diffusers.Flux2KleinPipeline
    np.testing.assert_array_equal(image_ids(3, 5), pipeline._prepare_latent_ids(torch.zeros(1, 4, 3, 5))[0])
    np.testing.assert_array_equal(text_ids(6), pipeline._prepare_text_ids(torch.zeros(1, 6, 2))[0])


def test_a_single_file_is_read_as_diffusers_converts_it() -> None:
    """Every tensor of the 9B model with all of its rows, and one column."""
    config = Flux2TransformerConfig(**SIZES["9B"])
    ours = {key: tuple(value.shape) for key, value in tree_flatten(Flux2Transformer(config).parameters())}
    file = keys.to_bfl({name: mx.zeros((shape[0], 1)[: len(shape)]) for name, shape in ours.items()})
    draws = np.random.default_rng(0)
    stored = {name: draws.standard_normal(value.shape, dtype=np.float32) for name, value in file.items()}
    found = keys.our_names({f"model.diffusion_model.{name}": mx.array(value) for name, value in stored.items()})
    theirs = convert_flux2_transformer_checkpoint_to_diffusers(
        {name: torch.from_numpy(value) for name, value in stored.items()}
    )
    assert keys.is_flux2(stored) and not flux1_keys.is_flux1(stored) and not flux1_keys.is_flux1(ours)
    assert found.keys() == theirs.keys() == ours.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)
    back = keys.to_bfl(found)
    assert back.keys() == stored.keys()
    assert all(np.array_equal(back[name], value) for name, value in stored.items())
