"""Products with quantised weights, by MLX's kernel or dequantised first: time, and whether they repeat to the bit."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from benchmarks.gpu.figures import NONE, Figures, seconds, section
from benchmarks.harness.rows import Work
from mflux_vae_train.pipelines.quantization import quantize

ROWS = (512, 1536, 4096)


def quantized(quick: bool) -> Work:
    """A layer of FLUX in 4 bits, forward and gradient of its input. By the kind of `PRODUCT_VARIABLE`."""
    inputs, outputs, repetitions = (128, 256, 3) if quick else (3072, 12288, 100)
    network = nn.Module()
    network.layer = nn.Linear(inputs, outputs, bias=False)
    network.set_dtype(mx.bfloat16)
    quantize(network, 4, lambda path: path == "layer")
    layer = network.layer

    def figures() -> Figures:
        found = {}
        for rows in (16, 64) if quick else ROWS:
            keys = mx.random.split(mx.random.key(rows), 2)
            x = mx.random.normal((rows, inputs), key=keys[0]).astype(mx.bfloat16)
            slope = mx.random.normal((rows, outputs), key=keys[1]).astype(mx.bfloat16)
            mx.eval(x, slope)
            runs = {
                "forward": lambda x=x: layer(x),
                "backward": lambda x=x, slope=slope: mx.vjp(layer, [x], [slope])[1][0],
            }
            for name, run in runs.items():
                first = run()
                different = sum(not mx.array_equal(run(), first).item() for _ in range(repetitions))
                found[f"{rows} rows, {name}: ms"] = 1e3 * seconds(run, 5), NONE
                found[f"{rows} rows, {name}: of {repetitions} repetitions differ"] = different, 0
        return found

    return section(figures)
