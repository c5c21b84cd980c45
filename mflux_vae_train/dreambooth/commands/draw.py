"""``mflux-dreambooth draw``."""

from __future__ import annotations

import json
import logging
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mflux_vae.errors import SettingsError
from mflux_vae.utils.formatting import count_text
from mflux_vae.utils.paths import expand
from mflux_vae_train.dreambooth.commands.arguments import add_source, check_scales, check_text, source_of

if TYPE_CHECKING:
    from mflux_vae_train.dreambooth.drawing.draw import Request
    from mflux_vae_train.dreambooth.drawing.source import Source

logger = logging.getLogger(__name__)

FOLDER = "drawn"
"""Default output, in the run's folder or here."""


def draw(parser: ArgumentParser) -> Callable[..., None]:
    """Draw with the adapter of a run or a file, at any strength: one picture or a labelled sheet.

    Without flags, the run's last preview is drawn again, bit for bit on the same device.
    """
    add_source(parser)
    add = parser.add_argument_group("pictures (all combinations are drawn)").add_argument
    add("--prompt", nargs="+", action="extend", metavar="TEXT", help="prompts (default: the run's validation prompts)")
    add("--negative_prompt", metavar="TEXT", help="what to lead away from, with classifier-free guidance")
    add("--scale", type=float, nargs="+", metavar="X", help="strengths of the adapter: 0 untrained, 1 trained [1]")
    add("--compare_base", action="store_true", help="also draw with the untrained model, as --scale 0 does")
    add(
        "--checkpoint",
        nargs="+",
        metavar="N",
        help="updates of the run's checkpoints, last, or best (of --keep_best) [last]",
    )
    add("--seed", type=int, nargs="+", metavar="N", help="seeds (default: the run's, or 0)")
    add(
        "--images",
        type=int,
        metavar="N",
        help="images per prompt and seed (default: the run's previews, or 1 if checkpoints, scales or seeds are"
        " compared); equal to the previews bit for bit if there are as many",
    )
    add = parser.add_argument_group("output").add_argument
    add(
        "--output",
        type=expand,
        metavar="PATH",
        help=f"a PNG file, or a folder in which pictures are numbered (default: {FOLDER} in the run's folder, or here)",
    )
    add("--json", dest="as_json", action="store_true", help="print the files and their settings as JSON")
    return _run


def _run(
    *,
    prompt: Sequence[str] | None,
    negative_prompt: str | None,
    scale: Sequence[float] | None,
    compare_base: bool,
    checkpoint: Sequence[str] | None,
    seed: Sequence[int] | None,
    images: int | None,
    output: str | None,
    as_json: bool,
    **values: Any,
) -> None:
    from mflux_vae_train.dreambooth.drawing.draw import draw
    from mflux_vae_train.dreambooth.drawing.output import new_picture, pictures_folder

    source = source_of(values)
    negative = _readable(source, negative_prompt, "--negative_prompt") if negative_prompt else ""
    source = source.changed(negative_prompt=negative)
    request = _request(source, prompt, _scales(source, scale, compare_base), checkpoint, seed, images)
    default = FOLDER if source.root is None else str(source.root / FOLDER)
    target = new_picture(output or default, several=len(request.cells) > 1)
    drawn = draw(source, request, target)
    if as_json:
        print(json.dumps(drawn, indent=2))
        return
    if drawn["sheet"] is not None:
        count = count_text(len(drawn["pictures"]), "picture")
        print(f"{target}: {count}, also as files in {pictures_folder(target)}")
    else:
        print(target)


def _scales(source: Source, given: Sequence[float] | None, compare_base: bool) -> Sequence[float]:
    if given and source.untrained is not None:
        raise SettingsError(f"--scale: {source.path} trained all weights, which have no strength; try --compare_base")
    scales = given or [1.0]
    check_scales(scales)
    return [0.0, *scales] if compare_base else scales


def _request(
    source: Source,
    prompts: Sequence[str] | None,
    scales: Sequence[float],
    checkpoints: Sequence[str] | None,
    seeds: Sequence[int] | None,
    images: int | None,
) -> Request:
    from mflux_vae_train.dreambooth.drawing.draw import Request

    if not (prompts or source.prompts):
        raise SettingsError(f"--prompt is missing: {source.path} does not say what to draw")
    labels = [source.label(name) for name in checkpoints] if checkpoints else [source.chosen]
    if wrong := [seed for seed in seeds or () if not 0 <= seed < 2**32]:
        raise SettingsError(f"--seed is {wrong[0]}; give 0 to {2**32 - 1}")
    if images is not None and images < 1:
        raise SettingsError(f"--images is {images}; give 1 or more")
    seeds = seeds or [source.seed]
    compares = any(len({*values}) > 1 for values in (labels, scales, seeds))
    return Request(
        prompts=[_readable(source, prompt) for prompt in prompts or source.prompts],
        checkpoints=labels,
        scales=scales,
        seeds=seeds,
        images=images or (1 if compares else source.images),
    )


def _readable(source: Source, prompt: str, flag: str = "--prompt") -> str:
    """The prompt with the run's identifier in place of words such as ``[trigger]``."""
    from mflux_vae_train.dreambooth.data.placeholders import replace_placeholders

    check_text(prompt, flag)
    filled, found = replace_placeholders(prompt, source.identifier, flag, "write the word that names the subject")
    if found:
        logger.warning("%s in %s is replaced by %r", ", ".join(found), flag, source.identifier)
    return filled
