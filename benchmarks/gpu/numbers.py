"""Errors in half precision: convolutions, activations, autoencoders, text encoders; against float32 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map

from benchmarks.gpu.figures import NONE, Figures, on_cpu, peak_bytes, rms_error, seconds, section
from benchmarks.harness.rows import Work
from mflux_vae import VAE, kernels
from mflux_vae.kernels import gpu_conv
from mflux_vae.pretrained.loading import new_network
from mflux_vae_train.pipelines.flux1.configs import CLIP_L
from mflux_vae_train.pipelines.text import clip, t5

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
ROUNDING = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.03}
"""Error (%) that rounding the result explains. TF32 (CUDA, M5) has some 0.03 in float32."""

AUTOENCODERS = (
    ("float32", mx.float32, False),
    ("bfloat16", mx.bfloat16, False),
    ("bfloat16 activations, MLX's convolution", mx.bfloat16, True),
)


def convolution(quick: bool) -> Work:
    """A 3x3 convolution of a size for which Metal takes Winograd's F(6x6, 3x3)."""
    side, channels = (16, 128) if quick else (64, 256)
    keys = mx.random.split(mx.random.key(0), 2)
    x = mx.random.normal((1, side, side, channels), key=keys[0])
    weight = mx.random.normal((channels, 3, 3, channels), key=keys[1])

    def figures() -> Figures:
        found = {}
        for name, dtype in DTYPES.items():
            a, b = x.astype(dtype), weight.astype(dtype)
            with on_cpu():
                exact = mx.conv2d(a.astype(mx.float32), b.astype(mx.float32), padding=1)
                mx.eval(exact)
            found[f"{name}: error (%)"] = rms_error(kernels.conv2d(a, b, padding=1), exact), ROUNDING[name]
            found[f"{name}: error of mx.conv2d (%)"] = rms_error(mx.conv2d(a, b, padding=1), exact), NONE
        return found

    return section(figures)


def weight_gradient(quick: bool) -> Work:
    """Gradient of a 3x3 convolution for its weight: by parts, and by MLX, which gathers all windows."""
    side, channels = (16, 32) if quick else (256, 128)
    x, dy = (mx.random.normal((1, side, side, channels), key=mx.random.key(n)) for n in range(2))
    weight = mx.zeros((channels, 3, 3, channels))

    def gradient(convolve: Callable[..., mx.array]) -> mx.array:
        return mx.vjp(lambda w: convolve(x, w, padding=1), [weight], [dy])[1][0]

    def figures() -> Figures:
        mx.eval(x, dy, weight)
        runs = {"ours": partial(gradient, kernels.conv2d), "MLX": partial(gradient, mx.conv2d)}
        found = {"difference (%)": (rms_error(*(run() for run in runs.values())), 0.1)}
        for name, run in runs.items():
            found[f"{name}: peak MB"] = peak_bytes(run) / 2**20, NONE
            found[f"{name}: ms"] = 1e3 * seconds(run), NONE
        return found

    return section(figures)


def activations(quick: bool) -> Work:
    """Mean errors in bfloat16 on [-6, 6], relative to that of the rounded exact value."""
    values = mx.linspace(-6, 6, 1_000 if quick else 100_000).astype(mx.bfloat16)
    x = np.array(values.astype(mx.float32), np.float64)
    exact = {
        "silu": x / (1 + np.exp(-x)),
        "quick_gelu": x / (1 + np.exp(-1.702 * x)),
        "gelu_tanh": 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
        "sigmoid": 1 / (1 + np.exp(-x)),
        "tanh": np.tanh(x),
    }

    def error(computed: mx.array, y: np.ndarray) -> float:
        return float(np.abs(np.array(computed.astype(mx.float32), np.float64) - y).mean())

    def figures() -> Figures:
        return {
            f"{name}: error, in errors of rounding": (
                error(getattr(kernels, name)(values), y) / error(mx.array(y, mx.bfloat16), y),
                1.05,
            )
            for name, y in exact.items()
        }

    return section(figures)


def autoencoder(quick: bool, weights: str | None) -> Work:
    """Stable Diffusion's autoencoder, or that of `weights`: errors of latents and their images, and seconds."""
    side, timed = (32, 32) if quick else (128, 512)
    mx.random.seed(0)
    vae = VAE(network=new_network("tiny" if quick else "sd1")) if weights is None else VAE.from_pretrained(weights)
    network = vae.network
    full = tree_map(lambda array: array.astype(mx.float32), network.parameters())
    coarse = mx.random.uniform(0, 255, (1, 3, side // 8, side // 8), key=mx.random.key(1))
    image, large = (
        mx.repeat(mx.repeat(coarse, size * 8 // side, axis=2), size * 8 // side, axis=3) for size in (side, timed)
    )

    def results(picture: mx.array) -> dict[str, Callable[[], mx.array]]:
        latents = vae.encode(picture, tiling=False)
        mx.eval(latents)
        return {
            "encode": lambda: vae.encode(picture, tiling=False),
            "decode": lambda: vae.decode(latents, tiling=False),
        }

    def figures() -> Figures:
        found = {}
        for name, dtype, native in AUTOENCODERS:
            rounded = tree_map(lambda array, dtype=dtype: array.astype(dtype), full)
            network.update(tree_map(lambda array: array.astype(mx.float32), rounded)).eval()
            with on_cpu():
                exact = {what: run() for what, run in results(image).items()}
                mx.eval(exact)
            network.update(rounded)
            network.train(native)  # then activations have the dtype of the weights
            with _mlx_convolutions(native):
                for what, run in results(image).items():
                    found[f"{what}, {name}: error (%)"] = rms_error(run(), exact[what]), NONE if native else 0.5
                for what, run in results(large).items():
                    found[f"{what} {timed} px, {name}: seconds"] = seconds(run), NONE
        return found

    return section(figures)


@contextmanager
def _mlx_convolutions(native: bool) -> Iterator[None]:
    """Within the block, convolutions in half precision are MLX's, without float32."""
    before = gpu_conv.conv2d
    gpu_conv.conv2d = gpu_conv.mlx_conv2d if native else before
    try:
        yield
    finally:
        gpu_conv.conv2d = before


def text_encoders(quick: bool) -> Work:
    """CLIP with its causal mask, T5's attention with bias and mask: forward passes in bfloat16."""
    layers, length, width, heads = (1, 16, 64, 2) if quick else (CLIP_L.num_hidden_layers, 256, 1024, 64)
    text = clip.CLIPTextModel(replace(CLIP_L, vocab_size=99, num_hidden_layers=layers))
    clip.init_weights(text, mx.random.key(0))
    prompt = t5.T5Encoder(t5.T5Config(vocab_size=99, d_model=width, d_kv=64, d_ff=width, num_layers=1, num_heads=heads))
    t5.init_weights(prompt, mx.random.key(1))
    tokens = mx.random.randint(0, 99, (2, length), key=mx.random.key(2))
    seen = (mx.arange(length) < length // 2).astype(mx.int32)[None]
    clip_tokens = tokens[:, : min(length, 77)]
    runs: dict[str, tuple[nn.Module, Callable[[], mx.array]]] = {
        "CLIP-L": (text, lambda: text(clip_tokens)[0]),
        "T5, masked": (prompt, partial(prompt, tokens, mx.broadcast_to(seen, tokens.shape))),
    }

    def figures() -> Figures:
        found = {}
        for name, (network, run) in runs.items():
            with on_cpu():
                exact = run()
                mx.eval(exact)
            network.set_dtype(mx.bfloat16)
            found[f"{name}: error (%)"] = rms_error(run(), exact), 3.0
        return found

    return section(figures)
