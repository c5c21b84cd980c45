"""``mflux-dreambooth evaluate``."""

from __future__ import annotations

import json
import logging
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mflux_vae.errors import SettingsError
from mflux_vae.utils.paths import expand
from mflux_vae_train.dreambooth.commands.arguments import add_source, check_scales, check_text, source_of

if TYPE_CHECKING:
    from mflux_vae_train.evaluation.evaluator import Evaluator, Subject

logger = logging.getLogger(__name__)


def evaluate(parser: ArgumentParser) -> Callable[..., None]:
    """Measure the checkpoints of a run at several strengths, and recommend one.

    The result goes to the run's folder `evaluation` and to its report. A repeated command draws only what is missing.
    """
    add_source(parser)
    add = parser.add_argument_group("what is evaluated").add_argument
    add("--checkpoint", "--checkpoints", nargs="+", metavar="N", help="updates, last, or best (default: all)")
    add("--scale", "--scales", type=float, nargs="+", default=[1.0], metavar="X", help="strengths of the adapter [1]")
    add("--images", type=int, default=4, metavar="N", help="images per prompt [4]")
    add("--quick", action="store_true", help="fewer prompts: a quarter, of DreamBench's a fifth")
    add("--seed", type=int, metavar="N", help="seed of the noise (default: the run's)")
    add("--json", dest="as_json", action="store_true", help="print JSON")
    add = parser.add_argument_group("networks").add_argument
    add("--dino", type=expand, metavar="SOURCE", help="DINO: folder or owner/name [facebook/dino-vits16]")
    add("--clip", type=expand, metavar="SOURCE", help="CLIP: folder or owner/name [openai/clip-vit-base-patch32]")
    add("--lpips", type=expand, nargs="+", metavar="FILE", help="also measure diversity: VGG16 and its channel weights")
    group = parser.add_argument_group("subject (default: by the run's instance prompt)")
    add = group.add_argument
    add("--subject", metavar="TEXT", help="names the subject in prompts, as in 'sks dog'")
    add("--class_noun", metavar="TEXT", help="names its class, as in 'dog'")
    add("--instance_prompt", metavar="TEXT", help="which subject, of a run with several")
    add("--instance_data_dir", type=expand, metavar="FOLDER", help="its images")
    add("--kind", choices=("live", "object"), help="which of DreamBench's prompts: for pets, or for objects")
    return _run


def _run(
    *,
    checkpoint: Sequence[str] | None,
    scale: Sequence[float],
    images: int,
    quick: bool,
    seed: int | None,
    as_json: bool,
    dino: str | None,
    clip: str | None,
    lpips: Sequence[str] | None,
    subject: str | None,
    class_noun: str | None,
    instance_prompt: str | None,
    instance_data_dir: str | None,
    kind: str | None,
    **values: Any,
) -> None:
    from mflux_vae_train.dreambooth.drawing.adapted import open_adapted
    from mflux_vae_train.dreambooth.drawing.source import LAST
    from mflux_vae_train.dreambooth.evaluation.evaluate import evaluate
    from mflux_vae_train.dreambooth.evaluation.plan import base_identity, plan
    from mflux_vae_train.dreambooth.evaluation.subject import read_subject
    from mflux_vae_train.dreambooth.reporting.evaluation_section import update_report
    from mflux_vae_train.dreambooth.run_folder import RunFolder, read_settings
    from mflux_vae_train.evaluation.registry import open_evaluator

    if images < 1:
        raise SettingsError(f"--images is {images}; give 1 or more")
    check_scales(scale)
    for flag, text in (("--subject", subject), ("--class_noun", class_noun)):
        if text is not None:
            check_text(text, flag)
    source = source_of(values)
    if (root := source.root) is None:
        raise SettingsError(f"{source.path} is an adapter; give the folder of the run that trained it")
    if seed is not None:
        source = source.changed(seed=seed)
    if checkpoint is None and source.chosen != LAST:
        checkpoint = [source.chosen]
    settings, folder = read_settings(root), RunFolder(root).evaluation
    entries = plan(source, checkpoint, scale, settings["max_train_steps"])
    trained = read_subject(
        settings,
        instance_prompt=instance_prompt,
        instance_data_dir=instance_data_dir,
        phrase=subject,
        noun=class_noun,
        live=None if kind is None else kind == "live",
    )
    pipelines = [open_adapted(one) for one in (source.untrained, source) if one is not None]
    # the trained pipeline of --train_mode full has the name of its folder
    evaluator = open_evaluator(pipelines[0].pipeline.name, dino=dino, clip=clip, lpips=lpips)
    given: dict[str, dict[str, Any]] = {"--subject": {"phrase": "another"}} if subject is not None else {}
    given |= {"--kind": {"live": not trained.live}} if kind is not None else {}
    for flag in _unused(evaluator, trained, given):
        logger.warning("%s has no effect: the %s draws the same prompts without it", flag, evaluator.name)
    options: dict[str, Any] = {"images": images, "quick": quick, "model": base_identity(source)}
    found = evaluate(pipelines, entries, trained, evaluator, folder, **options)
    update_report(root)
    print(json.dumps(found.document(), indent=2) if as_json else found.table())
    logger.info("see %s", folder)


def _unused(evaluator: Evaluator, subject: Subject, given: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the given flags that no prompt of the evaluator depends on.

    Args:
        given: flag -> fields of the subject with another value than the flag's.
    """
    for flag, other in given.items():
        prompts = [evaluator.prompts(one, images=1, quick=True) for one in (subject, replace(subject, **other))]
        if [*prompts[0]] == [*prompts[1]]:
            yield flag
