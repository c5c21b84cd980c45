"""Z-Image's transformer against diffusers, live, in float32, with captions of several lengths in a batch."""

from __future__ import annotations

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

import mlx.core as mx  # noqa: E402
from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from mflux_vae.pretrained.loading import new_network  # noqa: E402
from mflux_vae.weights.keymaps.rules import to_mlx  # noqa: E402
from mflux_vae_train.pipelines.z_image import keys  # noqa: E402
from mflux_vae_train.pipelines.z_image.transformer import ZImageTransformer, ZImageTransformerConfig  # noqa: E402
from tests.mflux_vae_train.pipelines.flux1.small_flux import drawn  # noqa: E402
from tests.mflux_vae_train.pipelines.z_image.small_z_image import small_config  # noqa: E402

TIMES = np.array([0.03, 0.87, 0.5], np.float32)


def theirs_of(ours: ZImageTransformer):
    """diffusers' model with the same configuration and weights; strict, so the keys are the same, too."""
    settings = {key: value for key, value in ours.config.to_dict().items() if key != "_class_name"}
    model = diffusers.ZImageTransformer2DModel(**settings)
    state = {key: torch.from_numpy(np.array(value)) for key, value in tree_flatten(ours.parameters())}
    model.load_state_dict(state, strict=True)
    return model.eval()


def given_of(config: ZImageTransformerConfig, size: tuple[int, int], lengths: list[int], longest: int):
    draws = np.random.default_rng(0)
    latents = draws.standard_normal((len(lengths), *size, config.in_channels)).astype(np.float32)
    captions = draws.standard_normal((len(lengths), longest, config.cap_feat_dim)).astype(np.float32)
    return latents, TIMES[: len(lengths)], captions, np.array(lengths, np.int32)


def run_theirs(model, latents, times, captions, lengths, *, together: bool = False):
    """Images (B, H, W, C), one after the other or as one batch."""
    images = [torch.from_numpy(one.transpose(2, 0, 1)[:, None].copy()) for one in latents]
    texts = [torch.from_numpy(caption[:length]) for caption, length in zip(captions, lengths, strict=True)]
    time = torch.from_numpy(times)
    if together:
        outputs = model(images, time, texts, return_dict=False)[0]
    else:
        rows = zip(images, time[:, None], texts, strict=True)
        outputs = [model([image], one, [text], return_dict=False)[0][0] for image, one, text in rows]
    return torch.stack([one[:, 0].permute(1, 2, 0) for one in outputs])


def close(found, expected) -> None:
    assert found.shape == expected.shape
    assert np.abs(np.array(found) - expected).max() / np.abs(expected).max() <= 1e-4


@pytest.mark.parametrize(
    ("size", "lengths", "longest"),
    [((4, 4), [7, 20, 32], 32), ((8, 16), [5, 33, 70], 96), ((10, 6), [40, 3, 64], 70), ((4, 6), [12], 128)],
    ids=str,
)
def test_transformer_agrees(size: tuple[int, int], lengths: list[int], longest: int) -> None:
    ours = drawn(ZImageTransformer(small_config()), 11)
    theirs = theirs_of(ours)
    given = given_of(ours.config, size, lengths, longest)
    with torch.no_grad():
        expected = run_theirs(theirs, *given).numpy()
        together = run_theirs(theirs, *given, together=True).numpy()
    close(together, expected)
    close(ours(*map(mx.array, given)), expected)


def test_gradients_agree() -> None:
    ours = drawn(ZImageTransformer(small_config(n_layers=3, n_refiner_layers=2)), 11)
    theirs = theirs_of(ours)
    given = given_of(ours.config, (6, 4), [5, 33, 70], 96)

    def objective(parameters: dict, latents: mx.array, captions: mx.array) -> mx.array:
        ours.update(parameters)
        times, lengths = mx.array(given[1]), mx.array(given[3])
        return mx.square(ours(latents, times, captions, lengths) - 1).mean()

    arrays = ours.trainable_parameters(), mx.array(given[0]), mx.array(given[2])
    of_weights, of_latents, of_captions = mx.grad(objective, argnums=(0, 1, 2))(*arrays)
    latents, captions = (torch.from_numpy(given[index]).requires_grad_() for index in (0, 2))
    images = [one.permute(2, 0, 1)[:, None] for one in latents]
    texts = [caption[:length] for caption, length in zip(captions, given[3], strict=True)]
    outputs = theirs(images, torch.from_numpy(given[1]), texts, return_dict=False)[0]
    (torch.stack([one[:, 0].permute(1, 2, 0) for one in outputs]) - 1).square().mean().backward()
    close(of_latents, latents.grad.numpy())
    close(of_captions, captions.grad.numpy())
    found = dict(tree_flatten(of_weights))
    for name, parameter in theirs.named_parameters():
        expected = parameter.grad.numpy()
        assert np.abs(np.array(found[name]) - expected).max() / np.abs(expected).max() <= 1e-4, name


def test_full_size_has_the_published_keys_and_shapes_in_both_namings() -> None:
    """6 billion parameters, of which none is computed: ours are lazy, theirs on the meta device."""
    with torch.device("meta"):
        theirs = diffusers.ZImageTransformer2DModel(axes_lens=(1536, 512, 512))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    ours = dict(tree_flatten(ZImageTransformer(ZImageTransformerConfig()).parameters()))
    shapes = {key: tuple(value.shape) for key, value in ours.items()}
    assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert sum(map(np.prod, shapes.values())) == 6_154_908_736
    assert mx.get_peak_memory() - before < 2**20

    stored = {f"model.diffusion_model.{key}": value for key, value in keys.to_single_file(ours).items()}
    single = {key: torch.empty(value.shape, device="meta") for key, value in stored.items()}
    converted = convert_z_image_transformer_checkpoint_to_diffusers(single)
    assert {key: tuple(value.shape) for key, value in converted.items()} == shapes


def test_a_single_file_is_converted_as_in_diffusers() -> None:
    ours = dict(tree_flatten(drawn(ZImageTransformer(small_config()), 3).parameters()))
    stored = keys.to_single_file(ours)
    theirs = convert_z_image_transformer_checkpoint_to_diffusers(
        {key: torch.from_numpy(np.array(value)) for key, value in stored.items()}
    )
    found = keys.our_names(stored)
    assert found.keys() == theirs.keys() == ours.keys()
    assert all(np.array_equal(found[key], theirs[key].numpy()) for key in found)


def test_mfluxs_networks_have_our_keys_and_shapes_once_renamed() -> None:
    pytest.importorskip("mflux.models.z_image")
    from mflux.models.z_image.model.z_image_transformer.transformer import ZImageTransformer as MfluxTransformer
    from mflux.models.z_image.model.z_image_vae.vae import VAE

    def shapes(tensors) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    theirs, vae = (dict(tree_flatten(network.parameters())) for network in (MfluxTransformer(), VAE()))
    ours = dict(tree_flatten(ZImageTransformer(ZImageTransformerConfig()).parameters()))
    assert keys.is_z_image(theirs) and shapes(keys.our_names(theirs)) == shapes(ours)
    published = dict(tree_flatten(new_network("z-image").parameters()))
    assert shapes(to_mlx(vae, keys.MFLUX_VAE)) == shapes(published)
