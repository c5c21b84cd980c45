"""Let classes that stand in for arrays override array functions, such as images computed in strips.

The design follows NumPy's `__array_function__` (NEP 18). Functions that networks call are decorated with
`overridable`. If the class of an argument defines `__mlx_function__(function, args, kwargs)`, that method handles the
call. Functions decorated with `pointwise` depend on one pixel at a time; all others may read every pixel, except those
that a class handles by name (convolution, group norm, `upsample_nearest_2x`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])


def overridable(function: F) -> F:
    """Dispatch to the first argument whose class defines `__mlx_function__`."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        for arg in args:
            if hasattr(type(arg), "__mlx_function__"):
                return arg.__mlx_function__(call, args, kwargs)
        return function(*args, **kwargs)

    return cast(F, call)


def pointwise(function: F) -> F:
    """`overridable`, for functions whose results at (h, w) depend only on inputs at (h, w)."""
    call = overridable(function)
    call.is_pointwise = True  # type: ignore[attr-defined]
    return call


def is_pointwise(function: Callable[..., Any]) -> bool:
    """Whether a function is decorated with `pointwise`."""
    return getattr(function, "is_pointwise", False)
