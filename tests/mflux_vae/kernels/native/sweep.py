"""Check every native operation on drawn shapes: `python -m tests.mflux_vae.kernels.native.sweep [COUNT]`."""

from __future__ import annotations

import sys

import mlx.core as mx

from tests.mflux_vae.kernels.native.cases import CASES, RandomDraw, check, native


def main(count: int) -> int:
    """Number of cases that fail."""
    mx.set_cache_limit(0)  # buffers of exactly the size of an array, whose ends a sanitizer watches
    failures = 0
    for case in CASES:
        for seed in range(count):
            try:
                check(case(RandomDraw(seed)), transposed=bool(seed % 2))
            except AssertionError as error:
                failures += 1
                print(f"{case.__name__}, seed {seed}: {error}", flush=True)
        arrays = [[mx.random.normal((size,)) for size in (0, 1, 7, 40_000)] for _ in range(4)]
        factors = mx.array([0.5, 0.9, 0.1, 1.0])
        mx.eval(native.adamw(*arrays[:3], [mx.abs(v) for v in arrays[3]], *factors, 0.9, 0.999, 1e-8))
        print(f"{case.__name__}: {count} drawn", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 100) > 0)
