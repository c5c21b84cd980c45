"""Configurations from files: dataclasses whose fields have the types that they say."""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from mflux_vae.errors import WeightsError

T = TypeVar("T")

_LARGEST, _MOST_LAYERS = 2**31 - 1, 1000
"""A number of anything, and one of layers, above it is a mistake that would fill the memory."""


def typed(make: Callable[[], T], where: object) -> T:
    """What `make` makes, a dataclass, if every field is of its type; text for a number is not.

    Args:
        where: the file, for messages.

    Raises:
        WeightsError: it cannot be made, or a field is something else.
    """
    try:
        made = make()
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise WeightsError(f"{where}: its values do not fit ({str(error)[:200]})") from error
    for name, hint in typing.get_type_hints(type(made)).items():
        value = getattr(made, name)
        excessive = name.endswith("layers") and type(value) is int and value > _MOST_LAYERS
        if typing.get_origin(hint) is not typing.ClassVar and (excessive or not _fits(value, hint)):
            raise WeightsError(f"{where}: {name} is {repr(value)[:100]}, which it cannot be")
    return made


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
