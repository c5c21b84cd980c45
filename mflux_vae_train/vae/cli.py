"""The commands that training adds to ``mflux-vae``: train, reconstruct, sample, grid, traverse, interpolate.

Each function adds flags to a parser and returns what runs with their values (see `mflux_vae.cli`). Imports are late, so
that ``--help`` is answered at once.
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mflux_vae.cli.arguments import PICTURES, add_model
from mflux_vae_train.settings.flags import SHORT_USAGE, add_flags, settings_of
from mflux_vae_train.vae.config import PRESETS, VAETrainingSettings

LOGGER = "mflux_vae_train"

Run = Callable[..., None]


def train(parser: ArgumentParser) -> Run:
    """Train an autoencoder; the same command continues an interrupted run."""
    add_flags(parser, VAETrainingSettings, PRESETS)
    parser.usage = SHORT_USAGE

    def run(**given: Any) -> None:
        from mflux_vae.utils.console import logging_to_console
        from mflux_vae_train.vae.compat.pytorch_vae_config import flattened

        with logging_to_console({LOGGER: logging.INFO}):
            settings = settings_of(VAETrainingSettings, given, PRESETS, translate=flattened)
            from mflux_vae_train.vae.train import VAETrainer

            VAETrainer(settings).train()

    return run


def reconstruct(parser: ArgumentParser) -> Run:
    """Pictures to latents and back: what is lost, seen and measured."""
    own = "of a trained model's own data, as its settings.yaml says"
    parser.add_argument("pictures", nargs="*", help=f"{PICTURES}; none: {own}")
    parser.add_argument(
        *("--output", "--output_dir", "--outdir"),
        dest="output",
        metavar="FOLDER",
        help="for PNG files of original, reconstruction and amplified difference side by side",
    )
    parser.add_argument("--amplify", type=float, default=8.0, metavar="X", help="the difference (default: 8)")
    parser.add_argument("--json", dest="as_json", action="store_true", help="the measurements as JSON")
    parser.add_argument("--rec_testdata", action="store_true", help=f"the held-out images, not the training's, {own}")
    parser.add_argument("--num_images", type=int, default=64, metavar="N", help=f"so many {own} (default: 64)")
    parser.add_argument("--data", help="other data than that (see train)")
    add_model(parser, aliases=("--model_path",))
    _add_network(parser)
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU")

    def run(
        *,
        pictures: list[str],
        rec_testdata: bool,
        num_images: int,
        data: str | None,
        latent_dims: int | None,
        max_filters: int | None,
        nimg_channels: int | None,
        cpu: bool,
        **settings: Any,
    ) -> None:
        from mflux_vae.errors import SettingsError

        _on(cpu)
        _at_least(1, num_images=num_images)
        expected = {"latent_dims": latent_dims, "max_filters": max_filters, "nimg_channels": nimg_channels}
        if any(value is not None for value in expected.values()):
            from mflux_vae_train.vae.sampler import VAESampler

            VAESampler(settings["model"]).check(**expected)
        if pictures:
            if rec_testdata or data:
                raise SettingsError("--rec_testdata and --data: without PICTURES")
            from mflux_vae.cli import commands

            commands.reconstruct(pictures=pictures, **settings)
            return
        from mflux_vae_train.vae.evaluation.reconstruction import reconstruct_data

        given = {name: settings[name] for name in ("model", "output", "as_json")}
        reconstruct_data(**given, data=data, held_out=rec_testdata, count=num_images)

    return run


def sample(parser: ArgumentParser) -> Run:
    """Images of latents from the prior."""
    _add_model(parser, "samples")
    parser.add_argument("--num_samples", type=int, default=16, metavar="N", help="how many (default: 16)")
    parser.add_argument("--grid_size", type=int, metavar="N", help="also the plane that `grid` draws, N x N")
    _add_range(parser)

    def run(*, num_samples: int, grid_size: int | None, latent_range: tuple[float, float], **opening: Any) -> None:
        sampler, file = _opened(**opening)
        _at_least(1, num_samples=num_samples, **({} if grid_size is None else {"grid_size": grid_size}))
        sampler.save_samples(sampler.sample_random(num_samples), file)
        print(file)
        if grid_size is not None:
            plane = file.with_name("latent_grid.png")
            sampler.save_latent_grid(sampler.generate_latent_grid(grid_size, latent_range), plane)
            print(plane)

    return _with_range(run)


def grid(parser: ArgumentParser) -> Run:
    """Images of a plane of the latent space: two units change, from row to row and from left to right."""
    _add_model(parser, "latent_grid")
    parser.add_argument("--grid_size", type=int, default=10, metavar="N", help="rows and columns (default: 10)")
    parser.add_argument("--dims", type=int, nargs=2, metavar="N", help="the units (default: the strongest)")
    _add_range(parser)

    def run(*, grid_size: int, dims: tuple[int, int] | None, latent_range: tuple[float, float], **opening: Any) -> None:
        sampler, file = _opened(**opening)
        _at_least(1, grid_size=grid_size)
        sampler.save_latent_grid(sampler.generate_latent_grid(grid_size, latent_range, dims=dims), file)
        print(file)

    return _with_range(run)


def traverse(parser: ArgumentParser) -> Run:
    """What single latent units control: a row for each, in which it alone changes."""
    _add_model(parser, "traversal")
    parser.add_argument("--dims", type=int, nargs="+", metavar="N", help="the units (default: the 16 strongest)")
    parser.add_argument("--num_steps", type=int, default=10, metavar="N", help="images in a row (default: 10)")
    parser.add_argument("--image", metavar="FILE", help="where the others stay: at a picture's latent (default: 0)")
    _add_range(parser)

    def run(
        *,
        dims: list[int] | None,
        num_steps: int,
        image: str | None,
        latent_range: tuple[float, float],
        **opening: Any,
    ) -> None:
        sampler, file = _opened(**opening)
        _at_least(1, num_steps=num_steps)
        base = None if image is None else sampler.encode([image])
        units = sampler.strongest(16) if dims is None else dims
        rows = {unit: sampler.traverse_latent(unit, num_steps, latent_range, base=base) for unit in units}
        sampler.save_traversals(rows, file)
        print(file)

    return _with_range(run)


def interpolate(parser: ArgumentParser) -> Run:
    """Images on the way from one latent to another."""
    _add_model(parser, "interpolation")
    parser.add_argument(
        "--images", nargs=2, metavar="FILE", help="from and to these pictures (default: random latents)"
    )
    parser.add_argument("--num_steps", type=int, default=10, metavar="N", help="images (default: 10)")
    parser.add_argument("--spherical", action="store_true", help="on a great circle, not on the straight line")

    def run(*, images: list[str] | None, num_steps: int, spherical: bool, **opening: Any) -> None:
        sampler, file = _opened(**opening)
        ends = sampler.draw(2) if images is None else sampler.encode(images)
        sampler.save_interpolation(sampler.interpolate_latent(ends[:1], ends[1:], num_steps, spherical=spherical), file)
        print(file)

    return run


def _add_model(parser: ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--model_path",
        "--model",
        required=True,
        metavar="FILE",
        help="a run's best_model.safetensors, or any autoencoder",
    )
    parser.add_argument(
        "--output_dir", "--outdir", default="samples", metavar="FOLDER", help="for the picture (default: samples)"
    )
    parser.add_argument("--outfile", metavar="FILE", help=f"its name (default: {name}.png in --output_dir)")
    parser.add_argument("--image_size", type=int, metavar="N", help="of images from spatial latents, in pixels")
    _add_network(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn by chance (default: 0)")
    parser.add_argument("--cpu", action="store_true", help="compute on the CPU")
    parser.set_defaults(name=name)


def _opened(
    *,
    model_path: str,
    output_dir: str,
    outfile: str | None,
    image_size: int | None,
    seed: int,
    cpu: bool,
    name: str,
    **expected: int | None,
) -> tuple[Any, Path]:
    """The sampler, and the file to write."""
    from mflux_vae_train.vae.sampler import VAESampler

    _at_least(0, seed=seed)
    _on(cpu)
    sampler = VAESampler(model_path, image_size=image_size, seed=seed)
    sampler.check(**expected)
    return sampler, Path(outfile or f"{output_dir}/{name}.png")


def _on(cpu: bool) -> None:
    if cpu:
        import mlx.core as mx

        mx.set_default_device(mx.cpu)


def _add_network(parser: ArgumentParser) -> None:
    """What a weights file knows itself, and a command line may say."""
    for name, what in (
        ("latent_dims", "length of its latents"),
        ("max_filters", "its widest layer"),
        ("nimg_channels", "channels of its images"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{what}: refused where the model has another")


def _add_range(parser: ArgumentParser) -> None:
    parser.add_argument("--latent_range_min", type=float, default=-3.0, metavar="X", help="least value (default: -3)")
    parser.add_argument("--latent_range_max", type=float, default=3.0, metavar="X", help="largest value (default: 3)")


def _with_range(run: Run) -> Run:
    def ranged(*, latent_range_min: float, latent_range_max: float, **settings: Any) -> None:
        run(latent_range=(latent_range_min, latent_range_max), **settings)

    return ranged


def _at_least(least: int, **given: int) -> None:
    from mflux_vae.errors import SettingsError

    for name, value in given.items():
        if value < least:
            raise SettingsError(f"--{name} is {value}; at least {least} is allowed")
