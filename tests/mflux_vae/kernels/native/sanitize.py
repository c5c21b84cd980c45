"""Build the extension with a sanitizer and run the sweep: `python -m tests.mflux_vae.kernels.native.sanitize address`.

Sanitizers: address, thread. Needs g++ with its libasan and libtsan, and nanobind. Exits with 1 if anything is reported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import nanobind

from mflux_vae.kernels.cpu.native import build

SOURCES = Path(build.__file__).parent
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # Python keeps memory until it exits; warnings end the run
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=0:exitcode=66:report_signal_unsafe=0:ignore_noninstrumented_modules=1",
}
MODULE = "mflux_vae.kernels.cpu._native"
RUN = f"""
import importlib.util, runpy, sys
import mlx.core
import mflux_vae.kernels.cpu as package
spec = importlib.util.spec_from_file_location("{MODULE}", sys.argv.pop(1))
sys.modules["{MODULE}"] = package._native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package._native)
runpy.run_module("tests.mflux_vae.kernels.native.sweep", run_name="__main__")
"""


def library(name: str) -> str:
    """Path of a library of the compiler."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def compile_into(folder: Path, sanitizer: str) -> Path:
    """The extension's path."""
    mlx, binding = Path(mx.__file__).parent, Path(nanobind.source_dir())
    includes = [
        *(str(mlx / "include"), nanobind.include_dir(), str(binding.parent / "ext" / "robin_map" / "include")),
        sysconfig.get_paths()["include"],
    ]
    sanitize = [f"-fsanitize={sanitizer}", "-fno-omit-frame-pointer"]
    flags = [*build.FLAGS, "-O1", "-g1", "-fPIC", "-DNB_DOMAIN=mlx", *(f"-I{path}" for path in includes)]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        extra = sanitize if source.parent == SOURCES else []  # not nanobind
        subprocess.run(["g++", *flags, *extra, "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*SOURCES.glob("*.cpp"), binding / "nb_combined.cpp"]))
    extension = folder / "_native.so"
    subprocess.run(
        ["g++", "-shared", *sanitize, *objects, "-o", str(extension), f"-L{mlx / 'lib'}", "-lmlx"], check=True
    )
    return extension


def main(sanitizer: str, count: str) -> int:
    """Exit status of the sweep."""
    with tempfile.TemporaryDirectory() as folder:
        extension = compile_into(Path(folder), sanitizer)
        preload = f"{library(LIBRARIES[sanitizer])} {library('libstdc++.so')}"
        # threads even on one CPU; a fixed memory layout, which ThreadSanitizer needs
        environment = os.environ | OPTIONS | {"LD_PRELOAD": preload, "OMP_NUM_THREADS": "4", "MLX_DISABLE_COMPILE": "1"}
        command = ["setarch", "-R", sys.executable, "-c", RUN, str(extension), count]
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "20"))
