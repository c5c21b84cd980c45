"""Faults, made for real, and what a run loses by them: no more than the updates since its last checkpoint.

    python -m tests.faults [--only NAME] [--times N] [--seed N]

Each try trains in processes of its own, DreamBooth on the embedded pipeline and an autoencoder in turns, suffers the
fault, is looked at (nothing half written under its final name), goes on where it stopped, and must end with the very
files of a run that suffered nothing. Full and read-only disks are file systems in memory, which Linux lets root mount;
elsewhere a limit on the size of files stands for the full disk, and the read-only one is left out.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from benchmarks.machine import describe
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
