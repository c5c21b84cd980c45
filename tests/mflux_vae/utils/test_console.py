"""The console skips repeated messages and those in a progress bar; each end of a command has its exit status."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mflux_vae.errors import SettingsError, TrainingError
from mflux_vae.utils.console import logging_to_console, run_command

LEVELS = {"mflux_vae": logging.INFO, "mflux_vae_train": logging.INFO}


def test_repeated_messages_and_those_in_a_bar_are_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    component, training = logging.getLogger("mflux_vae"), logging.getLogger("mflux_vae_train.monitoring.progress")
    with logging_to_console(LEVELS):
        for path in ("vae", "vae", "other"):
            component.info("%s opened", path)
        for _ in range(2):
            training.info("update 5")
            component.warning("odd")
        training.info("update 6", extra={"in_bar": True})
    component.info("later")
    out, err = capsys.readouterr()
    assert out.splitlines() == ["vae opened", "other opened", "update 5", "update 5"]
    assert err.splitlines() == ["warning: odd"] * 2


def test_the_error_of_a_record_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with logging_to_console(LEVELS):
        try:
            raise ValueError("why")
        except ValueError:
            logging.getLogger("mflux_vae").exception("broken")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "warning: broken" and "Traceback" in lines[1] and lines[-1] == "ValueError: why"


def test_other_processes_than_the_first_write_errors_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_RANK", "1")
    with logging_to_console(LEVELS):
        logging.getLogger("mflux_vae_train").warning("odd")
        logging.getLogger("mflux_vae_train").error("broken")
    out, err = capsys.readouterr()
    assert (out, err) == ("", "warning: broken\n")


class Stopped(KeyboardInterrupt):
    exit_code = 143


@pytest.mark.parametrize(
    ("error", "status", "word"),
    [
        (None, 0, ""),
        (SettingsError("a flag"), 2, "error: a flag"),
        (TrainingError("a loss"), 1, "error: a loss"),
        (OSError("a disk"), 1, "error: a disk"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Stopped("by SIGTERM"), 143, "by SIGTERM"),
    ],
)
def test_each_end_of_a_command_has_its_exit_status(
    error: BaseException | None, status: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        if error is not None:
            raise error

    assert run_command("program", work, levels=LEVELS) == status
    assert capsys.readouterr().err == (f"program: {word}\n" if word else "")


@pytest.mark.parametrize("debug", [None, True])
def test_an_unexpected_error_keeps_its_traceback(debug: bool | None) -> None:
    def work() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command("program", work, levels=LEVELS, debug=debug)
    assert run_command("program", work, levels=LEVELS, debug=False) == 1


PRINTS = """
import logging, sys
from mflux_vae.utils.console import run_command

def work():
    print("\\u2b50 \\udce9")
    logging.getLogger("mflux_vae").warning("\\u2b50")
    with open(sys.argv[1], "w") as file:
        print("into the stream", flush=True)
        file.write("into the file")

sys.exit(run_command("program", work, levels={"mflux_vae": logging.INFO}))
"""


@pytest.mark.parametrize(
    ("variables", "ends"),
    [({"PYTHONIOENCODING": "ascii"}, ""), ({"LC_ALL": "C", "PYTHONUTF8": "0"}, ""), ({}, ">&-"), ({}, ">&- 2>&- <&-")],
)
def test_a_console_takes_any_character_and_may_be_closed(variables: dict[str, str], ends: str, tmp_path: Path) -> None:
    (tmp_path / "prints.py").write_text(PRINTS)
    command = f"'{sys.executable}' '{tmp_path / 'prints.py'}' '{tmp_path / 'out'}' {ends}"
    done = subprocess.run(command, shell=True, capture_output=True, env={**os.environ, **variables}, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "into the file"
    if not ends:
        assert done.stdout.split() == [b"\\u2b50", b"\\udce9", b"into", b"the", b"stream"]
        assert done.stderr == b"warning: \\u2b50\n"
