"""Point functions that a loaded library calls at another library, after the fact (Linux, 64-bit ELF).

Python binds an extension's symbols while importing it, so a program that imports `mlx.core` before this package has
MLX bound to its own slow BLAS already. The binding is an entry in a table of the library, and tables can be written.
Layout: System V ABI, "Dynamic Linking": link_map (dlinfo(3)), Elf64_Dyn, Elf64_Rela, Elf64_Sym.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator

_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_JMPREL = 2, 5, 6, 23
_RELA_SIZE, _SYM_SIZE = 24, 24
_RTLD_DI_LINKMAP = 2


def rebind(library: ctypes.CDLL, prefix: str, source: ctypes.CDLL) -> int:
    """Bind `library`'s calls of functions named `prefix...` to those of `source`.

    Only entries that the process may write are touched, and only for names that `source` has.

    Returns:
        number of functions bound; 0 where the library has none or its table is read-only.
    """
    writable = _writable_ranges()
    bound = 0
    for name, slot in slots(library, prefix):
        if hasattr(source, name) and any(start <= slot < end for start, end in writable):
            ctypes.c_uint64.from_address(slot).value = address_of(source, name)
            bound += 1
    return bound


def address_of(library: ctypes.CDLL, name: str) -> int:
    """Where a function of a library lies in memory."""
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def slots(library: ctypes.CDLL, prefix: str) -> Iterator[tuple[str, int]]:
    """Names of the functions `prefix...` that `library` imports, each with the address of its table entry."""
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        return
    base, table = _dynamic_table(library)
    if not {_DT_PLTRELSZ, _DT_STRTAB, _DT_SYMTAB, _DT_JMPREL} <= table.keys():
        return
    # glibc has added the load address to the addresses in this table, musl has not
    strings, symbols, entries = (
        table[tag] + (base if table[tag] < base else 0) for tag in (_DT_STRTAB, _DT_SYMTAB, _DT_JMPREL)
    )
    for at in range(entries, entries + table[_DT_PLTRELSZ], _RELA_SIZE):
        offset, info, _ = struct.unpack("<QQq", ctypes.string_at(at, _RELA_SIZE))
        (name_at,) = struct.unpack("<I", ctypes.string_at(symbols + (info >> 32) * _SYM_SIZE, 4))
        name = ctypes.string_at(strings + name_at).decode()
        if name.startswith(prefix):
            yield name, base + offset


def _dynamic_table(library: ctypes.CDLL) -> tuple[int, dict[int, int]]:
    """Load address and dynamic section (tag -> value) of a loaded library."""
    link_map = ctypes.c_void_p()
    dlinfo = getattr(ctypes.CDLL(None), "dlinfo", None)
    if dlinfo is None:
        return 0, {}
    dlinfo.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    if dlinfo(library._handle, _RTLD_DI_LINKMAP, ctypes.byref(link_map)) != 0 or not link_map.value:
        return 0, {}
    base, _, at = struct.unpack("<QQQ", ctypes.string_at(link_map.value, 24))
    table: dict[int, int] = {}
    while True:
        tag, value = struct.unpack("<qQ", ctypes.string_at(at, 16))
        if tag == 0:
            return base, table
        table[tag] = value
        at += 16


def _writable_ranges() -> list[tuple[int, int]]:
    """Address ranges this process may write, from /proc/self/maps."""
    ranges = []
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            addresses, permissions = line.split()[:2]
            if "w" in permissions:
                start, end = addresses.split("-")
                ranges.append((int(start, 16), int(end, 16)))
    return ranges
