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
    Without the extension the function is returned unchanged. It is called as it is where MLX compiles nothing: after
    `mx.disable_compile()`, and without g++.

    Args:
        captured: `inputs` and `outputs` of `mx.compile`.
    """
    if not is_cpu():
        return mx.compile(function, **captured)
    if (module := native()) is None:
        return function
    traced = mx.compile(function, **captured)

    def call(*arguments: Any) -> Any:
        if not _enabled():
            return function(*arguments)
        module.set_compile_mode(module.CompileMode.no_fuse)
        try:
            return traced(*arguments)
        finally:
            module.set_compile_mode(module.CompileMode.enabled)

    return call


_traces = 0


def _count(x: mx.array) -> mx.array:
    global _traces
    _traces += 1
    return -x


_counted = mx.compile(_count)


def _enabled() -> bool:
    """Whether MLX compiles now, for which it has no query."""
    for _ in range(3):  # MLX traces a function once in each thread, and may trace the first one of a process twice
        before = _traces
        _counted(mx.array(0.0))
        if _traces == before:
            return True
    return False
