"""torch's files (.ckpt, .pt, .pth) read without torch, and without executing anything.

    zip format (torch >= 1.6)    NAME/data.pkl, NAME/data/KEY (one storage each, not compressed), NAME/byteorder
    older format                 pickles: magic number, version, system, object, storage keys; then each storage's bytes

The pickle is interpreted here, opcode by opcode, into dicts, lists, scalars and tensors. No class is looked up and no
function is called: a name is a pair of strings, and what a call would have made is a tensor, a container or a
`Placeholder`. Names that torch and its trainers do not write are refused.
"""

from __future__ import annotations

import mmap
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np

from mflux_vae.errors import WeightsError
from mflux_vae.weights.stored import LARGEST_DIMENSION, MOST_DIMENSIONS, Stored, read_numbers, width

_MAGIC, _VERSION = 0x1950A86A20F9469CFC6C, 1001
_LARGEST_PICKLE = 2**28
_LONGEST_KEY = 1000
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
    "Untyped": "",  # the tensor says it
}
"""By the name of torch's storage class."""

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
"""Patterns of modules, and of the names in them, that a pickle may mention: torch's, and what trainers leave beside."""


class Name(NamedTuple):
    """What the pickle calls `module.name`; only ever its two strings."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class Placeholder:
    """Where an object of another class was."""

    kind: str


@dataclass(frozen=True)
class Storage:
    """A run of numbers in the file: `dtype` (empty where the tensor says it), key, and its size in elements."""

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


class _Refused(Exception):
    """What is wrong with the pickle."""


_BROKEN: tuple[type[Exception], ...] = (
    *(_Refused, ArithmeticError, AttributeError, EOFError, LookupError, MemoryError, OSError, RuntimeError),
    *(TypeError, ValueError, Warning, struct.error, zipfile.BadZipFile),
)
"""What reading a file that is not what it says may raise."""


def read_pickle(path: str | Path) -> dict[str, Stored]:
    """The tensors of a torch file, by their keys in its nested dictionaries, joined with dots; loaded when asked for.

    float64 is loaded as float32; other dtypes keep their bits.

    Raises:
        WeightsError: no such file; not a whole torch file; one that holds other things than tensors and containers
            (whole modules, functions to call), or tensors that reach beyond their data.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4)
            content, where = (_read_zip if start == b"PK\x03\x04" else _read_old)(file)
        data = np.memmap(path, np.uint8, "r")
        return {name: _stored(name, tensor, where, data) for name, tensor in _flatten(content)}
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such weights file") from error
    except _BROKEN as error:
        told = str(error) if isinstance(error, _Refused) else f"broken or truncated: {error or type(error).__name__}"
        raise WeightsError(f"{path}: not usable as a torch file ({told})".replace("\n", " ")) from error


_Places: TypeAlias = "dict[str, tuple[int, int]]"
"""Storage key -> first byte and number of bytes in the file."""


def _read_zip(file: IO[bytes]) -> tuple[Any, _Places]:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
    top = next((name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")), None)
    if top is None or top.count("/") != 1:
        raise _Refused("a zip archive without data.pkl; not written by torch.save")
    if f"{top}constants.pkl" in entries:
        raise _Refused("a TorchScript archive, which holds a program; save its state_dict instead")

    def place(name: str) -> tuple[int, int]:
        """First byte and size of an entry; its own header is looked at, as the directory does not know its length."""
        entry = entries.get(name)
        if entry is None:
            raise _Refused(f"{name} is missing")
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise _Refused(f"{name} is compressed, which torch never does")
        file.seek(entry.header_offset)
        header = file.read(30)
        if len(header) != 30 or header[:4] != b"PK\x03\x04":
            raise _Refused(f"{name} is not where the archive's directory says")
        first = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:]))
        if first + entry.file_size > length:
            raise _Refused(f"{name} reaches beyond the end of the file")
        return first, entry.file_size

    def bytes_of(name: str) -> bytes:
        first, size = place(name)
        if size > _LARGEST_PICKLE:
            raise _Refused(f"{name} has {size} bytes, more than any list of tensors needs")
        file.seek(first)
        return file.read(size)

    length = file.seek(0, 2)
    order = bytes_of(f"{top}byteorder") if f"{top}byteorder" in entries else b"little"
    if order != b"little":
        raise _Refused(f"its byte order is {order[:20]!r}; only little-endian files are read")
    storages: dict[str, Storage] = {}
    content = interpret(_operations(bytes_of(f"{top}data.pkl")), storages)
    return content, {key: place(f"{top}data/{key}") for key in storages}


def _read_old(file: IO[bytes]) -> tuple[Any, _Places]:
    length = file.seek(0, 2)
    if not length:
        raise _Refused("it is empty")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:1] != b"\x80":
            tar = data[257:262] == b"ustar"
            raise _Refused(
                "the tar format of torch 0.1; save it anew" if tar else "no format of torch's, nor safetensors"
            )
        if interpret(_operations(data)) != _MAGIC or interpret(_operations(data)) != _VERSION:
            raise _Refused("a pickle, but not one of torch.save's")
        interpret(_operations(data))  # of the machine that wrote it
        storages: dict[str, Storage] = {}
        content = interpret(_operations(data), storages)
        places: dict[str, tuple[int, int]] = {}
        for key in interpret(_operations(data)):
            if key not in storages or not storages[key].dtype:
                raise _Refused(f"storage {key!r} is of no tensor")
            (count,) = struct.unpack("<q", data.read(8))
            size = count * (width(storages[key].dtype) or 1)
            if not 0 <= size <= length - data.tell():
                raise _Refused(f"storage {key!r} reaches beyond the end of the file")
            places[key] = data.tell(), size
            data.seek(size, 1)
    return content, places


def _operations(source: Any) -> Iterator[tuple[str, Any]]:
    return ((code.name, argument) for code, argument, _ in pickletools.genops(source))


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


def interpret(operations: Iterator[tuple[str, Any]], storages: dict[str, Storage] | None = None) -> Any:
    """Run one pickle's opcodes over dicts, lists, tuples, scalars, names and tensors.

    Args:
        operations: names of opcodes with their arguments.
        storages: filled with the storages that are mentioned, by key.

    Raises:
        _Refused, or one of `_BROKEN`: the pickle mentions what it may not, or is none.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        index = len(stack) - 1
        while stack[index] is not _MARK:  # below the bottom: an IndexError, the pickle is broken
            index -= 1
            if index < 0:
                raise _Refused("a mark is missing")
        items = stack[index + 1 :]
        del stack[index:]
        return items

    for code, argument in operations:
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
                raise _Refused(f"{code} on what is no list")
        elif code == "GLOBAL":
            stack.append(_name(*argument.split(" ", 1)))
        elif code == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            stack.append(_name(str(module), str(name)))
        elif code in ("REDUCE", "NEWOBJ"):
            arguments, function = stack.pop(), stack.pop()
            stack.append(_called(function, arguments))
        elif code == "NEWOBJ_EX":
            _, arguments, function = stack.pop(), stack.pop(), stack.pop()
            stack.append(_called(function, arguments))
        elif code == "BUILD":
            stack.pop()  # attributes: of an OrderedDict, torch's bookkeeping; of a placeholder, nothing we need
            if not isinstance(stack[-1], dict | Placeholder | Tensor):
                raise _Refused("attributes for what is no object")
        elif code == "BINPERSID":
            storage = _storage(stack.pop())
            if storages is not None and storages.setdefault(storage.key, storage) != storage:
                raise _Refused(f"two storages are called {storage.key!r}")
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
            raise _Refused(f"its opcode {code} is not one that torch writes")
    raise _Refused("its end is missing")


@cache
def _name(module: str, name: str) -> Name:
    found = Name(module, name)
    known = any(
        fnmatchcase(found.module, module) and any(fnmatchcase(found.name, pattern) for pattern in names.split())
        for module, names in _ALLOWED.items()
    )
    if not known:
        raise _Refused(
            f"it wants to use {str(found)[:100]!r}; only tensors and containers are read: save its state_dict"
        )
    return found


def _called(function: Any, arguments: Any) -> Any:
    """What a call would have made, as far as it is a tensor or a container."""
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise _Refused("a call of what is no name")
    match function:
        case ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2"):
            return _tensor(arguments)
        case ("torch._utils", "_rebuild_tensor_v3"):
            return _tensor(arguments, arguments[6].name)
        case ("torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state"):
            return arguments[0]
        case ("torch._tensor", "_rebuild_from_type_v2"):
            return _called(arguments[0], arguments[2])
        case ("collections", "OrderedDict"):
            return _ordered(*arguments)
        case ("collections", "defaultdict"):
            return {}
        case ("torch", "Size"):
            return arguments[0]
        case _:
            return Placeholder(str(function))


def _ordered(pairs: Any = ()) -> dict[Any, Any]:
    """OrderedDict(pairs), as Python 2 writes it; the pairs are used up, so that no file makes much out of little."""
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
        raise _Refused("items for what is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, (*_SCALARS, Name)):  # a nested tuple can take forever to hash
            target[key] = value
    return target


def _storage(persistent: Any) -> Storage:
    if not isinstance(persistent, tuple) or len(persistent) < 5 or persistent[0] != "storage":
        raise _Refused("a reference to what is no storage")
    kind, key, _, size, *view = persistent[1:]
    dtype = _DTYPES.get(kind.name.lstrip("_").removesuffix("Storage")) if isinstance(kind, Name) else None
    if dtype is None:
        raise _Refused(f"numbers of an unknown kind, {str(kind)[:60]}")
    if any(part is not None for part in view):
        raise _Refused("a storage that is part of another")
    if not isinstance(size, int) or not isinstance(key, str):
        raise _Refused("a storage without name or size")
    return Storage(dtype, key, size)


def _tensor(arguments: Sequence[Any], dtype: str = "") -> Tensor:
    storage, offset, shape, strides = arguments[:4]
    if max(len(shape), len(strides)) > MOST_DIMENSIONS:
        raise _Refused(f"a tensor of {len(shape)} dimensions")
    numbers = (offset, *shape, *strides)
    whole = all(isinstance(number, int) and number >= 0 for number in numbers)
    if not isinstance(storage, Storage) or not whole or len(shape) != len(strides):
        raise _Refused("a tensor without storage, or with an impossible shape")
    if not (dtype := dtype or storage.dtype):
        raise _Refused("a tensor without a dtype")
    return Tensor(storage, dtype, offset, tuple(shape), tuple(strides))


def _flatten(content: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dictionaries by their keys, joined with dots; each dictionary once."""
    if not isinstance(content, dict):
        kind = content.kind if isinstance(content, Placeholder) else type(content).__name__
        raise _Refused(f"it holds one {kind}, not a dictionary of tensors")
    pending, seen = [("", content)], set()
    while pending:
        prefix, item = pending.pop()
        if len(prefix) > _LONGEST_KEY:
            raise _Refused("its dictionaries are nested without end")
        if isinstance(item, dict) and id(item) not in seen:
            seen.add(id(item))
            pending.extend(
                (f"{prefix}.{key}" if prefix else key, value) for key, value in item.items() if type(key) is str
            )
        elif isinstance(item, Tensor):
            yield prefix, item


def _stored(name: str, tensor: Tensor, where: _Places, data: np.ndarray) -> Stored:
    """A tensor that is checked to lie within its storage, and that within the file."""
    size_of_one, count = width(tensor.dtype) or 1, prod(tensor.shape)
    first, size = where[tensor.storage.key] if count else (0, 0)
    last = tensor.offset + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    # a view that repeats elements could be of any size, whatever the file's
    needed = size_of_one * max(count, last + 1) if count else 0
    if needed > size or max(tensor.shape, default=0) > LARGEST_DIMENSION:
        raise _Refused(f"{name} is {tensor.shape}, which {size} bytes are stored for")
    numbers = data[first + size_of_one * tensor.offset : first + size]
    return Stored(
        tensor.shape,
        tensor.dtype,
        partial(read_numbers, numbers, name, tensor.dtype, tensor.shape, tensor.strides),
    )
