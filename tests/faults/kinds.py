"""Faults: functions that start a run, make it suffer, and let it go on. What they need of a run, `Try` has."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mflux_vae_train.checkpointing import checkpoint
from tests.faults.runs import DREAMBOOTH, EXAMPLE, Process, Training, Wrong, intact, is_root, kept, made


@dataclass(frozen=True)
class Try:
    """Where a fault happens.

    Attributes:
        out: an empty folder for the run.
        seconds, updates, changes, size: how long the run takes that suffers nothing, the updates that it makes, how
            often it changes a file, and the bytes that it leaves.
    """

    training: Training
    out: Path
    chance: random.Random
    seconds: float
    updates: int
    changes: int
    size: int

    @property
    def folder(self) -> Path:
        return self.training.folder(self.out)

    def started(self, **options: object) -> Process:
        return self.training.start(self.out, **options)  # type: ignore[arg-type]

    def goes_on(self) -> None:
        self.started().finished()

    def in_the_middle(self) -> Process:
        """A run that has just written its second checkpoint, and trains on."""
        process = self.started()
        second = self.folder / f"checkpoint-{2 * self.training.interval}"
        if not process.wait_for(second.is_dir):
            raise Wrong("no second checkpoint")
        return process


Fault = Callable[[Try], str]
"""Makes it happen, and the run go on; what was hit, in a word or two."""


def killed(at: Try) -> str:
    """By SIGKILL, at a random time or before a random change of a file."""
    if at.chance.random() < 0.5:
        process = at.started(faulty=[f"--kill_before={at.chance.randint(1, at.changes)}", f"--folder={at.folder}"])
        process.popen.wait(600)
    else:
        process = at.started()
        time.sleep(at.chance.uniform(0, at.seconds))
        process.popen.kill()
        process.popen.wait()
    return _lost(at)


def _lost(at: Try) -> str:
    """What a run was about when it ended, after a look at what it lost: never more than an interval."""
    updates, safe = made(at.folder), kept(at.folder)
    if updates - safe > at.training.interval:
        raise Wrong(f"{updates} updates made, {safe} kept")
    return _left(at, updates)


def _left(at: Try, updates: int) -> str:
    """What a run was about that ended after so many updates, and now goes on."""
    begun = at.folder.is_dir()
    intact(at.folder)
    at.goes_on()
    if updates:
        return "between updates and saves"
    return "pictures" if begun else "starting"


def interrupted(at: Try) -> str:
    """By SIGINT or SIGTERM, after a random update or before a random change of a file, pictures among them.

    It ends within an update, has lost nothing, and says so.
    """
    number, before = at.chance.choice([signal.SIGINT, signal.SIGTERM]), None
    if at.chance.random() < 0.5:
        change = [f"--kill_before={at.chance.randint(1, at.changes)}", f"--by={number.name}"]
        process = at.started(faulty=[*change, f"--folder={at.folder}"])
    else:
        process, target = at.started(), at.chance.randrange(at.updates)
        begun = at.folder / "settings.yaml"
        process.wait_for(lambda: begun.exists() and made(at.folder) >= target)
        time.sleep(at.chance.uniform(0, 0.5))
        before = made(at.folder)
        process.popen.send_signal(number)
    status, said = process.end()
    after, safe = made(at.folder), kept(at.folder)
    if status == 0 or (status == -number and after == at.updates):  # its work was done by then
        return "came too late"
    if status != 128 + number or f"interrupted by {signal.Signals(number).name}" not in said:
        raise Wrong(f"status {status} after {signal.Signals(number).name}: {said[-300:]!r}")
    if (before is not None and after > before + 1) or safe != after:
        raise Wrong(f"{before} updates before it, {after} after it, {safe} kept")
    return _left(at, after)


def interrupted_twice(at: Try) -> str:
    """By SIGINT, and again at once: no more waiting."""
    process = at.started()
    process.wait_for(lambda: made(at.folder) > 0)
    process.popen.send_signal(signal.SIGINT)
    process.wait_for(lambda: "again to stop at once" in process.said())
    process.popen.send_signal(signal.SIGINT)
    status, _ = process.end()
    intact(at.folder)
    at.goes_on()
    return {0: "came too late", 130: "was saved already", -signal.SIGINT: "ended at once"}[status]


def disk_full(at: Try) -> str:
    """A disk that is full after a random share of what the run writes."""
    share = 0.95 * 10 ** at.chance.uniform(-3, 0)  # of a thousandth on: pictures are small, checkpoints large
    if not is_root():
        hit = _full(at, at.started(limit=max(100, int(share * at.size / 4))))
        at.goes_on()
        return hit
    with _disk(at.out, size=int(share * at.size)) as grown:
        hit = _full(at, at.started())
        grown()
        at.goes_on()
        _keep(at)
    return hit


def _full(at: Try, process: Process) -> str:
    """What a run was about when the disk was full, after a look at what it left."""
    status, said = process.end()
    if status not in (0, 1, 2):
        raise Wrong(f"exit status {status}: {said[-300:]!r}")
    intact(at.folder)
    return "nothing" if status == 0 else "saving" if made(at.folder) else "starting, pictures"


def read_only(at: Try) -> str:
    """An output folder on a disk that became read-only since the run was killed."""
    with _disk(at.out, size=8 * at.size) as remounted:
        process = at.in_the_middle()
        process.popen.kill()
        process.popen.wait()
        remounted("ro")
        at.started().refused(2, "cannot be written (Read-only file system)")
        intact(at.folder)
        remounted("rw")
        at.goes_on()
        _keep(at)
    return "refused"


def damaged(at: Try) -> str:
    """The newest checkpoint truncated, or one bit of it flipped: the one before it is taken, and the bad one named."""
    process = at.in_the_middle()
    process.popen.kill()
    process.popen.wait()
    newest = checkpoint.latest(at.folder)
    assert newest is not None
    file = newest / at.chance.choice([checkpoint.ARRAYS, checkpoint.VALUES])
    content = bytearray(file.read_bytes())
    place = at.chance.randrange(len(content))
    if cut := at.chance.random() < 0.5:
        del content[place:]
    else:
        content[place] ^= 1 << at.chance.randrange(8)
    file.write_bytes(content)
    process = at.started()
    status, said = process.end()
    if status or f"skipped: {newest}" not in said:
        raise Wrong(f"exit status {status}, and {newest} is not named: {said[-300:]!r}")
    return "truncated" if cut else "a bit flipped"


def picture_gone(at: Try) -> str:
    """A picture deleted or replaced while the run trains: it does not matter to this run, and the next one says it."""
    pictures = Path(shutil.copytree(EXAMPLE, at.out.parent / "pictures", dirs_exist_ok=True))
    process = at.started(pictures=pictures)
    process.wait_for(lambda: made(at.folder) > 3)  # an autoencoder has seen all of them by then
    victim, replaced = pictures / "1.png", at.chance.random() < 0.5
    if replaced:
        shutil.copy(pictures / "2.png", victim)
    else:
        victim.unlink()
    process.finished()
    at.started(pictures=pictures).refused(2, "pictures was" if at.training is DREAMBOOTH else "images was")
    return "replaced" if replaced else "deleted"


def two_at_once(at: Try) -> str:
    """Two runs started into one folder: one trains, the other is refused."""
    processes = [at.started(), at.training.start(at.out, said=at.out.parent / "second.said")]
    ended = [process.end() for process in processes]
    statuses = sorted(status for status, _ in ended)
    if statuses == [0, 0]:  # the second came after the end of the first
        return "one after the other"
    if statuses != [0, 2] or sum("another process is using this folder" in said for _, said in ended) != 1:
        raise Wrong(f"exit statuses {statuses}: {[said[-200:] for _, said in ended]}")
    return "refused"


def clock_back(at: Try) -> str:
    """Killed, and continued while the clock runs backwards."""
    process = at.in_the_middle()
    process.popen.kill()
    process.popen.wait()
    at.started(faulty=["--clock_back"]).finished()
    return "continued"


def out_of_memory(at: Try) -> str:
    """In a random update: the one before it is saved, and the line says so."""
    update = at.chance.randint(1, at.updates)
    kept_there = f"continues after update {update - 1}" if update > 1 else "no update is saved"
    at.started(faulty=[f"--fail_update={update}"]).refused(1, "out of memory", kept_there)
    if kept(at.folder) != update - 1:
        raise Wrong(f"{kept(at.folder)} updates kept before update {update}")
    return _left(at, update - 1)


FAULTS: dict[str, tuple[Fault, int]] = {
    "killed": (killed, 50),
    "interrupted": (interrupted, 10),
    "interrupted_twice": (interrupted_twice, 4),
    "disk_full": (disk_full, 10),
    "read_only": (read_only, 2),
    "damaged": (damaged, 10),
    "picture_gone": (picture_gone, 4),
    "two_at_once": (two_at_once, 4),
    "clock_back": (clock_back, 2),
    "out_of_memory": (out_of_memory, 6),
}
"""Each, and how often it is tried."""

NEEDING_ROOT = ("read_only",)
"""On Linux."""


@contextmanager
def _disk(folder: Path, size: int) -> Iterator[Callable[..., None]]:
    """A disk of so many bytes at a folder; what is given mounts it again: with options, or large."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)

    def remount(options: str = "size=1g") -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    try:
        yield remount
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _keep(at: Try) -> None:
    """Carries the run out of a disk that is about to go."""
    shutil.copytree(at.out, at.out.parent / "kept", dirs_exist_ok=False)
