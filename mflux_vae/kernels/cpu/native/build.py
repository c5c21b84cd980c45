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

HERE = Path(__file__).parent
FLAGS = [
    *("-std=gnu++20", "-O3", "-ffp-contract=fast", "-fno-math-errno"),
    *("-fvisibility=hidden", "-fno-strict-aliasing", "-Wno-psabi"),
]


class BuildNative(build_ext):
    """Adds include paths and flags, and compiles several files at a time."""

    def run(self) -> None:
        if sys.platform != "linux" or platform.machine() != "x86_64" or os.environ.get("MFLUX_VAE_NATIVE") == "0":
            self.extensions = []
        super().run()

    def build_extension(self, ext: Any) -> None:
        import mlx.core as mx
        import nanobind

        sources, mlx = Path(nanobind.source_dir()), Path(mx.__file__).parent
        ext.sources = [*map(str, sorted(HERE.rglob("*.cpp"))), str(sources / "nb_combined.cpp")]
        ext.include_dirs = [
            *(str(mlx / "include"), nanobind.include_dir(), str(sources.parent / "ext" / "robin_map" / "include")),
            str(HERE),
        ]
        ext.define_macros = [("NB_DOMAIN", "mlx"), ("MLX_BUILT_WITH", f'"{mx.__version__}"')]
        ext.extra_compile_args, ext.extra_link_args = FLAGS, ["-Wl,-s"]
        # no path to libmlx.so: importing mlx.core loads it before
        ext.library_dirs, ext.libraries = [str(mlx / "lib")], ["mlx"]
        compile_one = self.compiler._compile

        def compile_all(objects: list[str], build: Any, *args: Any) -> None:
            with ThreadPoolExecutor() as pool:
                for done in [pool.submit(compile_one, name, *build[name], *args) for name in objects if name in build]:
                    done.result()

        compile_files = self.compiler.compile

        def compile(
            sources: list[str],
            output_dir: Any = None,
            macros: Any = None,
            include_dirs: Any = None,
            debug: Any = 0,
            extra_preargs: Any = None,
            extra_postargs: Any = None,
            depends: Any = None,
        ) -> Any:
            compiler = self.compiler
            macros, objects, extra, flags, build = compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            options = compiler._get_cc_args(flags, debug, extra_preargs)
            compile_all(objects, build, options, extra, flags)
            return objects

        self.compiler.compile = compile
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_files
