"""Files from outside, broken at random for a while: nothing but the project's own errors may come of it.

    python -m tests.fuzzing [--seconds N] [--only NAME] [--seed N]

Where atheris is installed, it looks which places of our code an input reaches, and goes on from those that reach new
ones; elsewhere good files are broken at random, and it is said. `tests/fuzz_targets.py` has the readers, and
`tests/fuzzing.py` what they must not do; a short part of this runs with the tests. An input that broke something is
written to a file that is named. The memory that reading takes, beyond what was taken before, may be `FILE_TIMES` the
file and the target's `base`, where the system tells it (Linux).
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness.machine import describe
from tests.fuzzing.mutations import FILE_TIMES, Crossed, Target, mutated, watched
from tests.fuzzing.targets import TARGETS

_STATUS = Path("/proc/self/status")


def checked(target: Target, content: bytes, folder: Path) -> None:
    """`watched`, and its memory."""
    before = _forget_peak()
    watched(target, content, folder)
    grown = _memory("VmHWM") - before
    if before and grown > FILE_TIMES * len(content) + target.base:
        raise Crossed(f"{grown >> 20} MiB of memory for a file of {len(content)} bytes")


def _forget_peak() -> int:
    """Bytes in memory now, from which the peak is counted on; 0 where the system does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _memory("VmRSS")
    except OSError:
        return 0


def _memory(name: str) -> int:
    if not _STATUS.exists():
        return 0
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def at_random(name: str, seconds: float, seed: int) -> int:
    """Tries made."""
    chance, end, tries = random.Random(f"{seed} {name}"), time.monotonic() + seconds, 0
    with tempfile.TemporaryDirectory() as work:
        while time.monotonic() < end:
            folder = Path(tempfile.mkdtemp(dir=work))
            content = mutated(chance.choice(TARGETS[name].seeds), chance)
            try:
                checked(TARGETS[name], content, folder)
            except Exception:
                _keep(name, content)
                raise
            tries += 1
    return tries


def by_coverage(name: str, seconds: float, seed: int) -> int:
    """Tries made; atheris ends the process at a finding, so that it gets one of its own."""
    with tempfile.TemporaryDirectory() as corpus:
        for number, content in enumerate(TARGETS[name].seeds):
            (Path(corpus) / str(number)).write_bytes(content)
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "tests.fuzzing",
                "--inside",
                name,
                "--",
                corpus,
                f"-max_total_time={seconds:.0f}",
            ]
            + [f"-seed={seed + 1}", "-max_len=65536", "-rss_limit_mb=8192", "-timeout=60", "-print_final_stats=1"],
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise Crossed(f"{name}: {(done.stdout + done.stderr)[-2000:]}")
    told = [line for line in done.stderr.splitlines() if line.startswith("stat::number_of_executed_units")]
    return int(told[-1].split()[-1]) if told else 0


def _inside(name: str, arguments: list[str]) -> None:
    """What runs in atheris' process."""
    import atheris

    target = TARGETS[name]
    for module in [module for key, module in sys.modules.items() if key.startswith(("mflux_vae.", "mflux_vae_train."))]:
        for function in [
            value for value in vars(module).values() if getattr(value, "__module__", "") == module.__name__
        ]:
            if hasattr(function, "__code__"):
                setattr(module, function.__name__, atheris.instrument_func(function))

    def once(content: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            try:
                checked(target, content, Path(folder))
            except Exception:
                _keep(name, content)
                raise

    atheris.Setup([sys.argv[0], *arguments], once)
    atheris.Fuzz()


def _keep(name: str, content: bytes) -> None:
    path = Path(tempfile.gettempdir()) / f"broke-{''.join(c if c.isalnum() else '-' for c in name)}"
    path.write_bytes(content)
    print(f"{name}: the input is in {path}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10, metavar="N", help="for each reader (default: 10)")
    parser.add_argument("--only", choices=TARGETS, help="one of them")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--inside", choices=TARGETS, help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        _inside(given.inside, given.rest)
        return 0
    logging.disable()  # broken files are what this is about
    guided = importlib.util.find_spec("atheris") is not None
    print(describe() + (", atheris" if guided else "; without atheris: at random, not by coverage"))
    print("| reader | files tried | found |\n|---|---|---|")
    found = 0
    for name in [given.only] if given.only else TARGETS:
        try:
            tries = (by_coverage if guided else at_random)(name, given.seconds, given.seed)
        except Exception as error:  # whatever a reader let through
            found += 1
            print(f"| {name} | | {type(error).__name__}: {' '.join(str(error).split())[:300]} |", flush=True)
        else:
            print(f"| {name} | {tries} | nothing |", flush=True)
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
