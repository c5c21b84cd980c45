"""What the commands of ``mflux-vae`` do. Each takes the settings of its command by their names."""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from tqdm import tqdm

from mflux_vae import latent_file, loading, memory, metrics, presets
from mflux_vae.errors import ImageError, MfluxVaeError, SettingsError
from mflux_vae.families import FAMILIES
from mflux_vae.images import find_images, image_text, load_images, save_image, strip, to_pictures
from mflux_vae.latent_file import Entry, Unfinished
from mflux_vae.presets import PRESETS
from mflux_vae.reporting import log
from mflux_vae.tiling import Tiling
from mflux_vae.vae import VAE
from mflux_vae.weights.files import DTYPES

MEASURES = ("psnr", "ssim")
SIDES = (512, 1024, 2048)
"""Of images whose memory is told."""
WHAT: tuple[Literal["encode", "decode"], ...] = ("encode", "decode")

MARK = "mflux-vae"
"""Name of the text chunk in PNG files from here: such a file may be replaced, another's may not."""


def info(*, model: str | None, config: str | None, as_json: bool) -> None:
    """What a weights file or folder is; without one, the presets."""
    if model is None:
        _list_presets(as_json)
        return
    found = loading.describe(model, config=config)
    network = FAMILIES[found.family].build(found.config)
    latents = _latents(network.config)
    needed = {
        what: {f"{side}x{side}": memory.peak_bytes(network, what, 1, side, side) for side in SIDES} for what in WHAT
    }
    if as_json:
        print(json.dumps({**asdict(found), "latents": latents, "memory_bytes": needed}, indent=2))
        return
    stored, preset = " and ".join(found.dtypes), PRESETS[found.preset].title if found.preset else "of no preset"
    print(f"{found.source}: {preset}")
    print(
        f"  {found.family}, {found.naming} naming, {found.parameters:,} parameters in {found.tensors} tensors, {stored}"
    )
    print(f"  latents: {latents['channels']} channels at 1/{latents['downsampling']} of the size, {latents['scaling']}")
    for what, sizes in needed.items():
        print(f"  memory to {what}: {', '.join(f'{size} {number / 1e9:.1f} GB' for size, number in sizes.items())}")
    if found.assumed:
        print(f"  {found.assumed}")


def _list_presets(as_json: bool) -> None:
    told = {
        name: {"title": row.title, "repository": row.repository, "inside": row.inside, **_latents(row.config)}
        for name, row in PRESETS.items()
    }
    if as_json:
        print(json.dumps(told, indent=2))
        return
    for name, row in told.items():
        print(f"{name:20} {row['channels']:3} channels at 1/{row['downsampling']:<3} {row['title']}")
    for name in presets.names()[len(told) :]:
        print(f"{name:20} of another package: {presets.registered(name)}")


def convert(*, model: str, output: str, naming: str, dtype: str | None, config: str | None) -> None:
    """Weights from any naming into another."""
    for file in loading.convert(model, output, naming, dtype, config=config):
        print(file)


def encode(*, pictures: Sequence[str], output: str, **opening: Any) -> None:
    """Pictures to one file of latents; finished pictures are not done again."""
    files, target = _named(pictures), Path(output)
    if target.is_dir():
        raise SettingsError(f"{target} is a folder: --output takes the name of a file")
    vae, tiling = _open(**opening)
    unfinished = Unfinished(target, _settings(vae, opening))
    new = [name for name, file in files.items() if not unfinished.has(name, _crc32_of(file))]
    for name in _progress(new, of=len(files)):
        with _about(str(files[name])):
            (picture,) = load_images(files[name], channels=vae.config.in_channels)
            (latents,) = vae.encode_images(picture, tiling=tiling)
            unfinished.add(name, Entry(latents, picture.shape[:2], _crc32_of(files[name])))
    unfinished.finish(list(files))
    print(f"{target}: latents of {_count(files)}, {len(new)} of them new")


def decode(*, latents: str, output: str, model: str | None, **opening: Any) -> None:
    """A file of latents to PNG files; those that are there already are not done again."""
    entries, made_with = latent_file.read(latents)
    targets = _targets(entries, output)
    vae, tiling = _open(model=model or str(made_with.get("model")), **opening)
    weights = _crc32_of_weights(vae)
    if made_with.get("weights") not in (None, weights):
        log.warning("%s was made with other weights than those of %s", latents, model or made_with["model"])
    marks = {name: f"decoded {_crc32(entry.latents):08x} {weights:08x} {opening}" for name, entry in entries.items()}
    new = [name for name, target in targets.items() if not (target.exists() and _mark(target) == marks[name])]
    for name in _progress(new, of=len(targets)):
        with _about(f"{latents}: {name}"):
            (image,) = vae.decode_images([entries[name].latents], [entries[name].size], tiling=tiling)
            save_image(targets[name], np.array(image), text={MARK: marks[name]})
    print(f"{output}: {_count(targets)}, {len(new)} of them new")


def reconstruct(*, pictures: Sequence[str], output: str | None, amplify: float, as_json: bool, **opening: Any) -> None:
    """Pictures to latents and back: measurements, and what it looks like."""
    if not 0 < amplify < math.inf:
        raise SettingsError(f"--amplify must be positive, not {amplify}")
    files = _named(pictures)
    targets = _targets(files, output) if output else {}
    vae, tiling = _open(**opening)
    rows: list[dict[str, Any]] = []
    for name in _progress(list(files), of=len(files)):
        with _about(str(files[name])):
            (picture,) = load_images(files[name], channels=vae.config.in_channels)
            again = _picture(vae(_image(picture), tiling=tiling)[0][0])
        height, width = picture.shape[:2]
        rows.append({"name": name, "height": height, "width": width, **_measured(picture, again)})
        if output:
            difference = np.abs(picture.astype(np.float32) - again) * amplify
            panels = [picture, again, np.clip(np.rint(difference), 0, 255).astype(np.uint8)]
            save_image(targets[name], strip(panels, gap=4), text={MARK: "reconstructed"})
    mean = {measure: _mean([row[measure] for row in rows]) for measure in MEASURES}
    if as_json:
        answer = {"model": opening["model"], "pictures": rows, "mean": mean}
        print(json.dumps(_without_infinities(answer), indent=2))
        return
    width = max(len(f"mean of {len(rows)}"), *(len(name) for name in files))
    print(f"{'picture':{width}}  {'size':>9}  PSNR / dB    SSIM")
    for row in [*rows, {"name": f"mean of {len(rows)}", **mean}]:
        size = f"{row['height']}x{row['width']}" if "height" in row else ""
        print(f"{row['name']:{width}}  {size:>9}  {row['psnr']:9.2f}  {row['ssim']:6.4f}")


def _latents(config: Any) -> dict[str, Any]:
    """What a denoiser sees."""
    factor, shift = getattr(config, "scaling_factor", None), getattr(config, "shift_factor", None)
    if hasattr(config, "batch_norm_eps"):
        scaling = "scaled by running statistics"
    elif getattr(config, "latents_mean", None):
        scaling = "scaled by each channel's mean and deviation"
    else:
        scaling = f"(raw - {shift or 0}) * {factor}"
    return {"channels": config.scaled_channels, "downsampling": config.scaled_downsampling, "scaling": scaling}


def _named(pictures: Sequence[str]) -> dict[str, Path]:
    """Files of a command line by name: that of the file, behind that of its folder where several are looked into."""
    files: dict[str, Path] = {}
    several = sum(Path(given).is_dir() for given in pictures) > 1
    for given in map(Path, pictures):
        found = find_images(given)[0] if given.is_dir() else [given]
        if not found:
            raise ImageError(f"{given} has no pictures")
        for file in found:
            if not file.is_file():
                raise ImageError(f"{file} does not exist")
            name = f"{given.resolve().name}/{file.name}" if several and given.is_dir() else file.name
            if files.setdefault(name, file).resolve() != file.resolve():
                raise ImageError(f"{files[name]} and {file} have one name, {name}: take them apart")
    return files


def _targets(names: Iterable[str], folder: str) -> dict[str, Path]:
    """The PNG files of pictures, by name; what stands there already must be from here."""
    stems = {name: str(Path(name).with_suffix("")) for name in names}
    taken = Counter(stems.values())
    targets = {name: Path(folder) / f"{stem if taken[stem] == 1 else name}.png" for name, stem in stems.items()}
    if Path(folder).exists() and not Path(folder).is_dir():
        raise SettingsError(f"{folder} is a file: --output takes a folder")
    for target in targets.values():
        if target.exists() and _mark(target) is None:
            raise ImageError(f"{target} exists and is not from here: give another --output")
    return targets


def _mark(target: Path) -> str | None:
    return image_text(target).get(MARK)


def _open(
    *, model: str, config: str | None, dtype: str | None, tiling: str, tile: int
) -> tuple[VAE, Tiling | bool | None]:
    vae = VAE.from_pretrained(model, DTYPES[dtype] if dtype else None, config=config)
    if tiling == "auto":
        return vae, None
    return vae, False if tiling == "off" else Tiling(tiling, tile=tile)  # type: ignore[arg-type]


def _settings(vae: VAE, opening: Mapping[str, Any]) -> dict[str, Any]:
    """What latents depend on, and the name that `decode` opens."""
    return {
        "model": opening["model"],
        "weights": _crc32_of_weights(vae),
        "network": vae.config.to_dict(),
        "dtype": str(vae.dtype).removeprefix("mlx.core."),
        "tiling": opening["tiling"],
        "tile": opening["tile"],
    }


def _image(picture: np.ndarray) -> mx.array:
    """(H, W, C) -> (1, C, H, W)."""
    return mx.array(picture.transpose(2, 0, 1)[None])


def _picture(image: mx.array) -> np.ndarray:
    """(C, H, W) in [0, 255] -> uint8 (H, W, C)."""
    return to_pictures(np.array(image).transpose(1, 2, 0) / 127.5 - 1)


def _measured(picture: np.ndarray, again: np.ndarray) -> dict[str, float]:
    """How well a picture comes back; NaN for what it is too small for."""
    one, other = (value.transpose(2, 0, 1)[None] for value in (picture, again))
    fits = min(picture.shape[:2]) >= metrics.WINDOW
    return {
        "psnr": float(metrics.psnr(one, other)),
        "ssim": float(metrics.ssim(one, other)) if fits else math.nan,
    }


def _mean(values: Sequence[float]) -> float:
    """Of those that are numbers."""
    numbers = [value for value in values if not math.isnan(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _without_infinities(content: Any) -> Any:
    """JSON has neither infinity nor NaN: null stands for both."""
    if isinstance(content, dict):
        return {name: _without_infinities(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_without_infinities(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _crc32_of(file: Path) -> int:
    return zlib.crc32(file.read_bytes())


def _crc32(array: mx.array, before: int = 0) -> int:
    return zlib.crc32(np.array(array.reshape(-1).view(mx.uint8)).tobytes(), before)


def _crc32_of_weights(vae: VAE) -> int:
    total = 0
    for _, weight in sorted(dict(tree_flatten(vae.network.parameters())).items()):
        total = _crc32(weight, total)
    return total


def _progress(names: Sequence[str], *, of: int) -> Iterable[str]:
    """The names, with a bar and the time that is left, on terminals."""
    return tqdm(names, total=of, initial=of - len(names), unit="picture", disable=None)


def _count(pictures: Sized) -> str:
    return f"{len(pictures)} picture{'s' if len(pictures) != 1 else ''}"


@contextmanager
def _about(what: str) -> Iterator[None]:
    """Errors say what they are about."""
    try:
        yield
    except MfluxVaeError as error:
        raise error if what in str(error) else type(error)(f"{what}: {error}") from error
