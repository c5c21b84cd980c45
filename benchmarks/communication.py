"""Bytes that processes send per update: counted, measured at the sockets, and computed for FLUX.1.

    python -m benchmarks.communication
    mlx.launch -n 2 -- python -m benchmarks.communication --measure

The first prints, for FLUX.1 and two processes, the bytes sent per update and the seconds that a network needs for them.
The network is the limit if an update computes faster. Bytes per update do not depend on the number of samples, so
accumulation makes up for a slow network. The second trains the embedded pipeline in a ring and compares the trainer's
count with the kernel's (Linux): 1,721,344 bytes counted for 1,720,320 of LoRA gradients; the kernel counts up to 1.4 %
more, without headers.

| FLUX.1, 2 processes | sent per update | Thunderbolt 5 | 10 GbE | 1 GbE | computing per 512 px image, 15 TFLOP/s |
|---|---|---|---|---|---|
| LoRA, rank 16 | 0.261 GB | 0.026 s | 0.21 s | 2.1 s | 2.9 s |
| all weights | 23.8 GB | 2.4 s | 19 s | 190 s | 4.3 s |
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mflux_vae_train import lora
from mflux_vae_train.distributed import process_group
from mflux_vae_train.distributed.watchdog import socket_descriptors
from mflux_vae_train.optimizers.adam import AdamW
from mflux_vae_train.pipelines import tiny
from mflux_vae_train.pipelines.flux1 import naming
from mflux_vae_train.pipelines.flux1.transformer import FluxTransformer, FluxTransformerConfig
from mflux_vae_train.randomness import Stream, sample_keys
from mflux_vae_train.training.step import MicroBatch, Step

RANK = 16
TARGETS = naming.PRESETS["attention+mlp"]
NETWORKS = {"Thunderbolt 5": 80e9, "10 GbE": 10e9, "1 GbE": 1e9}
"""Nominal bits per second. TCP reaches nearly all of Ethernet's, and of Thunderbolt's a half or less."""

TOKENS = 32 * 32 + 512
"""Of one picture of 512 x 512 pixels, with its prompt."""

SUSTAINED = 15e12
"""Floating point operations per second that are assumed of a large Apple GPU; no measurement."""

UPDATES = 3
_BYTES_SENT = 200
"""Where Linux's tcp_info has them."""


def ring_bytes(content: float, processes: int) -> float:
    """What each process of a ring sends to sum up so many bytes."""
    return 2 * (processes - 1) / processes * content


def flux_operations(config: FluxTransformerConfig) -> float:
    """Floating point operations of a forward pass, for one picture of `TOKENS`: matrix products of all blocks."""
    blocks, width = config.num_layers + config.num_single_layers, config.width
    return blocks * (2 * 12 * width**2 * TOKENS + 4 * TOKENS**2 * width)


def on_paper() -> Iterator[str]:
    """A row for each way of training FLUX.1-dev."""
    config = FluxTransformerConfig(guidance_embeds=True)
    model = FluxTransformer(config)  # nothing of it is computed
    adapter = RANK * sum(lora.matching(model, TARGETS).values())
    weights = sum(array.size for array in dict[str, Any](tree_flatten(model.parameters())).values())
    yield f"| FLUX.1, 2 processes | sent per update | {' | '.join(NETWORKS)} | computing, per picture of 512 px |"
    yield f"|---|---|{'---|' * len(NETWORKS)}---|"
    ways = [
        (f"LoRA, rank {RANK}", adapter, 4, 2),
        ("all weights", weights, 2, 3),
    ]
    for name, count, width, passes in ways:
        sent = ring_bytes(count * width, 2)
        seconds = " | ".join(f"{_told(8 * sent / rate)}" for rate in NETWORKS.values())
        computing = passes * flux_operations(config)
        size = f"{sent / 1e9:.3g} GB ({count / 1e6:,.0f} M numbers of {width} bytes)"
        yield f"| {name} | {size} | {seconds} | {computing / 1e12:.0f} TFLOP, {_told(computing / SUSTAINED)} |"


def _told(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 100 else f"{seconds:.0f} s"


def measured(processes: process_group.ProcessGroup) -> Iterator[str]:
    """A row for each way of training the embedded pipeline, of what this process sent per update."""
    yield f"| embedded pipeline, {processes.size} processes | gradients | counted | by the kernel | messages besides |"
    yield "|---|---|---|---|---|"
    for name in ("LoRA, rank 16", "all weights"):
        pipeline = tiny.load()
        denoiser: nn.Module = pipeline.denoiser
        if name == "all weights":
            denoiser.unfreeze()
        else:
            lora.add_lora(denoiser, pipeline.lora_targets(), rank=RANK, seed=0)
        keys = sample_keys(0, Stream.NOISE, 0, range(processes.size))
        latents = pipeline.encode_images(mx.zeros((1, 64, 64, 3)))
        conditioning = pipeline.encode_prompts(["a photo of a star"])

        def loss(model: nn.Module, arrays: Any) -> Any:
            return pipeline.loss(latents, conditioning, key=arrays["key"], guidance=1.0).mean(), {}  # noqa: B023

        step = Step(denoiser, AdamW(), loss, processes=processes)
        gradients = sum(
            array.nbytes for array in dict[str, Any](tree_flatten(denoiser.trainable_parameters())).values()
        )
        own = [MicroBatch(arrays={"key": keys[processes.rank : processes.rank + 1]}, weight=1)]
        with _kernel_count() as kernel:
            before = processes.bytes_sent
            for update in range(UPDATES):
                step(update, own, 1e-4)
            counted = (processes.bytes_sent - before) / UPDATES
        rest = counted - ring_bytes(gradients, processes.size)
        yield f"| {name} | {gradients:,} | {counted:,.0f} | {kernel[0] / UPDATES:,.0f} | {rest:,.0f} |"


@contextmanager
def _kernel_count() -> Iterator[list[int]]:
    """After the block, the bytes that this process's sockets sent in it."""
    counted = [-_sent()]
    yield counted
    counted[0] += _sent()


def _sent() -> int:
    total = 0
    for number in socket_descriptors():
        with suppress(OSError, struct.error), socket.socket(fileno=os.dup(number)) as connection:
            information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
            total += struct.unpack_from("<Q", information, _BYTES_SENT)[0]
    return total


def main() -> None:
    if "--measure" not in sys.argv[1:]:
        print("\n".join(on_paper()))
        return
    with process_group.join() as processes:
        lines = list(measured(processes))
        if processes.is_main:
            print("\n".join(lines))


if __name__ == "__main__":
    main()
