"""The console skips repeated messages and those in a progress bar; each end of a command has its exit status."""

from __future__ import annotations

import logging

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
