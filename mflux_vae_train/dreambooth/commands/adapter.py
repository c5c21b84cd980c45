"""``mflux-dreambooth adapter``: describe, convert, merge, extract and resize adapters. See `lora.editing`."""

from __future__ import annotations

import json
import logging
import math
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mflux_vae.cli.arguments import PRECISIONS
from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.utils.command_line import CommandParser
from mflux_vae.utils.formatting import count_text, first_few, size_text
from mflux_vae.utils.links import missing
from mflux_vae.utils.paths import expand, printable, public_name

if TYPE_CHECKING:
    from mflux_vae_train.lora.editing.adapter import AdapterFile, Changes
    from mflux_vae_train.lora.editing.description import Group
    from mflux_vae_train.lora.editing.model import Model

logger = logging.getLogger(__name__)

Run = Callable[..., object]

SOURCE = "file, folder of a run or checkpoint, or owner/name on the hub"


def adapter(parser: ArgumentParser) -> Run:
    """Describe, convert, merge or resize adapters, or extract one from two models."""
    assert isinstance(parser, CommandParser)
    parser.add_functions((info, convert, merge, extract, resize), "edit")
    return lambda edit, **values: edit(**values)


def info(parser: ArgumentParser) -> Run:
    """Describe an adapter: layers, ranks, size, training, and how much it changes."""
    parser.add_argument("source", type=expand, help=SOURCE)
    parser.add_argument(
        "--model",
        type=expand,
        metavar="MODEL",
        help="also state whether it fits this model (name, folder, file, or hub id)",
    )
    parser.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    return _info


def convert(parser: ArgumentParser) -> Run:
    """Write an adapter in the naming of PEFT and diffusers, or of kohya's scripts and ComfyUI."""
    parser.add_argument("source", type=expand, help=SOURCE)
    parser.add_argument("--to", choices=("peft", "kohya"), required=True, help="naming; kohya's has the scale in B")
    _add_writing(parser)
    return _convert


def merge(parser: ArgumentParser) -> Run:
    """Add several adapters, each times a weight."""
    parser.add_argument("sources", nargs="+", metavar="source", type=expand, help=SOURCE)
    parser.add_argument("--weights", nargs="+", type=float, required=True, metavar="W", help="one for each adapter")
    text = "nearest sum of this rank (default: the exact one; ranks add up)"
    parser.add_argument("--rank", type=int, metavar="N", help=text)
    _add_writing(parser)
    return _merge


def extract(parser: ArgumentParser) -> Run:
    """Approximate the difference of two models by an adapter."""
    parser.add_argument("base", type=expand, help="model that the adapter is for: a name, folder, file, or hub id")
    parser.add_argument("tuned", type=expand, help="model that the adapter turns it into")
    parser.add_argument("--rank", type=int, metavar="N", required=True, help="rank of each layer")
    parser.add_argument(
        "--layers",
        metavar="TEXT",
        help="presets, names or patterns as for --lora_layers (default: linear layers and convolutions)",
    )
    _add_writing(parser, model=False)
    return _extract


def resize(parser: ArgumentParser) -> Run:
    """Lower the rank of an adapter, or multiply it by a factor."""
    parser.add_argument("source", type=expand, help=SOURCE)
    parser.add_argument("--rank", type=int, metavar="N", help="highest rank of a layer")
    parser.add_argument(
        "--keep", type=float, metavar="SHARE", help="share of each layer's squared norm to keep, such as 0.95"
    )
    parser.add_argument("--scale", type=float, metavar="X", default=1.0, help="factor, such as 0.8 [1]")
    _add_writing(parser)
    return _resize


def _add_writing(parser: ArgumentParser, *, model: bool = True) -> None:
    parser.add_argument("--output", type=expand, required=True, metavar="FILE", help="ends in .safetensors")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    parser.add_argument("--dtype", choices=PRECISIONS, help="default: the adapter's if exact, else float32")
    if model:
        parser.add_argument("--model", type=expand, help="model of the adapter, to name layers in another naming")


def _info(*, source: str, model: str | None, as_json: bool) -> None:
    from dataclasses import asdict

    from mflux_vae.compare.measuring import without_infinities
    from mflux_vae_train.dreambooth.adapter_origin import base_model
    from mflux_vae_train.lora.editing import description
    from mflux_vae_train.lora.editing.adapter import open_adapter

    file = _file(source)
    found = open_adapter(file, name=_name(source, file))
    parts = description.groups(found)
    about = {
        "name": found.name,
        "dialect": description.dialect(file),
        "kind": "DoRA" if found.dora else "LoRA",
        "layers": sum(part.layers for part in parts),
        "networks": {
            name: sum(part.layers for part in parts if part.network == name)
            for name in {one.network: 0 for one in parts}
        },
        "convolutions": sum(part.convolutions for part in parts),
        "parameters": sum(part.parameters for part in parts),
        "dtype": str(found.dtype).removeprefix("mlx.core."),
        "bytes": file.stat().st_size,
        "layers_without_alpha": found.unstated,
        "base_model": base_model(file),
        "training": _training(file, found.metadata),
        "misfit": _misfit(file, model) if model is not None else None,
    }
    if as_json:
        answer = {**about, "fits": None if model is None else not about["misfit"], "groups": [*map(asdict, parts)]}
        print(json.dumps(without_infinities(answer), indent=2))
        return
    _print_info(about, parts, model)


def _training(file: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What the file, the settings of its run, and the model card state about the training."""
    from mflux_vae_train.dreambooth.adapter_origin import run_settings
    from mflux_vae_train.dreambooth.reporting.model_card import SETTINGS
    from mflux_vae_train.lora.editing import description
    from mflux_vae_train.lora.metadata import card

    settings = run_settings(file)
    of_run = {name: settings[name] for name in ("instance_prompt", *SETTINGS) if settings.get(name) is not None}
    prompt = card(file).get("instance_prompt")
    return {**({"instance_prompt": prompt} if prompt else {}), **description.training(metadata), **of_run}


def _print_info(about: Mapping[str, Any], parts: Sequence[Group], model: str | None) -> None:
    convolutions = f", {about['convolutions']:,} of them convolutions" if about["convolutions"] else ""
    print(
        f"{about['name']}: {about['kind']} in the spelling of {about['dialect']},"
        f" {count_text(about['layers'], 'layer')}{convolutions}, {about['parameters']:,} parameters,"
        f" {about['dtype']}, {size_text(about['bytes'])}"
    )
    if about["layers_without_alpha"]:
        print(f"  alpha: not stated for {count_text(about['layers_without_alpha'], 'layer')}; the rank is assumed")
    if about["base_model"]:
        print(f"  base model: {about['base_model']}")
    print("  networks: " + ", ".join(f"{name or 'unknown'} ({count:,})" for name, count in about["networks"].items()))
    for name, value in about["training"].items():
        print(f"  {name}: {value}")
    if model is not None:
        print(f"  does not fit {model}: {about['misfit']}" if about["misfit"] else f"  fits {model}")
    width = max(len(_full_name(part)) for part in parts)
    print(f"  {'layers':{width}}  count  rank  alpha  norm of the change")
    for part in parts:
        dead = f" ({'all' if part.unchanged == part.layers else part.unchanged} zero)" if part.unchanged else ""
        ranks, alphas = ("/".join(f"{value:g}" for value in each) for each in (part.ranks, part.alphas))
        print(f"  {_full_name(part):{width}}  {part.layers:5}  {ranks:>4}  {alphas:>5}  {part.norm:.4g}{dead}")


def _full_name(part: Group) -> str:
    return f"{part.network}.{part.name}" if part.network else part.name


def _misfit(file: Path, model: str) -> str:
    """Why an adapter does not fit a model; empty if it does."""
    from mflux_vae_train.lora.editing.adapter import open_adapter

    opened = _model(model)
    try:
        open_adapter(file, opened)
    except WeightsError as error:
        return str(error).removeprefix(f"{file}: ").partition(", not ")[0]  # without the names of keys
    return ""


def _convert(*, source: str, to: Any, model: str | None, output: str, **writing: Any) -> None:
    target, file = _target(output, writing), _file(source)
    (found,), its_model = _open([source], [file], model, naming=to)
    if found.dora and to == "kohya":
        logger.warning("DoRA's magnitudes are written as dora_scale, which diffusers ignores in kohya's naming")
    _write(target, found.changes, [found], its_model, {"command": "convert"}, naming=to, **writing)


def _merge(
    *,
    sources: Sequence[str],
    weights: Sequence[float],
    rank: int | None,
    model: str | None,
    output: str,
    **writing: Any,
) -> None:
    from mflux_vae_train.lora.editing.merging import merged
    from mflux_vae_train.lora.editing.resizing import resized

    _check_rank(rank)
    if len(sources) < 2:
        raise SettingsError("merge: give two adapters or more; resize --scale multiplies one by a factor")
    if not all(math.isfinite(weight) and weight for weight in weights):
        raise SettingsError("--weights: give numbers other than 0")
    target = _target(output, writing)
    found, its_model = _open(sources, [*map(_file, sources)], model)
    changes = merged(found, weights)
    names = [{name for name, _ in one.layers()} for one in found]
    shared, every = set.intersection(*names), set.union(*names)
    if not shared:
        logger.warning("the adapters have no layer in common; if they spell the same layers differently, give --model")
    print(f"{count_text(len(every), 'layer')}, {len(shared):,} of them in all {len(found)} adapters")
    if rank is not None:
        cut = resized(changes, rank=rank)
        changes = cut.changes
        _print_error(cut.errors, cut.error)
    record = {"command": "merge", "weights": weights, "rank": rank}
    _write(target, changes, found, its_model, record, **writing)


def _resize(
    *,
    source: str,
    rank: int | None,
    keep: float | None,
    scale: float,
    model: str | None,
    output: str,
    **writing: Any,
) -> None:
    from mflux_vae_train.lora.editing.adapter import refuse_dora
    from mflux_vae_train.lora.editing.resizing import resized, scaled

    _check_rank(rank)
    if rank is None and keep is None and scale == 1:
        raise SettingsError("resize: give --rank, --keep or --scale")
    if rank is not None and keep is not None:
        raise SettingsError("--rank and --keep both choose ranks; give one of them")
    if keep is not None and not 0 < keep <= 1:
        raise SettingsError(f"--keep {keep:g}: give a share between 0 and 1, such as 0.95")
    if not math.isfinite(scale) or not scale:
        raise SettingsError(f"--scale {scale:g}: give a number other than 0")
    target, file = _target(output, writing), _file(source)
    (found,), its_model = _open([source], [file], model)
    if scale != 1:
        refuse_dora(found, "cannot be scaled")
    changes = scaled(found.changes, scale)
    if rank is not None or keep is not None:
        if rank is not None and all(change.rank <= rank for _, change in found.layers()):
            logger.warning("--rank %d: no layer of %s has a higher rank", rank, found.name)
        cut = resized(changes, rank=rank, keep=keep)
        changes = cut.changes
        _print_error(cut.errors, cut.error)
    record = {"command": "resize", "rank": rank, "keep": keep, "scale": scale}
    _write(target, changes, [found], its_model, record, **writing)


def _extract(*, base: str, tuned: str, rank: int, layers: str | None, output: str, **writing: Any) -> None:
    from mflux_vae.runtime.device import assuming
    from mflux_vae.utils.item_bar import item_bar
    from mflux_vae_train import lora
    from mflux_vae_train.dreambooth.adapter_model import editable_model, editable_networks
    from mflux_vae_train.lora.editing.extraction import extract
    from mflux_vae_train.pipelines.capabilities import SupportsAdapterExport
    from mflux_vae_train.pipelines.registry import open_pipeline

    _check_rank(rank)
    target = _target(output, writing)
    first, second = (open_pipeline(each) for each in (base, tuned))
    patterns = None
    if layers is not None:
        patterns = lora.patterns_of(layers, first.lora_presets() if isinstance(first, SupportsAdapterExport) else {})
    model = editable_model(first)
    with assuming(cpu=True):  # float32, or the differences of weights are rounded
        ours, theirs = editable_networks(first), editable_networks(second)
    if ours.keys() != theirs.keys():
        raise SettingsError(f"{base} has {', '.join(ours)}, and {tuned} has {', '.join(theirs)}")

    bar = partial(item_bar, unit="tensor", disable=None)
    found = extract(ours, theirs, rank, patterns=patterns, progress=bar)
    for name, share in found.kept.items():
        print(f"{share:.4f}  {name}")
    print(f"{found.kept_in_all:.4f}  of the squared norm of the difference is kept, in {' and '.join(ours)}")
    if found.rounded:
        of, some = count_text(len(found.rounded), "parameter"), first_few(found.rounded)
        logger.warning("%s differ by rounding alone, as one model is stored in another dtype: %s", of, some)
    if found.left_out:
        largest = sorted(found.left_out, key=lambda name: -found.left_out[name])
        some = first_few([f"{name} (by {found.left_out[name]:.2g} of its norm)" for name in largest])
        logger.warning(
            "%s differ and are not in the adapter, most of all %s", count_text(len(largest), "parameter"), some
        )
    record = {"command": "extract", "base": public_name(base), "tuned": public_name(tuned), "layers": layers}
    _write(target, found.changes, [], model, record, naming="peft", **writing)


def _print_error(errors: Mapping[str, float], error: float) -> None:
    worst = max(errors, key=lambda name: errors[name])
    print(f"relative error of the change: {error:.3g}, at most {errors[worst]:.3g} ({worst})")


def _check_rank(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise SettingsError(f"--rank {rank}: give a number from 1 on")


# files


def _target(output: str, writing: dict[str, Any]) -> Path:
    from mflux_vae_train.lora.editing.writing import check_target

    check_target(Path(output), writing.pop("overwrite"))
    return Path(output)


def _file(source: str) -> Path:
    from mflux_vae_train.lora import fetch_adapter

    file = fetch_adapter(source)
    assert file is not None  # which only a call without download returns
    if not file.exists():
        raise WeightsError(f"{source}: {missing(file, 'not found')}; give a {SOURCE}")
    return file


def _name(source: str, file: Path) -> str:
    """Name of an adapter without the folders of this machine."""
    from mflux_vae_train.lora.location import FILES

    if not Path(source).exists():
        return source  # on the hub
    inside = file.resolve()
    return printable(f"{inside.parent.name}/{inside.name}" if inside.name in FILES else inside.name)


def _open(
    sources: Sequence[str], files: Sequence[Path], model: str | None, naming: str | None = None
) -> tuple[list[AdapterFile], Model | None]:
    """Read adapters, with their model if they or the wanted naming have different names for layers."""
    from mflux_vae_train.dreambooth.adapter_origin import base_model
    from mflux_vae_train.lora.editing.adapter import open_adapter
    from mflux_vae_train.lora.from_checkpoint import is_checkpoint

    names = [_name(*each) for each in zip(sources, files, strict=True)]
    found = [open_adapter(file, name=name) for file, name in zip(files, names, strict=True)]
    namings = {one.naming for one in found} | ({naming} if naming else set())
    opened = None
    if model is not None or len(namings) > 1 or any(map(is_checkpoint, files)):
        known = model or next(filter(None, (base_model(file, opens=True) for file in files)), None)
        if known is None:
            raise SettingsError(f"--model: needed to name the layers of {first_few(names)}; give the model it is for")
        logger.info("layers: those of %s", known)
        opened = _model(known)
        found = [open_adapter(file, opened, name) for file, name in zip(files, names, strict=True)]
    for one in found:
        if one.unstated:
            of = count_text(one.unstated, "layer")
            logger.warning("%s: alpha of %s is not stated, assuming the rank (scale 1)", one.name, of)
    return found, opened


def _write(
    target: Path,
    changes: Changes,
    read: Sequence[AdapterFile],
    model: Model | None,
    record: Mapping[str, Any],
    *,
    dtype: str | None,
    naming: Any = None,
) -> None:
    """Write an edited adapter, with a record of the edit in its metadata, and describe it in a line."""
    import mlx.core as mx

    from mflux_vae.weights.formats.files import open_weights
    from mflux_vae_train.lora.editing.merging import merged_targets
    from mflux_vae_train.lora.editing.writing import EDIT, write_adapter
    from mflux_vae_train.lora.metadata import other_metadata

    naming = naming or ("peft" if model is not None else read[0].naming)
    dtypes = {one.dtype for one in read}
    stated = {name: value for name, value in record.items() if value is not None}
    written = write_adapter(
        target,
        changes,
        naming=naming,
        model=model,
        targets=merged_targets(read),
        dtype=dtype,
        given=dtypes.pop() if len(dtypes) == 1 else mx.float32,
        metadata={
            **(model.metadata if model is not None and naming == "kohya" else {}),
            **(other_metadata(read[0].metadata) if len(read) == 1 else {}),
            EDIT: json.dumps({**stated, **({"adapters": [one.name for one in read]} if read else {})}),
        },
    )
    ends = (".lora_A.weight", ".lora_down.weight")
    ranks = sorted(tensor.shape[0] for name, tensor in open_weights(target)[0].items() if name.endswith(ends))
    rank = f"rank {ranks[0]}" if ranks[0] == ranks[-1] else f"ranks {ranks[0]} to {ranks[-1]}"
    layers, size = count_text(len(ranks), "layer"), size_text(target.stat().st_size)
    print(f"{target}: {layers} of {rank}, {naming} naming, {written}, {size}")
    if (split := sum(map(len, changes.values()))) > len(ranks):
        print(f"  {split} layers of the model are {len(ranks)} in this naming; ranks of those that it joins add up")


# models


def _model(name: str) -> Model:
    from mflux_vae_train.dreambooth.adapter_model import editable_model
    from mflux_vae_train.pipelines.registry import open_pipeline

    return editable_model(open_pipeline(name))
