"""Check that a configuration read from a file has values of the declared types."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from mflux_vae.errors import WeightsError

T = TypeVar("T")

_LARGEST, _MOST_LAYERS = 2**31 - 1, 1000
"""Larger numbers, and more layers, are mistakes in a file and would fill the memory."""


def check_config(build: Callable[[], T], file: object) -> T:
    """The dataclass that `build` returns, if each field has its declared type. Numbers as text are refused.

    Args:
        file: for messages.

    Raises:
        WeightsError: `build` fails, or a field has another type or an excessive value.
    """
    try:
        config = build()
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise WeightsError(f"{file}: its values do not fit ({str(error)[:200]})") from error
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        excessive = name.endswith("layers") and type(value) is int and value > _MOST_LAYERS
        if typing.get_origin(hint) is not typing.ClassVar and (excessive or not _fits(value, hint)):
            raise WeightsError(f"{file}: {name} is {repr(value)[:100]}, which it cannot be")
    return config


def _fits(value: Any, hint: Any) -> bool:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(one, inner[0]) for one in value)
    if hint is int:
        return type(value) is int and abs(value) <= _LARGEST
    if hint is float:
        return type(value) in (int, float) and abs(value) <= _LARGEST and math.isfinite(value)
    return not isinstance(hint, type) or isinstance(value, hint)
