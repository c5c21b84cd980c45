"""The file of an adapter, found from the path of the file or of a folder that holds one."""

from __future__ import annotations

from pathlib import Path

from mflux_vae.errors import WeightsError
from mflux_vae.pretrained import hub
from mflux_vae.utils.formatting import first_few
from mflux_vae.utils.links import missing, naming_broken_links

FILES = (
    *("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapters.safetensors"),
    *("pytorch_lora_weights.bin", "adapter_model.bin"),
    "state.safetensors",
)
"""Names of the file in a folder: diffusers', PEFT's, mlx-lm's, and that of a checkpoint."""

PEFT_CONFIG, CARD = "adapter_config.json", "README.md"
"""Files beside it, which state alpha and base model."""


def adapter_file(path: str | Path) -> Path:
    """`path` itself, or the adapter in it if it is a folder.

    Raises:
        WeightsError: the folder holds none of `FILES`, or is a checkpoint that does not exist.
    """
    path = Path(path)
    if not path.exists() and path.name.startswith("checkpoint-"):
        _refuse_missing_checkpoint(path)
    if not path.is_dir():
        return path
    with naming_broken_links(path):
        return _file_in(path)


def fetch_adapter(source: str, *, download: bool = True) -> Path | None:
    """The file of an adapter at a path, or on the hub as `owner/name` or `owner/name/FILE`.

    Returns:
        None if it is not in the hub's cache and must not be downloaded.

    Raises:
        WeightsError: see `adapter_file` and `hub.download`.
    """
    place = hub.split(source)
    if place is None or Path(source).exists():
        return adapter_file(source)
    repository, inside = place
    folder = hub.download(repository, _patterns(inside)) if download else hub.cached(repository)
    file = None if folder is None else folder / inside
    if file is None or (not download and not file.exists()):
        return None
    if not file.exists():
        raise WeightsError(f"{repository}: has no {inside}; give the name of a file in it")
    return adapter_file(file)


def _patterns(inside: str) -> list[str]:
    """Files to download: the adapter, and those beside it."""
    folder = inside.rpartition("/")[0]
    beside = [f"{folder}/{name}".lstrip("/") for name in (PEFT_CONFIG, CARD)]
    return [*([inside] if inside else FILES), *beside]


def _file_in(path: Path) -> Path:
    found = next((path / name for name in FILES if (path / name).is_file()), None)
    if found is None and (checkpoints := list(path.glob("checkpoint-*/state.safetensors"))):
        newest = max((one.parent for one in checkpoints), key=lambda folder: (len(folder.name), folder.name))
        raise WeightsError(f"{path}: holds no adapter yet; {newest} has the one of its last checkpoint: give that")
    if found is None:
        raise WeightsError(f"{path}: holds no adapter ({FILES[0]} or {FILES[1]}); give the path of its file")
    return found


def _refuse_missing_checkpoint(path: Path) -> None:
    numbers = [one.name.removeprefix("checkpoint-") for one in path.parent.glob("checkpoint-*")]
    there = [f"checkpoint-{number}" for number in sorted(filter(str.isdecimal, numbers), key=int)]
    has = f"{path.parent} has {first_few(there, 6)}" if there else f"{path.parent} has no checkpoint"
    raise WeightsError(f"{path}: {missing(path, 'no such folder')}; {has}")
