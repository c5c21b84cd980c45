"""``mflux-vae``: describe, encode, decode, compare and convert.

Heavy imports are late, so that ``--help`` and a mistyped flag answer at once.

Installed packages add commands through the entry-point group ``mflux_vae.commands``: the entry is a function that adds
flags to a parser and returns the function to run with their values as keywords. The first line of its docstring is the
help text.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mflux_vae.cli.arguments import CONFIG, MODEL, PICTURES, PRECISIONS, add_computing, add_model
from mflux_vae.utils.command_line import CommandParser
from mflux_vae.utils.console import run_command
from mflux_vae.utils.paths import expand

PROG = "mflux-vae"
LOGGER = "mflux_vae"
GROUP = "mflux_vae.commands"
BUILTIN = ("info", "encode", "decode", "compare", "convert")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, see `run_command`."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    levels = {LOGGER: logging.DEBUG if debug else logging.WARNING}
    return run_command(PROG, lambda: _dispatch(words), levels=levels, stream="stderr", debug=debug)


def _dispatch(words: Sequence[str]) -> None:
    settings = vars(_parser(() if words and words[0] in BUILTIN else _registered()).parse_args(words))
    settings.pop("debug")
    import_module("mflux_vae.runtime.device")  # one clear error where MLX cannot be imported
    settings.pop("run")(**settings)


def _parser(registered: Sequence[EntryPoint] = ()) -> argparse.ArgumentParser:
    parser = CommandParser(
        prog=PROG, description="Encode images to latents and decode them, with any autoencoder in wide use."
    )
    commands = parser.add_commands()

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        added.add_argument("--debug", action="store_true", help="log shapes, time and memory of each stage")
        added.set_defaults(run=lambda **settings: _run(name, settings))
        return added

    info = command("info", "Describe a weights file or folder (family, parameters, scaling, memory) or a latent file.")
    info.add_argument("model", type=expand, nargs="?", help=f"{MODEL}; or a latent file (default: list the presets)")
    info.add_argument("--config", type=expand, help=CONFIG)
    info.add_argument("--json", dest="as_json", action="store_true", help="print JSON")

    encode = command("encode", "Encode images to one latent file. The same command resumes after an interruption.")
    encode.add_argument("pictures", type=expand, nargs="+", help=PICTURES)
    encode.add_argument(
        "--output", type=expand, required=True, metavar="FILE", help="latent file to write, .safetensors"
    )
    add_model(encode)

    decode = command("decode", "Decode a latent file to PNG files with the names and sizes of the images.")
    decode.add_argument("latents", type=expand, help="latent file written by encode")
    decode.add_argument("--output", type=expand, required=True, metavar="FOLDER", help="folder for the PNG files")
    add_model(decode, needed=False)

    compare = command("compare", "Compare models on the same images: side by side, measured and timed.")
    compare.add_argument("models", type=expand, nargs="+", help=f"{MODEL}; also LAPA's latent action quantizer")
    compare.add_argument(
        "--images", "--image", dest="pictures", type=expand, nargs="+", required=True, metavar="FILE", help=PICTURES
    )
    compare.add_argument(
        "--output", type=expand, required=True, metavar="FOLDER", help="folder for comparison.png and comparison.json"
    )
    compare.add_argument(
        "--size",
        type=int,
        metavar="N",
        help="side of the centre squares in pixels (default: 256, or the largest fixed size if all models have one)",
    )
    compare.add_argument(
        "--first_frame",
        choices=("self", "previous"),
        default="self",
        help="first frame for models that take pairs: the image itself (default) or the previous image",
    )
    compare.add_argument(
        "--lpips",
        type=expand,
        nargs="+",
        metavar="FILE",
        help="measure LPIPS: files with weights of VGG16 and of its channels",
    )
    compare.add_argument(
        "--config", dest="configs", type=expand, action="append", help=f"{CONFIG}; once per model, in order, - for none"
    )
    compare.add_argument(
        "--amplify", type=float, default=8.0, metavar="X", help="factor of the difference (default: 8)"
    )
    compare.add_argument("--json", dest="as_json", action="store_true", help="print JSON")
    add_computing(compare)

    convert = command("convert", "Convert weights to another key naming.")
    convert.add_argument("model", type=expand, help=MODEL)
    convert.add_argument("output", type=expand, help="file or folder to write")
    convert.add_argument("--naming", default="diffusers", help="diffusers (default), compvis, bfl, wan or taesd")
    convert.add_argument("--config", type=expand, help=CONFIG)
    convert.add_argument("--dtype", choices=PRECISIONS, help="dtype of the weights (default: unchanged)")
    convert.add_argument("--overwrite", action="store_true", help="replace files that exist")

    for entry in registered:
        try:
            add = entry.load()
            added = command(entry.name, (add.__doc__ or "").strip().partition("\n")[0].replace("%", "%%"))
            added.set_defaults(run=add(added))
        except Exception as error:  # any error of a plugin; the other commands still work
            logging.getLogger(LOGGER).warning("command %s is broken (%s: %r)", entry.name, entry.value, error)
    return parser


def _registered() -> list[EntryPoint]:
    """Commands of installed packages, sorted by name; duplicates and built-in names are skipped with a warning."""
    found: dict[str, EntryPoint] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, entry.value)):
        other = found.setdefault(entry.name, entry)
        if entry.name in BUILTIN or other.value != entry.value:
            logging.getLogger(LOGGER).warning("command %s exists already; ignoring %s", entry.name, entry.value)
    return [entry for name, entry in found.items() if name not in BUILTIN]


def _run(name: str, settings: dict[str, Any]) -> None:
    from mflux_vae.cli import commands

    getattr(commands, name)(**settings)
