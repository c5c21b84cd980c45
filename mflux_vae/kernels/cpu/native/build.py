"""Builds the extension `mflux_vae.kernels.cpu._native` when the package is installed, on Linux with x86-64.

pyproject.toml names it as setuptools' `build_ext`. The extension is optional: without a compiler the installation goes
on and the package uses MLX's operations. This file imports nothing of the package, which is not installed yet.
"""

from __future__ import annotations

import os
import platform
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

HERE = Path(__file__).parent
FLAGS = [  # loops, such as the short one of products, begin a line of the cache
    *("-std=gnu++20", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-falign-loops=64"),
    *("-fvisibility=hidden", "-fno-strict-aliasing", "-Wno-psabi"),
]


def sources() -> list[Path]:
    """Files to compile, those that take longest first."""
    import nanobind

    slow = [HERE / "operations.cpp", Path(nanobind.source_dir(), "nb_combined.cpp"), HERE / "bindings.cpp"]
    return [*slow, *HERE.glob("isa/*.cpp"), *HERE.glob("compute/*.cpp")]


def options() -> tuple[list[str], list[str]]:
    """Options of the compiler and of the linker, for the MLX and the nanobind that are installed."""
    import mlx.core as mx
    import nanobind

    version: str = mx.__version__  # type: ignore[attr-defined]
    mlx, robin_map = Path(mx.__file__).parent, Path(nanobind.source_dir()).parent / "ext" / "robin_map" / "include"
    include = [HERE, mlx / "include", nanobind.include_dir(), robin_map]
    compile = [*FLAGS, *(f"-I{path}" for path in include), "-DNB_DOMAIN=mlx", f'-DMLX_BUILT_WITH="{version}"']
    return compile, [f"-L{mlx / 'lib'}", "-lmlx"]  # no path to libmlx.so: importing mlx.core loads it before


class BuildNative(build_ext):
    """Compiles several files at a time."""

    def run(self) -> None:
        if sys.platform != "linux" or platform.machine() != "x86_64" or os.environ.get("MFLUX_VAE_NATIVE") == "0":
            self.extensions: list[Any] = []
        super().run()

    def get_source_files(self) -> list[str]:
        """For a source distribution."""
        return [os.path.relpath(path) for path in HERE.rglob("*") if path.suffix in (".cpp", ".h", ".inc")]

    def build_extension(self, ext: Any) -> None:
        def compile_one(source: Path) -> str:
            objects: list[str] = self.compiler.compile(
                [str(source)], output_dir=self.build_temp, extra_postargs=compile
            )
            return objects[0]

        try:
            compile, link = options()
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                ext.extra_objects = list(pool.map(compile_one, sources()))
        except ImportError as error:
            raise CompileError(str(error)) from error
        ext.sources, ext.extra_link_args = [], [*link, "-Wl,-s"]
        self.force = True  # link again, which setuptools decides by the dates of `sources`
        super().build_extension(ext)
