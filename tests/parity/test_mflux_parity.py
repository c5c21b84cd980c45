"""The stand-in for `flux.vae` inside mflux's own pipeline: what comes out is what the VAE itself decodes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from PIL import Image

from mflux_vae import VAE, Tiling
from mflux_vae.integrations.mflux import MfluxVAE
from tests.mflux_vae.small_models import small_kl

pytestmark = pytest.mark.parity
pytest.importorskip("mflux")

HEIGHT, WIDTH, SEED, PROMPT = 64, 96, 3, "a star"


@pytest.fixture
def vae() -> VAE:
    network = small_kl(latent_channels=16, use_quant_conv=False, use_post_quant_conv=False)
    object.__setattr__(network.config, "scaling_factor", 0.3611)
    object.__setattr__(network.config, "shift_factor", 0.1159)
    return VAE(network=network)


@pytest.fixture
def flux(vae: VAE) -> Any:
    """mflux's Flux1 with its real transformer of no blocks; the prompt's embeddings are in its cache."""
    from mflux.callbacks.callback_registry import CallbackRegistry
    from mflux.models.common.config.model_config import ModelConfig
    from mflux.models.flux.model.flux_transformer.transformer import Transformer
    from mflux.models.flux.variants.txt2img.flux import Flux1

    flux = Flux1.__new__(Flux1)
    super(Flux1, flux).__init__()
    flux.model_config = ModelConfig.schnell()
    flux.callbacks, flux.tiling_config, flux.tokenizers = CallbackRegistry(), None, {"t5": None, "clip": None}
    flux.t5_text_encoder = flux.clip_text_encoder = None
    flux.bits, flux.lora_paths, flux.lora_scales = None, None, None
    flux.prompt_cache = {PROMPT: (mx.zeros((1, 8, 4096)), mx.zeros((1, 768)))}
    mx.random.seed(0)
    flux.transformer = Transformer(flux.model_config, num_transformer_blocks=0, num_single_transformer_blocks=0)
    flux.vae = vae.as_mflux()
    return flux


class Last:
    """A callback of mflux that keeps the latents."""

    def call_before_loop(self, latents: mx.array, **_: Any) -> None:
        self.first = latents

    def call_after_loop(self, latents: mx.array, **_: Any) -> None:
        self.latents = latents


def generate(flux: Any, **changes: Any) -> tuple[np.ndarray, Last]:
    last = Last()
    flux.callbacks.register(last)
    made = flux.generate_image(seed=SEED, prompt=PROMPT, num_inference_steps=2, height=HEIGHT, width=WIDTH, **changes)
    return np.array(made.image), last


def own(vae: VAE, latents: mx.array) -> np.ndarray:
    """What the VAE makes of packed latents by itself, cut to 8 bits as mflux does it."""
    from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator

    image = vae.decode(FluxLatentCreator.unpack_latents(latents, HEIGHT, WIDTH))
    return np.array(image)[0].transpose(1, 2, 0)


def test_text_to_image(flux: Any, vae: VAE) -> None:
    picture, last = generate(flux)
    assert picture.shape == (HEIGHT, WIDTH, 3) and picture.std() > 1
    assert np.abs(picture - own(vae, last.latents)).max() <= 1


def test_image_to_image(flux: Any, vae: VAE, tmp_path: Path) -> None:
    given = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(given).save(tmp_path / "given.png")
    picture, last = generate(flux, image_path=tmp_path / "given.png", image_strength=0.5)
    assert np.abs(picture - own(vae, last.latents)).max() <= 1

    from mflux.models.flux.latent_creator.flux_latent_creator import FluxLatentCreator

    noise = FluxLatentCreator.create_noise(SEED, HEIGHT, WIDTH)
    clean = FluxLatentCreator.pack_latents(vae.encode(mx.array(given.transpose(2, 0, 1)[None])), HEIGHT, WIDTH)
    np.testing.assert_allclose(last.first, 0.5 * clean + 0.5 * noise, atol=1e-4)


def test_asked_for_tiles_it_still_gives_the_picture_of_one_piece(flux: Any, vae: VAE) -> None:
    from mflux.models.common.vae.tiling_config import TilingConfig
    from mflux.models.common.vae.vae_util import VAEUtil

    plain, last = generate(flux)
    flux.tiling_config = TilingConfig(vae_decode_tile_size=32, vae_decode_overlap=1, vae_encode_tile_size=32)
    tiled, _ = generate(flux)
    assert np.array_equal(plain, tiled)
    flux.vae = vae.as_mflux(tiling=Tiling("exact", tile=64))
    pieces, _ = generate(flux)
    assert np.abs(pieces.astype(int) - plain).max() <= 1
    # mflux's tiles work, too, for those who insist: their tones differ, as each has its own statistics
    flux.vae.decode_mode = "legacy"
    foreign, _ = generate(flux)
    assert foreign.shape == plain.shape and 0 < np.abs(foreign - own(vae, last.latents)).mean() < 40
    image = mx.random.uniform(-1, 1, (1, 3, HEIGHT, WIDTH))
    assert VAEUtil.encode(flux.vae, image, flux.tiling_config).shape == (1, 16, 1, HEIGHT // 8, WIDTH // 8)


def test_it_has_every_public_member_of_mfluxs_own(flux: Any) -> None:
    from mflux.models.flux.model.flux_vae.vae import VAE as Own

    members = {name for name in vars(Own) if not name.startswith("_")} - {"pid_variant"}
    assert members >= {"encode", "decode", "latent_channels", "spatial_scale", "scaling_factor", "shift_factor"}
    stand_in = flux.vae
    assert isinstance(stand_in, MfluxVAE) and all(hasattr(stand_in, name) for name in members)
    for name in ("latent_channels", "spatial_scale", "scaling_factor", "shift_factor"):
        assert getattr(stand_in, name) == getattr(Own, name)
    stand_in.freeze()
    assert tree_flatten(stand_in.parameters()) and not tree_flatten(stand_in.trainable_parameters())
