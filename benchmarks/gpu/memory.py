"""Peak memory and time: attention, blocks of FLUX at full width, decoding."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from benchmarks.gpu.figures import NONE, Figures, peak_bytes, seconds, section
from benchmarks.gpu.flux_stack import Stack, estimated, forward, updated
from benchmarks.harness.rows import Work
from mflux_vae import VAE, kernels
from mflux_vae.pretrained.loading import new_network

STACKS = {
    "": Stack(double=1, single=2, side=64, text=512),
    ", checkpointed": Stack(double=1, single=2, side=64, text=512, recompute=True),
    ", 4 bits, checkpointed": Stack(double=1, single=2, side=64, text=512, recompute=True, bits=4),
}


def attention(quick: bool) -> Work:
    """What a layer keeps between the passes, in units of its queries: no term that grows with tokens squared.

    cuDNN's backward pass takes multiples of 128 tokens, hence two times.
    """
    heads, tokens, width = (2, 128, 64) if quick else (24, 1536, 128)
    q, k, v = (mx.random.normal((1, heads, tokens, width), key=mx.random.key(n)).astype(mx.bfloat16) for n in range(3))

    def passes(layers: int, count: int = tokens) -> mx.array:
        def loss(q: mx.array) -> mx.array:
            for _ in range(layers):
                q = kernels.attention(q, k[:, :, :count], v[:, :, :count], scale=width**-0.5)
            return q.astype(mx.float32).sum()

        return mx.grad(loss)(q[:, :, :count])

    def figures() -> Figures:
        mx.eval(q, k, v)
        kept = (peak_bytes(lambda: passes(9)) - peak_bytes(lambda: passes(5))) / 4
        times = {count: seconds(lambda count=count: passes(1, count)) for count in (tokens, tokens - 10)}
        return {
            f"kept at {tokens} tokens, in units of the queries": (kept / q.nbytes, NONE if quick else 3.0),
            "with kept scores it would be": (1 + tokens / width, NONE),
            **{f"forward and backward, {count} tokens: ms": (1e3 * time, NONE) for count, time in times.items()},
        }

    return section(figures)


def training(quick: bool) -> Work:
    """A LoRA on a double and two single blocks: peak against the estimate, seconds for an update."""

    def figures() -> Figures:
        found = {}
        for name, stack in STACKS.items():
            stack = replace(stack, heads=2, side=8, text=16) if quick else stack
            peak, update = updated(stack)
            found[f"peak{name}: MB"] = peak / 2**20, NONE
            found[f"peak{name}: off the estimate by (%)"] = 100 * abs(peak / estimated(stack) - 1), 15
            found[f"an update{name}: seconds"] = update, NONE
        return found

    return section(figures)


def sampling(quick: bool) -> Work:
    """A forward pass of a double and two single blocks, as it is and compiled as a whole."""
    stack = replace(STACKS[""], heads=2, side=8, text=16) if quick else STACKS[""]

    def figures() -> Figures:
        run = forward(stack)
        kinds = {"as it is": run, "compiled": mx.compile(run)}
        return {f"{name}: ms": (1e3 * seconds(kind, 5), NONE) for name, kind in kinds.items()}

    return section(figures)


def small_graphs(quick: bool) -> Work:
    """Two updates of many blocks in graphs of 20 operations, which fill CUDA's cache of graphs."""
    stack = Stack(double=1, single=1, heads=2, side=8, text=16) if quick else Stack(double=8, single=16, heads=4)
    return section(lambda: {"an update: seconds": (updated(stack)[1], NONE)})


def decoding(quick: bool) -> Work:
    """Decode with Stable Diffusion's autoencoder, untiled: peak against the estimate."""
    side = 64 if quick else 1024
    mx.random.seed(0)
    vae = VAE(network=new_network("tiny" if quick else "sd1"))
    vae.eval()
    latents = mx.random.normal((1, vae.latent_channels, side // 8, side // 8), key=mx.random.key(0))
    mx.eval(vae.parameters(), latents)

    def figures() -> Figures:
        found = {}
        for name in ("float32", "bfloat16"):
            vae.set_dtype(getattr(mx, name))
            mx.eval(vae.parameters())
            peak = peak_bytes(lambda: vae.decode(latents, tiling=False))
            expected = vae.peak_bytes("decode", side, side, tiling=False)
            found[f"peak at {side} px, {name}: MB"] = peak / 2**20, NONE
            found[f"peak at {side} px, {name}: off the estimate by (%)"] = 100 * abs(peak / expected - 1), 20
        return found

    return section(figures)


def sizes(quick: bool) -> Work:
    """Encode images of 21 sizes, each with its 13 convolutions, which CUDA's cache has to hold."""
    vae = VAE(network=new_network("tiny" if quick else "sd1"))
    vae.eval()
    images = [mx.full((1, 3, 64 + 8 * n, 64), 128.0) for n in range(3 if quick else 21)]

    def encoded() -> list[mx.array]:
        return [vae.encode(image, tiling=False) for image in images]

    return section(lambda: {"a size: seconds": (seconds(encoded, 1) / len(images), NONE)})
