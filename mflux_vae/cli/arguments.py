"""Flags shared by commands, including those of other packages."""

from __future__ import annotations

from argparse import ArgumentParser

from mflux_vae.utils.paths import expand

PRECISIONS = ("float32", "float16", "bfloat16")

MODEL = "folder in diffusers' layout, weights file in any naming, preset (listed by info), or hub id"
CONFIG = "configuration of a file that has none: a preset, a config.json, or a YAML file with a ddconfig"
PICTURES = "image files, or folders of images"


def add_model(parser: ArgumentParser, *, needed: bool = True, aliases: tuple[str, ...] = ()) -> None:
    """Add the flags of commands that open a model."""
    default = "" if needed else " (default: the model that encoded the latents)"
    parser.add_argument("--model", *aliases, dest="model", type=expand, required=needed, help=MODEL + default)
    parser.add_argument("--config", type=expand, help=CONFIG)
    add_computing(parser)


def add_computing(parser: ArgumentParser) -> None:
    """Add the flags for precision and tiling."""
    parser.add_argument(
        "--dtype",
        choices=PRECISIONS,
        help="of the weights on Metal and CUDA (default: float32); CPUs use float32",
    )
    parser.add_argument(
        "--tiling",
        choices=("auto", "off", "blend", "exact"),
        default="auto",
        help="process large images in pieces: auto (default; only if memory is short), off, blend (overlapping tiles),"
        " exact (the untiled result)",
    )
    parser.add_argument("--tile", type=int, default=512, metavar="N", help="tile size in pixels (default: 512)")
