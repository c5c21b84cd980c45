"""FLUX's transformer and schedule against diffusers, live, in float32."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline, calculate_shift  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae_train.pipelines.flow.schedule import FlowMatchSchedule, euler_step  # noqa: E402
from mflux_vae_train.pipelines.flux1.packing import image_ids, pack, text_ids, unpack  # noqa: E402
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer, FluxTransformerConfig  # noqa: E402
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn, small_config  # noqa: E402

CONFIGS = {
    "plain": small_config(),
    "guidance": small_config(guidance_embeds=True),
    "deeper": small_config(
        num_layers=3,
        num_single_layers=4,
        attention_head_dim=32,
        num_attention_heads=3,
        axes_dims_rope=(8, 12, 12),
        out_channels=8,
    ),
    "double blocks only": small_config(num_layers=2, num_single_layers=0),
    "single blocks only": small_config(num_layers=0, num_single_layers=2, guidance_embeds=True),
}


def theirs_of(ours: FluxTransformer):
    """diffusers' model with the same configuration and weights; strict, so the keys are the same, too."""
    settings = {key: value for key, value in ours.config.to_dict().items() if key != "_class_name"}
    model = diffusers.FluxTransformer2DModel(**settings)
    state = {key: torch.from_numpy(np.array(value)) for key, value in tree_flatten(ours.parameters())}
    model.load_state_dict(state, strict=True)
    return model.eval()


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("size", [(4, 4), (2, 10), (12, 6)])
def test_transformer_agrees(config: FluxTransformerConfig, size: tuple[int, int]) -> None:
    ours = drawn(FluxTransformer(config), 11)
    theirs = theirs_of(ours)
    draws = np.random.default_rng(0)
    tokens = size[0] * size[1] // 4
    given = [
        draws.standard_normal((2, tokens, config.in_channels)),
        draws.standard_normal((2, 7, config.joint_attention_dim)),
        draws.standard_normal((2, config.pooled_projection_dim)),
        np.array([0.97, 0.13]),
        np.array(image_ids(*size)),
        np.array(text_ids(7)),
    ]
    if config.guidance_embeds:
        given.append(np.array([3.5, 1.0]))
    given = [array.astype(np.float32) for array in given]
    with torch.no_grad():
        expected = theirs(*map(torch.from_numpy, given), return_dict=False)[0].numpy()
    found = np.array(ours(*map(mx.array, given)))
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() / np.abs(expected).max() <= 1e-4


def test_gradients_agree() -> None:
    config = CONFIGS["guidance"]
    ours = drawn(FluxTransformer(config), 11)
    theirs = theirs_of(ours)
    draws = np.random.default_rng(1)
    shapes = [(2, 6, 16), (2, 5, 24), (2, 20), (2,), (6, 3), (5, 3), (2,)]
    given = [draws.uniform(0, 1, shape).astype(np.float32) for shape in shapes]

    def objective(parameters: dict) -> mx.array:
        ours.update(parameters)
        return mx.square(ours(*map(mx.array, given)) - 1).mean()

    found = dict(tree_flatten(mx.grad(objective)(ours.trainable_parameters())))
    (theirs(*map(torch.from_numpy, given), return_dict=False)[0] - 1).square().mean().backward()
    for name, parameter in theirs.named_parameters():
        expected = parameter.grad.numpy()
        assert np.abs(np.array(found[name]) - expected).max() / np.abs(expected).max() <= 1e-4, name


@pytest.mark.parametrize("name", ["schnell", "dev"])
def test_full_size_has_the_published_keys_and_shapes(name: str) -> None:
    """12 billion parameters, of which none is computed: ours are lazy, theirs on the meta device."""
    settings = {"guidance_embeds": name == "dev"}
    with torch.device("meta"):
        theirs = diffusers.FluxTransformer2DModel(**settings)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    ours = FluxTransformer(FluxTransformerConfig(**settings))
    shapes = {key: tuple(value.shape) for key, value in tree_flatten(ours.parameters())}
    assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert sum(map(np.prod, shapes.values())) > 11.8e9
    assert mx.get_peak_memory() - before < 2**20


@pytest.mark.parametrize("steps", [1, 4, 14, 28, 50])
@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096, 4608])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shift": 3.0},
        {"use_dynamic_shifting": True, "shift": 3.0},
        {"use_dynamic_shifting": True, "max_shift": 2.0},
    ],
)
def test_sigmas_agree_bit_for_bit(steps: int, tokens: int, settings: dict) -> None:
    ours = FlowMatchSchedule(**settings)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(ours.to_dict())
    mu = calculate_shift(tokens, ours.base_image_seq_len, ours.max_image_seq_len, ours.base_shift, ours.max_shift)
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    np.testing.assert_array_equal(ours.sigmas(steps, tokens), theirs.sigmas.numpy())
    assert FlowMatchSchedule.from_dict(dict(theirs.config)) == ours


def test_euler_step_agrees() -> None:
    schedule = FlowMatchSchedule(shift=3.0)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(schedule.to_dict())
    theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / 5, 5))
    levels = schedule.sigmas(5, 16).tolist()
    start, velocity = np.random.default_rng(0).standard_normal((2, 1, 8, 4)).astype(np.float32)
    ours, reference = mx.array(start), torch.from_numpy(start)
    for index, time in enumerate(theirs.timesteps):
        ours = euler_step(ours, mx.array(velocity), levels[index], levels[index + 1])
        reference = theirs.step(torch.from_numpy(velocity), time, reference, return_dict=False)[0]
    np.testing.assert_allclose(ours, reference.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [(2, 2), (4, 6), (8, 2)])
def test_packing_and_positions_agree(size: tuple[int, int]) -> None:
    height, width = size
    latents = np.random.default_rng(0).standard_normal((2, 5, height, width)).astype(np.float32)
    expected = FluxPipeline._pack_latents(torch.from_numpy(latents), 2, 5, height, width)
    found = pack(mx.array(latents.transpose(0, 2, 3, 1)))
    np.testing.assert_array_equal(found, expected.numpy())
    back = FluxPipeline._unpack_latents(expected, height * 8, width * 8, 8).numpy()
    np.testing.assert_array_equal(unpack(found, height, width), back.transpose(0, 2, 3, 1))
    ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, "cpu", torch.float32)
    np.testing.assert_array_equal(image_ids(height, width), ids.numpy())
