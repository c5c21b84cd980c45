"""`mx.compile` that starts no C++ compiler on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mflux_vae.kernels.cpu.extension import native
from mflux_vae.runtime.device import is_cpu


def compile(function: Callable[..., Any], **captured: Any) -> Callable[..., Any]:
    """Trace a function once for each set of shapes.

    On a CPU `mx.compile` also fuses operations, for which it calls g++. The native extension traces without fusing.
    Without the extension, or where MLX finds no g++ and compiles nothing, the function is returned unchanged.

    Args:
        captured: `inputs` and `outputs` of `mx.compile`.
    """
    if not is_cpu():
        return mx.compile(function, **captured)
    if (module := native()) is None or not _enabled():
        return function
    traced = mx.compile(function, **captured)

    def call(*arguments: Any) -> Any:
        module.set_compile_mode(module.CompileMode.no_fuse)
        try:
            return traced(*arguments)
        finally:
            module.set_compile_mode(module.CompileMode.enabled)

    return call


def _enabled() -> bool:
    """Whether MLX compiles, for which it has no query: not after `mx.disable_compile()`, for example."""
    traces = 0

    def count(x: mx.array) -> mx.array:
        nonlocal traces
        traces += 1
        return -x

    counted = mx.compile(count)
    for _ in range(3):  # MLX may trace the first function of a process twice
        counted(mx.array(0.0))
    return traces < 3
