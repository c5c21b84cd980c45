"""Element-wise formulas: on Metal and CUDA one kernel, float32 inside, arguments alone kept for the backward pass.

MLX fuses nothing outside of `mx.compile`, and inside it every intermediate result has the dtype of the arguments, and
the backward pass keeps most of them: GELU in bfloat16 would lose 1.4 % of its negative values, and keep 17 numbers per
token and width in a feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar, cast

import mlx.core as mx

from mflux_vae.runtime import device

F = TypeVar("F", bound=Callable[..., mx.array])

_custom_function: Any = mx.custom_function  # MLX's stubs type its result as `object`


def widened(formula: F, *, shapeless: bool = False) -> F:
    """A formula of element-wise operations and norms: float32 inside, result in the dtype of the first array.

    On a CPU it runs as it is written. Elsewhere it is compiled.

    Its backward pass computes the formula again from the arguments. It depends on the cotangent, or the compilation of
    a training step would merge it with the forward pass, and keep all intermediate results.

    Args:
        shapeless: compile once for all shapes; only for formulas without broadcasting.
    """

    def wide(*arrays: mx.array) -> mx.array:
        return formula(*(array.astype(mx.float32) for array in arrays)).astype(arrays[0].dtype)

    run = _custom_function(mx.compile(wide, shapeless=shapeless))

    @run.vjp
    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> Any:
        arrays = list(primals) if isinstance(primals, Sequence) else [primals]
        gradients = mx.vjp(wide, mx.depends(arrays, [cotangent]), [cotangent])[1]
        return gradients if isinstance(primals, Sequence) else gradients[0]

    @wraps(formula)
    def call(*arrays: mx.array) -> mx.array:
        return wide(*arrays) if device.is_cpu() else cast(mx.array, run(*arrays))

    return cast(F, call)


def after(done: Sequence[mx.array], *arrays: mx.array) -> list[mx.array]:
    """The arrays, which MLX computes after those of `done`."""
    return list(mx.depends(list(arrays), list(done))) if done else list(arrays)
