"""``mflux-dreambooth``: what precedes and follows a training.

Each module has a function of its name. It adds flags to a parser and returns the function to run with their values as
keywords; the first line of its docstring is the help text. Heavy imports are inside functions, so that ``--help`` and a
mistyped flag answer at once.
"""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from importlib import import_module

from mflux_vae.utils.command_line import CommandParser
from mflux_vae_train.dreambooth.commands.adapter import adapter
from mflux_vae_train.dreambooth.commands.check import check
from mflux_vae_train.dreambooth.commands.draw import draw
from mflux_vae_train.dreambooth.commands.evaluate import evaluate

PROG = "mflux-dreambooth"
LOGGERS = ("mflux_vae", "mflux_vae_train")

Run = Callable[..., object]

COMMANDS: tuple[Callable[[ArgumentParser], Run], ...] = (check, draw, evaluate, adapter)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, see `run_command`."""
    words = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings(record=True) as early:  # importing mflux_vae warns on a CPU without a fast BLAS
        from mflux_vae.utils.console import run_command
    levels = dict.fromkeys(LOGGERS, logging.INFO)
    return run_command(PROG, lambda: _dispatch(words), levels=levels, stream="stderr", early=early)


def _dispatch(words: Sequence[str]) -> None:
    values = vars(_parser().parse_args(words))
    import_module("mflux_vae.runtime.device")  # one clear error where MLX cannot be imported
    values.pop("run")(**values)


def _parser() -> ArgumentParser:
    parser = CommandParser(prog=PROG, description="Draw with what mflux-train-dreambooth trained, and compare.")
    parser.add_functions(COMMANDS, "run")
    return parser
