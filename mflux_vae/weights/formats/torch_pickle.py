"""Interpret a pickle without executing code: dicts, lists, scalars and tensors.

Opcodes are interpreted one by one. No class is imported and no function called: names are pairs of strings, and calls
become a tensor, a container or a `Placeholder`. Names that torch and its trainers do not write are refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, NamedTuple

from mflux_vae.weights.formats.lazy_tensor import MAX_DIMENSIONS
from mflux_vae.weights.formats.safe_reading import InvalidFile

_SCALARS = (str, int, float, bool, bytes, type(None))

_DTYPES = {
    "Double": "float64",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Long": "int64",
    "Int": "int32",
    "Short": "int16",
    "Char": "int8",
    "Byte": "uint8",
    "Bool": "bool",
    "Untyped": "",  # given by the tensor
}
"""dtype by torch storage class."""

_FP8 = {"float8_e4m3fn": "f8_e4m3", "float8_e5m2": "f8_e5m2"}
"""dtype by torch's name, where it differs."""

_ALLOWED = {
    "torch": "*Storage Size device Tensor [b-u]*[0-9] float half double long short bool *_e*m*",
    "torch._tensor": "_rebuild_from_type_v2",
    "torch._utils": "_rebuild_*",
    "torch.nn.parameter": "Parameter",
    "torch.storage": "*Storage",
    "torch.serialization": "_get_layout",
    "torch.optim.lr_scheduler": "*",
    "collections": "OrderedDict defaultdict Counter deque",
    "datetime": "*",
    "pathlib": "*Path",
    "argparse": "Namespace",
    "_codecs": "encode",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",
    "typing": "Any",
    **dict.fromkeys(
        ("builtins", "__builtin__"),
        "set frozenset list tuple dict int float complex str bool bytes bytearray object slice range",
    ),
    **{package + deeper: "*" for package in ("lightning", "lightning_fabric", "omegaconf") for deeper in ("", ".*")},
    **{"pytorch_lightning": "*", "pytorch_lightning.*": "*"},
}
"""Allowed names: patterns by module, for torch and for objects that trainers store."""


class Name(NamedTuple):
    """A reference `module.name` in a pickle; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Placeholder:
    """Stands for an object of another class."""

    kind: str


@dataclass(frozen=True)
class Storage:
    """A storage in the file: dtype ("" if given by the tensor), key, size in elements."""

    dtype: str
    key: str
    size: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides in elements of `dtype`."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,
}
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


def interpret(source: Any, storages: dict[str, Storage] | None = None) -> Any:
    """Interpret one pickle.

    Args:
        source: bytes, or a file, which is read to the end of the pickle.
        storages: filled with the referenced storages, by key.

    Raises:
        InvalidFile: a name or opcode is not allowed.
        Exception: the data is not a pickle (see `safe_reading.BROKEN`).
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        index = len(stack) - 1
        while stack[index] is not _MARK:  # an IndexError means a broken pickle
            index -= 1
            if index < 0:
                raise InvalidFile("missing mark")
        items = stack[index + 1 :]
        del stack[index:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(source):
        code = opcode.name
        if code in _LITERALS:
            stack.append(argument)
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code]())
        elif code in ("PROTO", "FRAME"):
            pass
        elif code == "MARK":
            stack.append(_MARK)
        elif code in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif code == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif code in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif code in _TUPLES:
            count = _TUPLES[code]
            items = stack[-count:]
            del stack[-count:]
            stack.append(tuple(items))
        elif code == "TUPLE":
            stack.append(tuple(since_mark()))
        elif code in ("LIST", "FROZENSET"):
            stack.append(since_mark())
        elif code == "DICT":
            stack.append(_fill({}, since_mark()))
        elif code == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _fill(stack[-1], [key, value])
        elif code == "SETITEMS":
            items = since_mark()
            _fill(stack[-1], items)
        elif code in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if code == "APPEND" else since_mark()
            if isinstance(stack[-1], list):
                stack[-1].extend(items)
            elif not isinstance(stack[-1], Placeholder):
                raise InvalidFile(f"{code} on an object that is not a list")
        elif code == "GLOBAL":
            stack.append(_name(*argument.split(" ", 1)))
        elif code == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_name(str(module), str(name)))
        elif code in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(_call_result(function, arguments))
        elif code == "NEWOBJ_EX":
            _, arguments, function = stack.pop(), stack.pop(), stack.pop()
            stack.append(_call_result(function, arguments))
        elif code == "BUILD":
            stack.pop()  # attributes are not needed
            if not isinstance(stack[-1], dict | Placeholder | Tensor):
                raise InvalidFile("attributes of an object without attributes")
        elif code == "BINPERSID":
            storage = _storage(stack.pop())
            if storages is not None and storages.setdefault(storage.key, storage) != storage:
                raise InvalidFile(f"duplicate storage {storage.key!r}")
            stack.append(storage)
        elif code == "POP":
            stack.pop()
        elif code == "POP_MARK":
            since_mark()
        elif code == "DUP":
            stack.append(stack[-1])
        elif code == "STOP":
            return stack.pop()
        else:
            raise InvalidFile(f"opcode {code}, which torch does not write")
    raise InvalidFile("missing end")


@cache
def _name(module: str, name: str) -> Name:
    found = Name(module, name)
    known = any(
        fnmatchcase(found.module, module) and any(fnmatchcase(found.name, pattern) for pattern in names.split())
        for module, names in _ALLOWED.items()
    )
    if not known:
        raise InvalidFile(
            f"it refers to {str(found)[:100]!r}; only tensors and containers are supported: save its state_dict"
        )
    return found


def _call_result(function: Any, arguments: Any) -> Any:
    """Result of a call if it is a tensor or container, else a placeholder."""
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise InvalidFile("a call of an object that is not a name")
    match function:
        case ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2"):
            return _tensor(arguments)
        case ("torch._utils", "_rebuild_tensor_v3"):
            return _tensor(arguments, _FP8.get(arguments[6].name, arguments[6].name))
        case ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"):
            return arguments[0]
        case ("torch._tensor", "_rebuild_from_type_v2"):
            return _call_result(arguments[0], arguments[2])
        case ("collections", "OrderedDict"):
            return _ordered(*arguments)
        case ("collections", "defaultdict"):
            return {}
        case ("torch", "Size"):
            return arguments[0]
        case _:
            return Placeholder(str(function))


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    """OrderedDict(pairs), as Python 2 writes it; pairs are consumed, which bounds memory."""
    filled: dict[Any, Any] = {}
    for pair in pairs:
        key, value = pair
        _fill(filled, [key, value])
    if pairs:
        pairs.clear()
    return filled


def _fill(target: Any, items: Sequence[Any]) -> Any:
    if isinstance(target, Placeholder):
        return target
    if not isinstance(target, dict) or len(items) % 2:
        raise InvalidFile("items of an object that is not a dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, (*_SCALARS, Name)):  # a nested tuple can take forever to hash
            target[key] = value
    return target


def _storage(persistent: Any) -> Storage:
    if not isinstance(persistent, tuple) or len(persistent) < 5 or persistent[0] != "storage":
        raise InvalidFile("a reference that is not a storage")
    kind, key, _, size, *view = persistent[1:]
    dtype = _DTYPES.get(kind.name.lstrip("_").removesuffix("Storage")) if isinstance(kind, Name) else None
    if dtype is None:
        raise InvalidFile(f"unknown dtype {str(kind)[:60]}")
    if any(part is not None for part in view):
        raise InvalidFile("a storage that is a view")
    if not isinstance(size, int) or not isinstance(key, str):
        raise InvalidFile("a storage without key or size")
    return Storage(dtype, key, size)


def _tensor(arguments: Sequence[Any], dtype: str = "") -> Tensor:
    storage, offset, shape, strides = arguments[:4]
    if max(len(shape), len(strides)) > MAX_DIMENSIONS:
        raise InvalidFile(f"a tensor of {len(shape)} dimensions")
    numbers = (offset, *shape, *strides)
    whole = all(isinstance(number, int) and number >= 0 for number in numbers)
    if not isinstance(storage, Storage) or not whole or len(shape) != len(strides):
        raise InvalidFile("a tensor without storage or with an impossible shape")
    if not (dtype := dtype or storage.dtype):
        raise InvalidFile("a tensor without a dtype")
    return Tensor(storage, dtype, offset, tuple(shape), tuple(strides))
