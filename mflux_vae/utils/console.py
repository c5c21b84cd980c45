"""What all commands share: log lines on the console, errors of one line, exit statuses."""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from mflux_vae.errors import MfluxVaeError
from mflux_vae.runtime.device_errors import device_error
from mflux_vae.runtime.process import launched_rank
from mflux_vae.utils.redaction import redacted

EXTENSION = "mflux_vae.kernels.cpu.extension"
"""Logger that says once why the native extension is not used."""


class ConsoleHandler(logging.Handler):
    """Writes log lines between the updates of a progress bar; warnings and errors always go to standard error.

    Skips records that a progress bar shows (extra `in_bar`) and repeated INFO messages of `mflux_vae`, such as those
    about an autoencoder that is opened for every preview. Of several processes only the first one writes anything but
    errors.

    Args:
        stream: "stdout" or "stderr", for records below WARNING.
    """

    def __init__(self, stream: str) -> None:
        super().__init__()
        self._stream = stream
        self._seen: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if getattr(record, "in_bar", False) or (record.levelno < logging.ERROR and not _is_first_process()):
            return
        message = redacted(record.getMessage())
        if record.exc_info and record.exc_info[1] is not None:
            message = redacted(f"{message}\n{logging.Formatter().formatException(record.exc_info)}")
        if record.levelno == logging.INFO and record.name.split(".")[0] == "mflux_vae":
            if message in self._seen:
                return
            self._seen.add(message)
        if record.levelno >= logging.WARNING:
            tqdm.write(f"warning: {message}", file=sys.stderr)
        else:
            stream = getattr(sys, self._stream)
            tqdm.write(message, file=stream)
            stream.flush()


def _is_first_process() -> bool:
    """`ProcessGroup.is_main` before MLX is imported."""
    return not launched_rank()


@contextmanager
def logging_to_console(levels: Mapping[str, int], stream: str = "stdout") -> Iterator[None]:
    """Within the block these loggers write to the console, from the given levels on."""
    handler = ConsoleHandler(stream)
    loggers = {name: logging.getLogger(name) for name in levels}
    before = {name: logger.level for name, logger in loggers.items()}
    for name, logger in loggers.items():
        if not any(name.startswith(f"{parent}.") for parent in loggers):  # whose lines reach the parent
            logger.addHandler(handler)
        logger.setLevel(levels[name])
    try:
        yield
    finally:
        for name, logger in loggers.items():
            logger.removeHandler(handler)
            logger.setLevel(before[name])


def run_command(
    program: str,
    work: Callable[[], object],
    *,
    levels: Mapping[str, int],
    stream: str = "stdout",
    debug: bool | None = None,
    early: Iterable[warnings.WarningMessage] = (),
) -> int:
    """Run a command: log lines to the console, an error as one line on standard error.

    Args:
        levels: see `logging_to_console`; the first logger also takes Python's warnings. Every command says why it
            computes slower than it could.
        debug: whether unexpected errors keep their traceback; None for a command without --debug, where they do.
        early: warnings from before this call.

    Returns:
        exit status: 0 after success, 2 for bad input, 1 for a failure, 130 after SIGINT, 143 after SIGTERM, 141 if
        the reader of standard output has gone.
    """
    prepare_streams()
    show, logger = warnings.showwarning, logging.getLogger(next(iter(levels)))
    warnings.showwarning = lambda message, *_, **__: logger.warning("%s", message)
    try:
        with logging_to_console({**levels, EXTENSION: logging.INFO}, stream):
            for warning in early:
                logger.warning("%s", warning.message)
            work()
            sys.stdout.flush()
            return 0
    except KeyboardInterrupt as interrupt:
        return _fail(program, str(interrupt) or "interrupted", getattr(interrupt, "exit_code", 130))
    except MfluxVaeError as error:
        return _fail(program, f"error: {error}", error.exit_code)
    except BrokenPipeError:  # the reader, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports it at exit
        return 141
    except Exception as error:  # a full disk, too little memory
        if (failure := device_error(error)) is not None and not debug:
            return _fail(program, f"error: {failure}", failure.exit_code)
        known = isinstance(error, OSError)
        if debug or (debug is None and not known):
            raise
        hint = "" if debug is None else " (--debug shows where)"
        return _fail(program, f"error: {'' if known else f'{type(error).__name__}: '}{error}{hint}", 1)
    finally:
        warnings.showwarning = show


def prepare_streams() -> None:
    """Let standard streams take any text: characters that their encoding lacks are written as escapes.

    A closed stream is replaced by the null device; otherwise the next opened file would take its number, and print
    into it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            null = open(os.devnull, "w", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            setattr(sys, name, null)
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")


def _fail(program: str, line: str, status: int) -> int:
    print(f"{program}: {redacted(' '.join(line.split()))}", file=sys.stderr)
    return status
