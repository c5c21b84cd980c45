"""What training says, on a console."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class Console(logging.Handler):
    """Lines on standard output, warnings on standard error, neither through the middle of a progress bar.

    What a bar shows at the moment, and says for a log's sake only (`on_bar`), is left out, and so is what the component
    says again: an autoencoder that comes and goes is opened for every preview. Of several processes that
    were launched together the first one speaks; of the others errors are heard.
    """

    def __init__(self) -> None:
        super().__init__()
        self._known: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        from mflux_vae.utils.redaction import redacted  # late: the component warns where there is no fast BLAS

        if getattr(record, "on_bar", False) or (record.levelno < logging.ERROR and not _first()):
            return

        message = redacted(record.getMessage())
        if record.name.split(".")[0] == "mflux_vae" and record.levelno < logging.WARNING:
            if message in self._known:
                return
            self._known.add(message)
        if record.levelno >= logging.WARNING:
            tqdm.write(f"warning: {message}", file=sys.stderr)
        else:
            tqdm.write(message, file=sys.stdout)
            sys.stdout.flush()


def _first() -> bool:
    """As `distributed.ProcessGroup.is_main`, and without MLX: what its launcher, or MPI's, tells each process."""
    ranks = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    return next((os.environ[name] for name in ranks if name in os.environ), "0") == "0"


@contextmanager
def logging_to_console(loggers: Sequence[str]) -> Iterator[None]:
    """Within the block what these loggers say at INFO and above comes to the console."""
    handler = Console()
    for name in loggers:
        logging.getLogger(name).addHandler(handler)
        logging.getLogger(name).setLevel(logging.INFO)
    try:
        yield
    finally:
        for name in loggers:
            logging.getLogger(name).removeHandler(handler)
