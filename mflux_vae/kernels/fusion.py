"""A formula over arrays as one pass over memory, for the CPU.

`mx.compile` writes C++ for a formula, and g++ at run time makes a loop of it. Three things decide whether that loop is
fast, so the formulas of this package are written for them:

- MLX fuses at most eleven operations deep; what is deeper becomes several passes. Polynomials are therefore summed
  as a tree (Estrin), not one after the other, and shapes are not left open: with `shapeless` every constant costs a
  level.
- `mx.maximum`, `mx.minimum` and `mx.clip` look for NaN in a way that g++ cannot turn into vector code; `mx.where`
  with one comparison it can. `mx.sqrt`, `mx.exp` and the like are calls, one element at a time.
- MLX asks g++ for the oldest x86-64, whose vectors hold four floats and cannot select. `_with_wide_vectors` has each
  function compiled for AVX2 and AVX-512 besides, chosen when it is loaded: SiLU then takes a sixth of the time.
"""

from __future__ import annotations

import atexit
import os
import platform
import shlex
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, wraps
from pathlib import Path
from typing import TypeAlias

import mlx.core as mx

Formula: TypeAlias = Callable[..., mx.array]


def fused(formula: Formula) -> Formula:
    """`formula` in one pass where this machine can compile; as it is elsewhere, and while MLX differentiates or traces.

    Args:
        formula: element by element, with broadcasting; arrays in, an array out.
    """

    @cache
    def best(arguments: int) -> Formula:
        """Tried once: MLX does without a compiler, not with a broken one, or a disk that it cannot write to."""
        _with_wide_vectors()
        compiled = mx.compile(formula)
        try:
            mx.eval(compiled(*(mx.zeros((2,)) for _ in range(arguments))))
        except RuntimeError:
            return formula
        return compiled

    @wraps(formula)
    def call(*arguments: mx.array) -> mx.array:
        return best(len(arguments))(*arguments)

    return call


# MLX runs `g++ ... "/tmp/mlx/<version>/cpu/<name>.cpp" -o ...` through the shell. Its sources, and no others, get
# the attribute on their function; the result still runs on any x86-64.
_COMPILER = """#!/bin/sh
for argument; do
  case "$argument" in
    */mlx/*/cpu/*.cpp) sed -i 's/^void /__attribute__((target_clones("avx512f","avx2","default"))) &/' "$argument" ;;
  esac
done
exec {compiler} "$@"
"""


@cache
def _with_wide_vectors() -> None:
    """Put a g++ that compiles MLX's sources for wide vectors, too, before the machine's own. No g++, no change."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64" or platform.system() != "Linux":
        return
    try:
        folder = tempfile.mkdtemp(prefix="mflux-vae-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        script = Path(folder, "g++")
        script.write_text(_COMPILER.format(compiler=shlex.quote(compiler)), encoding="utf-8")
        script.chmod(0o755)
    except OSError:
        return
    os.environ["PATH"] = os.pathsep.join([folder, os.environ.get("PATH", os.defpath)])
