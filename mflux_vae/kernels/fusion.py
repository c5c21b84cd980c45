"""A formula over arrays as one pass over memory, for the CPU.

`mx.compile` writes C++ for a formula, and g++ at run time makes a loop of it. Four things decide whether that loop is
fast, so the formulas of this package are written for them:

- MLX fuses at most eleven operations deep; what is deeper becomes several passes. Polynomials are therefore summed
  as a tree (Estrin), not one after the other, and shapes are not left open: with `shapeless` every constant costs a
  level.
- `mx.maximum`, `mx.minimum` and `mx.clip` look for NaN in a way that g++ cannot turn into vector code; `mx.where`
  with one comparison it can. `mx.sqrt`, `mx.exp` and the like are calls, one element at a time.
- Arguments of different shapes are read with strides, one element at a time: a formula of more than a few operations
  takes what is to be broadcast after MLX's own subtraction or product.
- MLX asks g++ for the oldest x86-64, whose vectors hold four floats and cannot select. `_with_wide_vectors` has each
  function compiled for AVX2 and AVX-512 besides, chosen when it is loaded: SiLU then takes a sixth of the time. And it
  tells g++ that elements do not depend on each other: it could not know where a result overwrites its argument.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shlex
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeAlias

import mlx.core as mx

Formula: TypeAlias = Callable[..., Any]


def fused(formula: Formula) -> Formula:
    """`formula` in one pass where this machine can compile; as it is elsewhere, and while MLX differentiates or traces.

    Args:
        formula: element by element, with broadcasting; arrays in, an array out, or several.
    """

    @cache
    def best(arguments: int) -> Formula:
        return _compiled(formula, arguments) or formula

    @wraps(formula)
    def call(*arguments: mx.array) -> mx.array:
        return best(len(arguments))(*arguments)

    return call


@cache
def compiles() -> bool:
    """Whether `mx.compile` gains anything on this machine's CPU: there is a C++ compiler, and it works."""
    return shutil.which("g++") is not None and _compiled(lambda x: x * x + 1, 1) is not None


def _compiled(formula: Formula, arguments: int) -> Formula | None:
    """Tried once: MLX does without a compiler, not with a broken one, or a disk that it cannot write to."""
    _with_wide_vectors()
    compiled: Formula = mx.compile(formula)
    try:
        mx.eval(compiled(*(mx.zeros((2,)) for _ in range(arguments))))
    except RuntimeError:
        return None
    return compiled


# MLX runs `g++ ... "/tmp/mlx/<version>/cpu/<name>.cpp" -o ...` through the shell. Its sources, and no others, get
# the attribute on their function and the pragma before their loops; the result still runs on any x86-64.
_COMPILER = """#!/bin/sh
for argument; do
  case "$argument" in
    */mlx/*/cpu/*.cpp) sed -i '
      s/^void /__attribute__((target_clones("avx512f","avx2","default"))) &/
      s/^ *for (/_Pragma("GCC ivdep") &/' "$argument" ;;
  esac
done
exec {compiler} "$@"
"""

_PREFIX = "mflux-vae-"
"""How folders of compilers are called."""


@cache
def _with_wide_vectors() -> None:
    """Put a g++ that compiles MLX's sources for wide vectors, too, before the machine's own. No g++, no change."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64" or platform.system() != "Linux":
        return
    if Path(compiler).parent.name.startswith(_PREFIX):  # a process that started this one has done so
        return
    script = _COMPILER.format(compiler=shlex.quote(compiler))
    try:
        folder = _kept(script) or _own(script)
    except OSError:
        return
    os.environ["PATH"] = os.pathsep.join([str(folder), os.environ.get("PATH", os.defpath)])


def _kept(script: str) -> Path | None:
    """The folder with this script that all processes of a user share; None where something else has its name.

    A folder of one's own that nobody else may write to holds what its owner put there; in a folder for all, such as
    /tmp, others can neither replace nor rename it.
    """
    digest = hashlib.sha256(script.encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir(), f"{_PREFIX}{os.geteuid()}-{digest}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        return None
    file = folder / "g++"
    with suppress(OSError, ValueError):
        if file.read_text(encoding="utf-8") == script and os.access(file, os.X_OK):
            return folder
    try:  # under its name only when it can be started: others may be about to
        handle, whole = tempfile.mkstemp(dir=folder)
        os.close(handle)
        _write(Path(whole), script)
        os.replace(whole, file)
    except OSError:
        return None
    return folder


def _own(script: str) -> Path:
    """A folder with the script that goes with this process."""
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _write(Path(folder, "g++"), script)
    return Path(folder)


def _write(file: Path, script: str) -> None:
    file.write_text(script, encoding="utf-8")
    file.chmod(0o755)
