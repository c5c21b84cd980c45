"""Implementation of the ``mflux-vae`` commands; arguments are the flags of each."""

from __future__ import annotations

import json
import logging
import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mflux_vae.call_log import log
from mflux_vae.cli import latent_file
from mflux_vae.cli.inspection import info as info
from mflux_vae.cli.latent_file import Entry, Unfinished
from mflux_vae.compare import comparison, report
from mflux_vae.compare.codecs import First, open_codec
from mflux_vae.compare.measuring import error_map, from_chw, mean_of, quality, to_nchw, without_infinities
from mflux_vae.errors import ImageError, MfluxVaeError, RunError, SettingsError
from mflux_vae.image_files.notes import ImageNotes
from mflux_vae.image_folder.scan import no_images, scan
from mflux_vae.images import image_text, load_image, load_images, save_image, stored_size, strip
from mflux_vae.metrics.lpips import LPIPS
from mflux_vae.pretrained import loading
from mflux_vae.runtime import device
from mflux_vae.runtime.device_errors import device_errors
from mflux_vae.tiling.plan import SMALLEST_TILE
from mflux_vae.tiling.tiles import Tiling
from mflux_vae.utils.arrays import flaw, one_colour
from mflux_vae.utils.formatting import count_text, first_names
from mflux_vae.utils.item_bar import item_bar
from mflux_vae.utils.links import missing
from mflux_vae.utils.paths import file_name, name_key, printable, same_place
from mflux_vae.vae import VAE
from mflux_vae.weights.formats.files import DTYPES, write_json
from mflux_vae.weights.formats.lazy_tensor import check_numbers

MEASURES = ("mse", "psnr", "ssim")

SHEET_ROWS = 8
"""Images on the contact sheet of a comparison."""

SUFFIX = ".safetensors"
"""Extension of latent files."""

MARK = "mflux-vae"
"""PNG text chunk of our output; only files that have it may be replaced."""


def convert(*, model: str, output: str, naming: str, dtype: str | None, config: str | None, overwrite: bool) -> None:
    """Convert weights to another key naming."""
    for file in loading.convert(model, output, naming, dtype, config=config, overwrite=overwrite):
        print(file)


def encode(*, pictures: Sequence[str], output: str, **opening: Any) -> None:
    """Encode images to one latent file; resumes."""
    files, target = _unique_names(pictures), Path(output)
    if target.is_dir():
        raise SettingsError(f"{target} is a folder; --output takes a file name")
    if target.suffix != SUFFIX:
        raise SettingsError(f"--output {target} must end in {SUFFIX}, such as {target.with_suffix(SUFFIX)}")
    vae, tiling = _open(**opening)
    unfinished = Unfinished(target, _settings(vae, opening))
    if replaced := unfinished.replaced:
        others = [name for name in replaced if name not in files]
        rest = f", {len(others)} of images not given now: {first_names(others)}" if others else ""
        log.warning("%s: replacing latents of another model or other settings (%d%s)", target, len(replaced), rest)
    if dropped := [name for name in unfinished.entries if name not in files]:
        text = f"drops the latents of {_count(dropped)} not given now ({first_names(dropped)})"
        log.warning("%s: %s; give another --output to keep them", target, text)
    missing = [name for name, file in files.items() if not unfinished.has(name, _crc32_of(file))]
    notes = ImageNotes()
    for name in _progress(_by_size(missing, lambda name: stored_size(files[name])), of=len(files)):
        with _error_context(str(files[name]), opening):
            (picture,) = load_images(files[name], channels=vae.config.in_channels, notes=notes)
            (latents,) = vae.encode_images(picture, tiling=tiling)
            _check_result(latents, "latents have", vae, varies=not one_colour(picture))
            unfinished.add(name, Entry(latents, picture.shape[:2], _crc32_of(files[name])))
    unfinished.finish(list(files))
    _show(notes)
    print(f"{target}: latents of {_count(files)}, {len(missing)} of them new")


def decode(*, latents: str, output: str, model: str | None, **opening: Any) -> None:
    """Decode a latent file to PNG files; existing ones are kept."""
    entries, encoder = latent_file.read(latents)
    targets = _output_files(entries, output)
    vae, tiling = _open(model=model or str(encoder.get("model")), **opening)
    weights = _crc32_of_weights(vae)
    if encoder.get("weights") not in (None, weights):
        log.warning("%s was encoded with other weights than %s", latents, model or encoder["model"])
    marks = {name: f"decoded {_crc32(entry.latents):08x} {weights:08x} {opening}" for name, entry in entries.items()}
    _say_replaced(targets, marks)
    _say_kept(targets, output, "decoded")
    new = [name for name, target in targets.items() if not (target.exists() and _mark(target) == marks[name])]
    for name in _progress(_by_size(new, lambda name: entries[name].size), of=len(targets)):
        with _error_context(f"{latents}: {name}", opening):
            image = vae.decode(entries[name].latents[None], size=entries[name].size, tiling=tiling)[0]
            _check_result(image, "the image has", vae, varies=False)
            picture = np.array(mx.round(image).astype(mx.uint8)).transpose(1, 2, 0)
            save_image(targets[name], picture, text={MARK: marks[name]})
    print(f"{output}: {_count(targets)}, {len(new)} of them new")


def reconstruct(*, pictures: Sequence[str], output: str | None, amplify: float, as_json: bool, **opening: Any) -> None:
    """Pictures to latents and back: measurements, and what it looks like."""
    _check_amplify(amplify)
    files = _unique_names(pictures)
    targets = _output_files(files, output) if output else {}
    vae, tiling = _open(**opening)
    mark = f"reconstructed {opening}"
    _say_replaced(targets, dict.fromkeys(targets, mark))
    if output:
        _say_kept(targets, output, "reconstructed")
    measured: dict[str, dict[str, Any]] = {}
    notes = ImageNotes()
    for name in _progress(_by_size([*files], lambda name: stored_size(files[name])), of=len(files)):
        with _error_context(str(files[name]), opening):
            (picture,) = load_images(files[name], channels=vae.config.in_channels, notes=notes)
            image = vae(to_nchw(picture), tiling=tiling)[0][0]
            _check_result(image, "the reconstruction has", vae, varies=False)
            again = from_chw(image)
        height, width = picture.shape[:2]
        measured[name] = {"name": name, "height": height, "width": width, **quality(picture, again)}
        if output:
            panels = [picture, again, error_map(picture, again, amplify)]
            save_image(targets[name], strip(panels, gap=4), text={MARK: mark})
    _show(notes, conversions=not as_json)
    rows = [measured[name] for name in files]
    mean = {measure: mean_of([row[measure] for row in rows]) for measure in MEASURES}
    if as_json:
        answer = {"model": opening["model"], "pictures": rows, "mean": mean}
        print(json.dumps(without_infinities(answer), indent=2))
        return
    width = max(len(f"mean of {len(rows)}"), *(len(name) for name in files))
    print(f"{'image':{width}}  {'size':>9}  PSNR / dB    SSIM")
    for row in [*rows, {"name": f"mean of {len(rows)}", **mean}]:
        size = f"{row['height']}x{row['width']}" if "height" in row else ""
        print(f"{row['name']:{width}}  {size:>9}  {row['psnr']:9.2f}  {row['ssim']:6.4f}")
    if output:
        print(f"{output}: {_count(targets)}")


def compare(
    *,
    models: Sequence[str],
    pictures: Sequence[str],
    output: str,
    size: int | None,
    first_frame: First,
    configs: Sequence[str] | None,
    lpips: Sequence[str] | None,
    amplify: float,
    as_json: bool,
    dtype: str | None,
    tiling: str,
    tile: int,
) -> None:
    """Compare models on the same images: contact sheet, table, JSON."""
    _check_amplify(amplify)
    paths = [file for _, file in _files(pictures)]
    files = dict(zip(report.names(list(map(str, paths))), paths, strict=True))
    target = _output_files(["comparison"], output)["comparison"]
    if len(lpips or ()) > 2:
        raise SettingsError(f"--lpips takes 1 or 2 files, not {len(lpips or ())}")
    if len(configs or ()) > len(models):
        raise SettingsError(f"--config is given {len(configs or ())} times for {len(models)} models")
    given = [None if config == "-" else config for config in configs or ()]
    codecs = [
        open_codec(model, _dtype(dtype), config=config, tiling=_plan(tiling, tile), first=first_frame)
        for model, config in zip_longest(models, given)
    ]
    side = report.size_of(codecs, size)
    candidates = [comparison.Candidate(*both) for both in zip(report.names(models), codecs, strict=True)]
    network = LPIPS.from_files(*lpips) if lpips else None
    notes = ImageNotes()
    squares = (load_image(files[name], resolution=side, notes=notes) for name in _progress(list(files), of=len(files)))
    shown = []
    compared = comparison.run(candidates, squares, first=first_frame, lpips=network)
    with device_errors(lambda: f"{_less_memory(tiling, tile)}, or --size {side // 2}"):
        for index, (name, (picture, again)) in enumerate(zip(files, compared, strict=True)):
            shown += [(name, picture, again)] if index < SHEET_ROWS else []
    _show(notes, conversions=not as_json)
    summaries = [candidate.summary() for candidate in candidates]
    mark = f"compared {', '.join(models)}"
    _say_replaced({"": target}, {"": mark})
    save_image(target, report.sheet(shown, summaries, amplify), text={MARK: mark})
    measured = [
        {**summary, "source": model, "pictures": dict(zip(files, candidate.qualities, strict=True))}
        for summary, model, candidate in zip(summaries, models, candidates, strict=True)
    ]
    answer = without_infinities({"size": side, "first_frame": first_frame, "models": measured})
    write_json(target.with_suffix(".json"), answer)
    if as_json:
        print(json.dumps(answer, indent=2))
        return
    print(f"{_count(files)} of {side} x {side} pixels")
    print(report.table(summaries))
    for summary in summaries:
        for note in report.notes(summary, side):
            print(f"{summary['name']}: {note}")
    print(f"{target}{f': the first {SHEET_ROWS}' if len(files) > SHEET_ROWS else ''}")


def _show(notes: ImageNotes, *, conversions: bool = True) -> None:
    """Warn of what was ignored, and print what was converted."""
    for line in notes.warnings:
        log.warning("%s", line)
    for line in notes.lines(logging.INFO) if conversions else ():
        print(line)


def _unique_names(pictures: Sequence[str]) -> dict[str, Path]:
    """Name the input files: the file name, with the folder in front if there are several folders."""
    files: dict[str, Path] = {}
    names: dict[str, str] = {}
    several = sum(Path(given).is_dir() for given in pictures) > 1
    for given, file in _files(pictures):
        name = printable(f"{given.resolve().name}/{file.name}" if several and given.is_dir() else file.name)
        other = files.setdefault(names.setdefault(name_key(name), name), file)
        if not same_place(other, file):
            raise ImageError(f"{other} and {file} have the same name, {name}; encode them separately")
    return files


def _files(pictures: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    """Yield each argument with its image file, or with every image of its folder."""
    for given in map(Path, pictures):
        if not given.is_dir():
            if not given.is_file():
                what = "is a device or pipe" if given.exists() else "does not exist"
                raise ImageError(f"{given} {missing(given, what)}")
            yield given, given
            continue
        folder = scan(given)
        if not folder.images:
            raise no_images(folder)
        if text := folder.unused_text(texts=False):
            log.warning("not used in %s: %s", given, text)
        for file in folder.paths:
            yield given, file


def _output_files(names: Iterable[str], folder: str) -> dict[str, Path]:
    """PNG files for the images, by name; existing files must be ours."""
    stems = {name: str(Path(name).with_suffix("")) for name in names}
    taken = Counter(map(name_key, stems.values()))
    targets = {
        name: Path(folder) / file_name(f"{stem if taken[name_key(stem)] == 1 else name}.png")
        for name, stem in stems.items()
    }
    if Path(folder).exists() and not Path(folder).is_dir():
        raise SettingsError(f"{folder} is a file; --output takes a folder")
    for target in targets.values():
        if target.exists() and _mark(target) is None:
            raise ImageError(f"{target} exists and was not written by mflux-vae; give another --output")
    return targets


def _say_replaced(targets: Mapping[str, Path], marks: Mapping[str, str]) -> None:
    """Warn about our files of another image, another model or other settings."""
    others = [target for name, target in targets.items() if target.exists() and _mark(target) != marks[name]]
    if others:
        folder, names = others[0].parent, first_names([target.name for target in others])
        what = f"replacing {_count(others)} of another input, model or other settings"
        log.warning("%s: %s: %s", folder, what, names)


def _say_kept(targets: Mapping[str, Path], folder: str, command: str) -> None:
    """Warn about files in the folder that an earlier run of the command wrote and this one does not."""
    top, ours = Path(folder), set(targets.values())
    others = [file for file in sorted([*top.glob("*.png"), *top.glob("*/*.png")]) if file not in ours]
    if kept := [str(file.relative_to(top)) for file in others if _is_output(file, command)]:
        log.warning("%s: keeps %s of an earlier run: %s", folder, _count(kept), first_names(kept))


def _is_output(file: Path, command: str) -> bool:
    with suppress(ImageError):
        return (_mark(file) or "").startswith(f"{command} ")
    return False


def _mark(target: Path) -> str | None:
    return image_text(target).get(MARK)


def _open(
    *, model: str, config: str | None, dtype: str | None, tiling: str, tile: int
) -> tuple[VAE, Tiling | bool | None]:
    vae = VAE.from_pretrained(model, _dtype(dtype), config=config)
    check_numbers(dict(tree_flatten(vae.network.parameters())), model, "weights")
    return vae, _plan(tiling, tile)


def _dtype(name: str | None) -> mx.Dtype | None:
    return DTYPES[name] if name else None


def _plan(tiling: str, tile: int) -> Tiling | bool | None:
    if tiling == "auto":
        return None
    return False if tiling == "off" else Tiling(tiling, tile=tile)  # type: ignore[arg-type]


def _check_result(result: mx.array, what: str, vae: VAE, *, varies: bool) -> None:
    """
    Raises:
        RunError: `utils.arrays.flaw` finds something.
    """
    if found := flaw(result, varies=varies):
        half = vae.dtype != mx.float32
        cure = "give --dtype float32" if half else "run the command again, or take another file of the model"
        raise RunError(f"{what} {found}; {cure}")


def _less_memory(tiling: str, tile: int) -> str:
    """Flags with which a call needs less memory than with these."""
    smaller = f"--tile {max(tile // 2, SMALLEST_TILE)}"
    return {"auto": f"give --tiling exact {smaller}", "off": "give --tiling exact"}.get(
        tiling, f"give {smaller}" + (", or --tiling blend" if tiling == "exact" else "")
    )


def _check_amplify(amplify: float) -> None:
    if not 0 < amplify < math.inf:
        raise SettingsError(f"--amplify must be positive, not {amplify}")


def _settings(vae: VAE, opening: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that determine the latents, and the model for `decode`."""
    return {
        "model": opening["model"],
        "weights": _crc32_of_weights(vae),
        "network": vae.config.to_dict(),
        "dtype": str(vae.dtype).removeprefix("mlx.core."),
        "tiling": opening["tiling"],
        "tile": opening["tile"],
    }


def _crc32_of(file: Path) -> int:
    return zlib.crc32(file.read_bytes())


def _crc32(array: mx.array, before: int = 0) -> int:
    return zlib.crc32(np.array(device.copy_with_cuda(array.reshape(-1).view(mx.uint8))).tobytes(), before)


def _crc32_of_weights(vae: VAE) -> int:
    total = 0
    for _, weight in sorted(dict(tree_flatten(vae.network.parameters())).items()):
        total = _crc32(weight, total)
    return total


def _by_size(names: Sequence[str], size_of: Callable[[str], tuple[int, int]]) -> Sequence[str]:
    """With CUDA, images of one size after another: MLX plans each convolution for each size, and keeps some plans."""
    return sorted(names, key=size_of) if device.kind() == "cuda" else names


def _progress(names: Sequence[str], *, of: int) -> Iterable[str]:
    """Iterate over names with a progress bar on terminals."""
    bar: Iterable[str] = item_bar(names, total=of, initial=of - len(names), unit="image", disable=None)
    return bar


def _count(pictures: Sized) -> str:
    return count_text(len(pictures), "image")


@contextmanager
def _error_context(what: str, opening: Mapping[str, Any]) -> Iterator[None]:
    """Add the subject to errors that lack it, and flags that need less memory to those of missing memory."""
    try:
        with device_errors(lambda: _less_memory(opening["tiling"], opening["tile"])):
            yield
    except MfluxVaeError as error:
        raise error if what in str(error) else type(error)(f"{what}: {error}") from error
