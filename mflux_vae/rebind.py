"""Point functions that a loaded library calls at another library, after the fact (Linux, ELF64).

Python binds an extension's symbols while importing it, so a program that imports `mlx.core` before this package has
MLX bound to its own slow BLAS already. The binding is an entry in a table of the library, and tables can be written.
Layout: System V ABI, "Dynamic Linking": link_map (dlinfo(3)), Elf64_Dyn, Elf64_Rela, Elf64_Sym.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import struct

_DT_STRTAB, _DT_SYMTAB, _DT_JMPREL, _DT_PLTRELSZ = 5, 6, 23, 2
_RELA_SIZE, _SYM_SIZE = 24, 24
_RTLD_DI_LINKMAP = 2


def rebind(library: ctypes.CDLL, prefix: str, source: ctypes.CDLL) -> int:
    """Bind `library`'s calls of functions named `prefix...` to those of `source`.

    Only entries that the process may write are touched, and only for names that `source` has.

    Returns:
        number of functions bound; 0 where the library has none or its table is read-only.
    """
    if ctypes.sizeof(ctypes.c_void_p) != 8:
        return 0
    base, table = _dynamic_table(library)
    if not {_DT_STRTAB, _DT_SYMTAB, _DT_JMPREL, _DT_PLTRELSZ} <= table.keys():
        return 0
    writable = _writable_ranges()
    bound = 0
    for at in range(table[_DT_JMPREL], table[_DT_JMPREL] + table[_DT_PLTRELSZ], _RELA_SIZE):
        offset, info, _ = struct.unpack("<QQq", ctypes.string_at(at, _RELA_SIZE))
        symbol = ctypes.string_at(table[_DT_SYMTAB] + (info >> 32) * _SYM_SIZE, 4)
        name = ctypes.string_at(table[_DT_STRTAB] + struct.unpack("<I", symbol)[0]).decode()
        slot = base + offset
        if name.startswith(prefix) and hasattr(source, name) and any(a <= slot < b for a, b in writable):
            address = ctypes.cast(getattr(source, name), ctypes.c_void_p).value
            ctypes.c_uint64.from_address(slot).value = address or 0
            bound += 1
    return bound


def _dynamic_table(library: ctypes.CDLL) -> tuple[int, dict[int, int]]:
    """Load address and dynamic section (tag -> value) of a loaded library."""
    libdl = ctypes.CDLL(ctypes.util.find_library("dl") or None)
    link_map = ctypes.c_void_p()
    libdl.dlinfo.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    if libdl.dlinfo(library._handle, _RTLD_DI_LINKMAP, ctypes.byref(link_map)) != 0 or not link_map.value:
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
