"""The smallest pipeline that keeps the whole contract: 16 px, a few hundred weights, milliseconds.

Latents are the image averaged over squares of 4 px, conditioning is a hash of the prompt, the denoiser a
two-layer perceptron over single latent pixels, trained by rectified flow. It learns colours of places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import mflux_vae.runtime.device  # noqa: F401  (opens a fast BLAS before MLX is used)
from mflux_vae.errors import SettingsError
from mflux_vae_train.pipelines.capabilities import Use
from mflux_vae_train.pipelines.noise import NoiseSampling, Prediction
from mflux_vae_train.pipelines.protocol import Conditioning, Recommended

POOL = 4
WORDS = 8


class FakeDenoiser(nn.Module):
    """Velocity of a latent pixel from its value, its place, the prompt and the time."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.proj_in = nn.Linear(3 + 2 + WORDS + 1, width)
        self.blocks = [{"to_out": nn.Linear(width, width)}]
        self.proj_out = nn.Linear(width, 3)

    def __call__(self, latents: mx.array, embedding: mx.array, time: mx.array) -> mx.array:
        batch, height, width, _ = latents.shape
        rows = mx.broadcast_to(mx.linspace(-1, 1, height)[None, :, None, None], (batch, height, width, 1))
        columns = mx.broadcast_to(mx.linspace(-1, 1, width)[None, None, :, None], (batch, height, width, 1))
        said = mx.broadcast_to(embedding[:, None, None], (batch, height, width, WORDS))
        when = mx.broadcast_to(time[:, None, None, None], (batch, height, width, 1))
        hidden = nn.relu(self.proj_in(mx.concatenate([latents, rows, columns, said, when], axis=-1)))
        for block in self.blocks:
            hidden = hidden + nn.relu(block["to_out"](hidden))
        return self.proj_out(hidden)


class FakePipeline:
    """Counts what it was asked, so that tests can see what a trainer did and did not do."""

    name = "fake"
    adapter_prefix = "transformer"
    recommended = Recommended(
        resolution=16,
        size_multiple=POOL,
        learning_rate=2e-2,
        learning_rate_full=1e-2,
        guidance=1.5,
        steps=3,
        rank=2,
        caption_dropout=0.1,
        prior_loss_weight=0.5,
        weighting_scheme="uniform",
    )

    def __init__(self, seed: int = 0) -> None:
        self.denoiser = FakeDenoiser()
        draws = np.random.default_rng(seed)
        for name in ("proj_in", "proj_out"):
            layer = getattr(self.denoiser, name)
            layer.weight = mx.array(draws.normal(0, 0.3, layer.weight.shape).astype(np.float32))
            layer.bias = mx.zeros_like(layer.bias)
        out = self.denoiser.blocks[0]["to_out"]
        out.weight = mx.array(draws.normal(0, 0.2, out.weight.shape).astype(np.float32))
        out.bias = mx.zeros_like(out.bias)
        self.prompts_encoded: list[str] = []
        self.images_sampled = 0
        self.images_encoded = 0

    def encoder_fingerprint(self, use: Use) -> str:
        return f"fake {use} {POOL} {WORDS}"

    def encode_images(self, pixels: mx.array) -> mx.array:
        self.images_encoded += pixels.shape[0]
        batch, height, width, _ = pixels.shape
        squares = pixels.reshape(batch, height // POOL, POOL, width // POOL, POOL, 3)
        return squares.mean(axis=(2, 4))

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        self.prompts_encoded += prompts
        rows = [np.frombuffer(hashlib.sha256(prompt.encode()).digest()[:WORDS], np.uint8) for prompt in prompts]
        return {"embedding": mx.array(np.stack(rows).astype(np.float32) / 128 - 1)}

    def loss(self, latents: mx.array, conditioning: Conditioning, *, key: mx.array, guidance: float) -> mx.array:
        return self.predict(latents, conditioning, key=key, guidance=guidance).loss()

    def predict(
        self,
        latents: mx.array,
        conditioning: Conditioning,
        *,
        key: mx.array,
        guidance: float,
        sampling: NoiseSampling | None = None,
    ) -> Prediction:
        def draw(one: mx.array) -> tuple[mx.array, mx.array]:
            for_noise, for_time = mx.random.split(one)
            return mx.random.normal(latents.shape[1:], key=for_noise), mx.random.uniform(key=for_time)

        if sampling is not None and sampling.scheme not in ("uniform", "sigma_sqrt"):
            raise SettingsError(f"the fake pipeline has no weighting scheme {sampling.scheme}")
        noise, time = mx.vmap(draw)(key)
        time = mx.maximum(time, 0.01)
        mixed = latents + time[:, None, None, None] * (noise - latents)
        velocity = self.denoiser(mixed, conditioning["embedding"], time)
        squared = sampling is not None and sampling.scheme == "sigma_sqrt"
        return Prediction(velocity, noise - latents, time**-2 if squared else mx.ones_like(time), time)

    def sample(
        self, conditioning: Conditioning, *, size: tuple[int, int], steps: int, guidance: float, key: mx.array
    ) -> mx.array:
        said = conditioning["embedding"]
        self.images_sampled += said.shape[0]
        unsaid = mx.broadcast_to(self.encode_prompts([""])["embedding"], said.shape)
        shape = (size[0] // POOL, size[1] // POOL, 3)
        latents = mx.vmap(lambda one: mx.random.normal(shape, key=one))(key)
        for step in range(steps):
            time = mx.full((said.shape[0],), 1 - step / steps)
            plain = self.denoiser(latents, unsaid, time)
            velocity = plain + guidance * (self.denoiser(latents, said, time) - plain)
            latents = latents - velocity / steps
        return mx.repeat(mx.repeat(latents, POOL, axis=1), POOL, axis=2)

    def lora_targets(self) -> Sequence[str]:
        return ["proj_in", "blocks.*.to_out"]
