"""Compare the CPU convolution algorithms on shapes of autoencoders.

    python -m benchmarks.convolutions [--rounds 5]

Prints milliseconds per algorithm (medians of alternating runs) and stars the one that
`mflux_vae.kernels.cpu.conv_algorithms` chooses. Change its rule if a starred time is far from the smallest.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import get_args
from unittest.mock import patch

import mlx.core as mx

from benchmarks.harness.machine import describe
from mflux_vae.kernels import conv2d
from mflux_vae.kernels.cpu import conv_algorithms, conv_parallel
from mflux_vae.runtime import device

SHAPES = (
    # batch, side, channels, output channels, kernel, stride
    (1, 256, 3, 128, 3, 1),
    (1, 256, 128, 128, 3, 1),
    (1, 256, 128, 128, 3, 2),
    (1, 256, 128, 3, 3, 1),
    (1, 128, 256, 256, 3, 1),
    (1, 64, 512, 512, 3, 1),
    (1, 32, 512, 512, 3, 1),
    (1, 16, 512, 512, 3, 1),
    (8, 64, 16, 16, 3, 1),
    (8, 64, 16, 32, 3, 2),
    (8, 32, 32, 32, 3, 1),
    (8, 16, 64, 64, 3, 1),
    (8, 8, 96, 96, 3, 1),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="runs of each algorithm (default: 5)")
    rounds = parser.parse_args(argv).rounds
    if not device.is_cpu():
        print("GPU: all convolutions are MLX's own; nothing to compare")
        return 0
    names = get_args(conv_algorithms.Algorithm)
    print(describe())
    print(f"{'B side C O k s':24}" + "".join(f"{name:>17}" for name in names))
    for batch, side, channels, out, kernel, stride in SHAPES:
        x = mx.random.normal((batch, side, side, channels), key=mx.random.key(0))
        weight = mx.random.normal((out, kernel, kernel, channels), key=mx.random.key(1))
        mx.eval(x, weight)
        chosen = conv_algorithms.choose_algorithm(
            (kernel, kernel), stride, channels, out, batch * (side // stride) ** 2
        )
        # the other algorithms need stride 1
        possible = [name for name in names if stride == 1 or name in ("im2col", "native")]
        runs = {name: partial(_run_with, name, x, weight, stride) for name in possible}
        times = _alternate(runs, rounds)
        marks = {name: "*" if name == chosen else " " for name in times}
        cells = [f"{times[name]:.2f}{marks[name]}" if name in times else "" for name in names]
        print(f"{f'{batch} {side} {channels} {out} {kernel} {stride}':24}" + "".join(f"{cell:>17}" for cell in cells))
    return 0


def _run_with(algorithm: str, x: mx.array, weight: mx.array, stride: int) -> None:
    with (
        patch.object(conv_algorithms, "choose_algorithm", lambda *_: algorithm),
        patch.object(conv_parallel, "choose_algorithm", lambda *_: algorithm),
    ):
        mx.eval(conv2d(x, weight, stride=stride, padding=1))


def _alternate(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median milliseconds per algorithm; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if round_:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(runs_ms) for name, runs_ms in times.items()}


if __name__ == "__main__":
    sys.exit(main())
