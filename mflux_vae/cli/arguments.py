"""Flags that commands share, here and in packages that add commands to ``mflux-vae``."""

from __future__ import annotations

from argparse import ArgumentParser

PRECISIONS = ("float32", "float16", "bfloat16")

MODEL = "a folder in diffusers' layout, a weights file in any naming, a preset's name (info lists them), a hub id"
CONFIG = "what to take a file for, where it does not say: a preset's name, a config.json, a YAML with a ddconfig"
PICTURES = "picture files, or folders of them"


def add_model(parser: ArgumentParser, *, needed: bool = True, aliases: tuple[str, ...] = ()) -> None:
    """What every command has that computes."""
    default = "" if needed else " (default: the one that the latents were made with)"
    parser.add_argument("--model", *aliases, dest="model", required=needed, help=MODEL + default)
    parser.add_argument("--config", help=CONFIG)
    add_computing(parser)


def add_computing(parser: ArgumentParser) -> None:
    """How a command computes."""
    parser.add_argument(
        "--dtype", choices=PRECISIONS, help="to compute in (default: bfloat16; on a CPU always float32)"
    )
    parser.add_argument(
        "--tiling",
        choices=("auto", "off", "blend", "exact"),
        default="auto",
        help="cut large images: auto (default) where memory asks for it, off, blend (overlapping tiles), exact (the"
        " values of one piece)",
    )
    parser.add_argument("--tile", type=int, default=512, metavar="N", help="size of a tile in pixels (default: 512)")
