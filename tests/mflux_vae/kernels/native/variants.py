"""Build a variant of the extension and run the sweep: `python -m tests.mflux_vae.kernels.native.variants NAME [COUNT]`.

Names: `address` and `thread` for g++'s sanitizers; `wide` for the code of AVX-512, compiled for AVX2. Requires g++,
nanobind and a processor with AVX2. Exits with 1 if anything is reported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mflux_vae.kernels.cpu.native import build

SANITIZERS = {"address": "libasan.so", "thread": "libtsan.so"}
OPTIONS = {
    # Python keeps memory until it exits; warnings end the run
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=0:exitcode=66:report_signal_unsafe=0:ignore_noninstrumented_modules=1",
    # threads even on one CPU
    "OMP_NUM_THREADS": "4",
    "MFLUX_VAE_NATIVE": "avx2",
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


def sources(folder: Path, variant: str) -> list[Path]:
    """Files to compile; in the variant `wide` the kernels of AVX2 have the lanes and tiles of AVX-512."""
    if variant != "wide":
        return build.sources()
    wide, isa = folder / "kernels_avx2.cpp", build.HERE / "isa"
    code = (isa / "kernels_avx512.cpp").read_text()
    wide.write_text(code.replace("avx512f,avx512dq,avx512bw,avx512vl", "avx2").replace("avx512", "avx2"))
    return [wide if path == isa / wide.name else path for path in build.sources()]


def compile_into(folder: Path, variant: str) -> Path:
    """The extension's path."""
    compile, link = build.options()
    sanitize = [f"-fsanitize={variant}"] if variant in SANITIZERS else []
    include = f"-I{sysconfig.get_paths()['include']}"

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        debug = (
            [*sanitize, "-O1", "-g1", "-fno-omit-frame-pointer"] if sanitize and "nanobind" not in str(source) else []
        )
        subprocess.run(["g++", *compile, include, "-fPIC", *debug, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources(folder, variant)))
    extension = folder / "_native.so"
    subprocess.run(["g++", "-shared", *sanitize, *objects, "-o", extension, *link], check=True)
    return extension


def main(variant: str, count: str = "20") -> int:
    """Exit status of the sweep."""
    with tempfile.TemporaryDirectory() as folder:
        extension = compile_into(Path(folder), variant)
        environment = os.environ | OPTIONS
        if variant in SANITIZERS:
            environment["LD_PRELOAD"] = f"{library(SANITIZERS[variant])} {library('libstdc++.so')}"
        # a fixed memory layout, which ThreadSanitizer needs
        command = ["setarch", "-R", sys.executable, "-c", RUN, str(extension), count]
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
