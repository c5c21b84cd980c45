"""Inject faults into training runs: no run may lose more than the updates since its last checkpoint.

    python -m tests.faults [--only NAME] [--times N] [--seed N]

Each try trains in separate processes (DreamBooth on the embedded pipeline, an autoencoder), injects the fault, checks
that no file is half-written under its final name, resumes, and compares every file with those of an undisturbed run.
Full and read-only disks are file systems in memory, which need root on Linux; elsewhere a limit on file sizes stands
for the full disk, and the read-only disk is skipped.

Measured on 2026-11-21 (two cores, Intel Xeon, MLX 0.32.4). Nothing was lost beyond the updates since a checkpoint:

| fault | tries | hit | `--only` |
|---|---|---|---|
| SIGKILL | 90 | 57 between updates and saves, 30 at class images and encodings, 3 at the start | `killed` |
| SIGINT, SIGTERM | 10 | 8 between updates and saves, 2 at class images; exit status 130 or 143 | `interrupted` |
| two signals | 4 | ended at once | `interrupted_twice` |
| disk full | 10 | 6 at class images, 4 at a save | `disk_full` |
| output read-only | 2 | refused in one line, later resumed | `read_only` |
| checkpoint truncated, or a bit flipped | 10 | 4 and 6; named, the previous one used | `damaged` |
| image deleted or replaced | 4 | 2 and 2; this run unharmed, the next one refuses | `picture_gone` |
| two runs in one folder | 4 | one trained, one refused | `two_at_once` |
| clock runs backwards | 2 | resumed | `clock_back` |
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.harness.machine import describe
from tests.faults.kinds import FAULTS, NEEDING_ROOT, Fault, Try
from tests.faults.runs import TRAININGS, Training, Wrong, emptied, is_root, left, made, same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=FAULTS, help="one of the faults")
    parser.add_argument("--times", type=int, metavar="N", help="how often (default: what the table says)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is left to chance (default: 0)")
    given = parser.parse_args()
    print(describe())
    wrong = 0
    with tempfile.TemporaryDirectory() as work:
        room = Path(work)
        expected = {training.name: _undisturbed(training, room / training.name) for training in TRAININGS}
        print("| fault | tries | what was hit | lost beyond the last checkpoint | command |\n|---|---|---|---|---|")
        for name, (fault, usual) in FAULTS.items():
            if name in NEEDING_ROOT and not is_root():
                print(f"{name}: not tried; a disk in memory is needed, which Linux lets root mount", file=sys.stderr)
            elif given.only in (None, name):
                wrong += _tried(name, fault, given.times or usual, given.seed, expected, room / "try")
    return int(wrong > 0)


def _undisturbed(training: Training, room: Path) -> tuple[dict[str, bytes], float, int, int]:
    """What a run leaves that suffers nothing, the seconds it takes, its updates, and how often it changes a file."""
    began = time.monotonic()
    out = emptied(room / "out")
    training.start(out).finished()
    seconds, result = time.monotonic() - began, left(training.folder(out))
    out = emptied(room / "out")
    process = training.start(out, faulty=["--count", f"--folder={training.folder(out)}"])
    process.finished()
    same(training.folder(out), result)
    changes = int(process.said().rpartition("changes of files: ")[2].split()[0])
    return result, seconds, made(training.folder(out)), changes


def _tried(name: str, fault: Fault, times: int, seed: int, expected: dict[str, tuple], room: Path) -> int:
    """Tries a fault, prints its row, and returns how often something was wrong."""
    hit: Counter[str] = Counter()
    wrong = []
    for number in range(times):
        training = TRAININGS[number % len(TRAININGS)]
        result, seconds, updates, changes = expected[training.name]
        size = sum(map(len, result.values()))
        chance = random.Random(f"{seed} {name} {number}")
        at = Try(training, emptied(room) / "out", chance, seconds, updates, changes, size)
        at.out.mkdir()
        try:
            hit[fault(at)] += 1
            kept_at = room / "kept" if (room / "kept").is_dir() else at.out
            same(training.folder(kept_at), result)
        except Wrong as error:
            wrong.append(f"{training.name}, try {number}: {error}")
    what = ", ".join(f"{kind} {count}" for kind, count in hit.most_common())
    lost = f"{len(wrong)} of {times} tries" if wrong else "nothing"
    print(f"| {name.replace('_', ' ')} | {times} | {what} | {lost} | `python -m tests.faults --only {name}` |")
    for line in wrong:
        print(f"  {line}", file=sys.stderr)
    sys.stdout.flush()
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
