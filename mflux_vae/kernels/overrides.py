"""Functions of arrays that also take what stands in for an array: a large image that is computed in strips.

The idea is NumPy's `__array_function__` (NEP 18): a function that networks call is marked `overridable`, and an
argument whose class has `__mlx_function__(function, arguments, named)` answers the call itself. The marks say what
such a class must know: which functions treat every element alone (`pointwise`), and that all others may look at
every pixel. Convolution, group norm and `upsample_nearest_2x` it knows by name.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def overridable(function: F) -> F:
    """Let an argument that stands in for an array answer the call."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for arg in args:
            if hasattr(type(arg), "__mlx_function__"):
                return arg.__mlx_function__(call, args, kwargs)
        return function(*args, **kwargs)

    return cast(F, call)


def pointwise(function: F) -> F:
    """`overridable`, and every element of the result depends on the elements at the same (H, W) alone."""
    call = overridable(function)
    call.is_pointwise = True  # type: ignore[attr-defined]
    return call


def is_pointwise(function: Callable[..., Any]) -> bool:
    """Whether a function was marked `pointwise`."""
    return getattr(function, "is_pointwise", False)
