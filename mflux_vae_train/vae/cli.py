"""Commands of ``mflux-vae``: train, reconstruct, sample, grid, traverse, interpolate.

The flags of `train` are the fields of `config`.

Each function adds flags to a parser and returns the function that runs the command (see `mflux_vae.cli`). Heavy imports
are inside functions so that ``--help`` is fast.
"""

from __future__ import annotations

import logging
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mflux_vae.cli.arguments import PICTURES, add_model
from mflux_vae.utils.paths import expand
from mflux_vae_train.settings.flags import SHORT_USAGE, add_flags, settings_of
from mflux_vae_train.vae.config import PRESETS, VAETrainingSettings

LOGGER = "mflux_vae_train"

Run = Callable[..., None]


def train(parser: ArgumentParser) -> Run:
    """Train an autoencoder; the same command resumes an interrupted run."""
    add_flags(parser, VAETrainingSettings, PRESETS)
    parser.usage = SHORT_USAGE

    def run(**values: Any) -> None:
        from mflux_vae.utils.console import logging_to_console
        from mflux_vae_train.vae.compat.pytorch_vae_config import flatten_sections

        with logging_to_console({LOGGER: logging.INFO}):
            settings = settings_of(VAETrainingSettings, values, PRESETS, translate=flatten_sections)
            from mflux_vae_train.vae.train import VAETrainer

            VAETrainer(settings).train()

    return run


def reconstruct(parser: ArgumentParser) -> Run:
    """Encode and decode images; measure the error."""
    parser.add_argument(
        "pictures", type=expand, nargs="*", help=f"{PICTURES} (default: the training data in the model's settings.yaml)"
    )
    parser.add_argument(
        *("--output", "--output_dir", "--outdir"),
        dest="output",
        type=expand,
        metavar="FOLDER",
        help="folder for PNG files with original, reconstruction and amplified difference",
    )
    parser.add_argument("--amplify", type=float, default=8.0, metavar="X", help="factor of the difference (default: 8)")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print JSON")
    parser.add_argument("--rec_testdata", action="store_true", help="use the held-out images of the data set")
    parser.add_argument(
        "--num_images", type=int, default=64, metavar="N", help="number of images of the data set (default: 64)"
    )
    parser.add_argument("--data", type=expand, help="data set to use instead of the training data (see train)")
    add_model(parser, aliases=("--model_path",))
    _add_expected(parser)
    parser.add_argument("--cpu", action="store_true", help="run on the CPU")

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

        _use_cpu(cpu)
        _check_at_least(1, num_images=num_images)
        expected = {"latent_dims": latent_dims, "max_filters": max_filters, "nimg_channels": nimg_channels}
        if any(value is not None for value in expected.values()):
            from mflux_vae_train.vae.sampler import VAESampler

            VAESampler(settings["model"]).check(**expected)
        if pictures:
            if rec_testdata or data:
                raise SettingsError("--rec_testdata, --data: not allowed with image files; leave them out")
            from mflux_vae.cli import commands

            commands.reconstruct(pictures=pictures, **settings)
            return
        from mflux_vae_train.vae.evaluation.reconstruction import reconstruct_data

        shared = {name: settings[name] for name in ("model", "output", "as_json")}
        reconstruct_data(**shared, data=data, held_out=rec_testdata, count=num_images)

    return run


def sample(parser: ArgumentParser) -> Run:
    """Decode random latents from the prior."""
    _add_model(parser, "samples")
    parser.add_argument("--num_samples", type=int, default=16, metavar="N", help="number of images (default: 16)")
    parser.add_argument("--grid_size", type=int, metavar="N", help="also write the N x N picture of `grid`")
    _add_range(parser)

    def run(*, num_samples: int, grid_size: int | None, latent_range: tuple[float, float], **opening: Any) -> None:
        sampler, file = _open_sampler(**opening)
        _check_at_least(1, num_samples=num_samples, **({} if grid_size is None else {"grid_size": grid_size}))
        if grid_size is not None:
            _check_not_of_another_model(file.with_name("latent_grid.png"), opening["model_path"])
        sampler.save_samples(sampler.sample_random(num_samples), file)
        print(file)
        if grid_size is not None:
            grid_file = file.with_name("latent_grid.png")
            sampler.save_latent_grid(sampler.generate_latent_grid(grid_size, latent_range), grid_file)
            print(grid_file)

    return _with_latent_range(run)


def grid(parser: ArgumentParser) -> Run:
    """Decode a plane of the latent space: two dimensions vary over rows and columns."""
    _add_model(parser, "latent_grid")
    parser.add_argument("--grid_size", type=int, default=10, metavar="N", help="rows and columns (default: 10)")
    parser.add_argument("--dims", type=int, nargs=2, metavar="N", help="dimensions (default: the two strongest)")
    _add_range(parser)

    def run(*, grid_size: int, dims: tuple[int, int] | None, latent_range: tuple[float, float], **opening: Any) -> None:
        sampler, file = _open_sampler(**opening)
        _check_at_least(1, grid_size=grid_size)
        sampler.save_latent_grid(sampler.generate_latent_grid(grid_size, latent_range, dims=dims), file)
        print(file)

    return _with_latent_range(run)


def traverse(parser: ArgumentParser) -> Run:
    """Vary single latent dimensions, one row of images each."""
    _add_model(parser, "traversal")
    parser.add_argument("--dims", type=int, nargs="+", metavar="N", help="dimensions (default: the 16 strongest)")
    parser.add_argument("--num_steps", type=int, default=10, metavar="N", help="images per row (default: 10)")
    parser.add_argument(
        "--image",
        type=expand,
        metavar="FILE",
        help="take the other dimensions from the latent of this image (default: 0)",
    )
    _add_range(parser)

    def run(
        *,
        dims: list[int] | None,
        num_steps: int,
        image: str | None,
        latent_range: tuple[float, float],
        **opening: Any,
    ) -> None:
        sampler, file = _open_sampler(**opening)
        _check_at_least(1, num_steps=num_steps)
        base = None if image is None else sampler.encode([image])
        chosen = sampler.strongest_dims(16) if dims is None else dims
        rows = {dim: sampler.traverse_latent(dim, num_steps, latent_range, base=base) for dim in chosen}
        sampler.save_traversals(rows, file)
        print(file)

    return _with_latent_range(run)


def interpolate(parser: ArgumentParser) -> Run:
    """Decode an interpolation between two latents."""
    _add_model(parser, "interpolation")
    parser.add_argument(
        "--images", type=expand, nargs=2, metavar="FILE", help="first and last image (default: random latents)"
    )
    parser.add_argument("--num_steps", type=int, default=10, metavar="N", help="number of images (default: 10)")
    parser.add_argument("--spherical", action="store_true", help="interpolate along a great circle")

    def run(*, images: list[str] | None, num_steps: int, spherical: bool, **opening: Any) -> None:
        sampler, file = _open_sampler(**opening)
        ends = sampler.draw(2) if images is None else sampler.encode(images)
        sampler.save_interpolation(sampler.interpolate_latent(ends[:1], ends[1:], num_steps, spherical=spherical), file)
        print(file)

    return run


def _add_model(parser: ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--model_path",
        "--model",
        type=expand,
        required=True,
        metavar="FILE",
        help="best_model.safetensors of a run, or any autoencoder",
    )
    parser.add_argument(
        "--output_dir",
        "--outdir",
        type=expand,
        default="samples",
        metavar="FOLDER",
        help="output folder (default: samples)",
    )
    parser.add_argument(
        "--outfile", type=expand, metavar="FILE", help=f"output file (default: {name}.png in --output_dir)"
    )
    parser.add_argument("--image_size", type=int, metavar="N", help="size of images from spatial latents in pixels")
    _add_expected(parser)
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="random seed (default: 0)")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU")
    parser.set_defaults(name=name)


def _open_sampler(
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
    """Sampler and output file."""
    from mflux_vae_train.vae.sampler import VAESampler

    _check_at_least(0, seed=seed)
    _use_cpu(cpu)
    sampler = VAESampler(model_path, image_size=image_size, seed=seed)
    sampler.check(**expected)
    file = Path(outfile or f"{output_dir}/{name}.png")
    _check_not_of_another_model(file, model_path)
    return sampler, file


def _check_not_of_another_model(file: Path, model: str) -> None:
    """
    Raises:
        SettingsError: the file exists and shows another model, or was not written by these commands.
    """
    if not file.exists():
        return
    from mflux_vae.errors import ImageError, SettingsError
    from mflux_vae.images import image_text
    from mflux_vae_train.vae.sampler import MODEL_KEY, model_text

    try:
        found = image_text(file).get(MODEL_KEY)
    except ImageError:
        found = None
    if found == model_text(model):
        return
    shows = "was not written for this model" if found is None else f"shows another model, {found}"
    raise SettingsError(f"{file} exists and {shows}; give another --output_dir or --outfile, or remove it")


def _use_cpu(cpu: bool) -> None:
    if cpu:
        from mflux_vae.runtime import device

        device.use_cpu()


def _add_expected(parser: ArgumentParser) -> None:
    """Add flags with expected properties of the network."""
    for name, what in (
        ("latent_dims", "length of a latent"),
        ("max_filters", "channels of the widest layer"),
        ("nimg_channels", "image channels"),
    ):
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"expected {what}; another value is an error")


def _add_range(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--latent_range_min", type=float, default=-3.0, metavar="X", help="smallest value (default: -3)"
    )
    parser.add_argument("--latent_range_max", type=float, default=3.0, metavar="X", help="largest value (default: 3)")


def _with_latent_range(run: Run) -> Run:
    def run_with_range(*, latent_range_min: float, latent_range_max: float, **settings: Any) -> None:
        run(latent_range=(latent_range_min, latent_range_max), **settings)

    return run_with_range


def _check_at_least(limit: int, **flags: int) -> None:
    from mflux_vae.errors import SettingsError

    for name, value in flags.items():
        if value < limit:
            raise SettingsError(f"--{name} is {value}; at least {limit} is allowed")
