"""Weights from the Hugging Face hub: into its cache, once, resumed where a download broke off."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.weights.formats.files import SUFFIXES
from mflux_vae.weights.keymaps.diffusers import STEM

_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:/(.+))?")
_CONFIGS = ("model_index.json", "config.json", "vae/config.json")
_WEIGHTS = (f"{STEM}.safetensors", f"{STEM}-*.safetensors", f"{STEM}.safetensors.index.json")
_OLD_WEIGHTS = (f"{STEM}.bin",)


def split(source: str) -> tuple[str, str] | None:
    """`owner/name` and what is asked for inside, "" for anything; None where it is no name of a repository."""
    found = _ID.fullmatch(source)
    if found is None or source.startswith((".", "~")) or Path(found[1]).suffix in SUFFIXES:
        return None
    return found[1], found[2] or ""


def fetch(repository: str, inside: str = "") -> Path:
    """Download an autoencoder, and nothing else of its repository.

    Args:
        repository: `owner/name`.
        inside: a file or a folder of it; "" for its `vae` folder, or what lies at its top.

    Returns:
        the file, or the folder that has `config.json` and weights, in the hub's cache.

    Raises:
        SettingsError: huggingface_hub is not installed.
        WeightsError: no such repository or nothing fitting in it, it is gated, or it cannot be reached and the cache
            does not have it.
    """
    if Path(inside).suffix in SUFFIXES:
        return download(repository, [inside]) / inside
    parts = [f"{inside}/config.json"] if inside else list(_CONFIGS)
    root = download(repository, parts)
    folder = inside or ("vae" if (root / "vae" / "config.json").is_file() else "")
    if not (root / folder / "config.json").is_file():
        raise WeightsError(
            f"{repository}: has no {inside or 'vae'}/config.json; name one of its files: {repository}/FILE"
        )
    for names in (_WEIGHTS, _OLD_WEIGHTS):
        root = download(repository, [str(Path(folder) / name) for name in (*names, "config.json")])
        if any((root / folder).glob(f"{STEM}*")):
            return root / folder
    raise WeightsError(f"{repository}: has no {Path(folder) / _WEIGHTS[0]}")


def download(repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Download files of a repository into the hub's cache, those that it does not have; what broke off is resumed.

    Args:
        patterns: of their paths, as `fnmatch` has them.
        revision: branch, tag or commit; None for the main branch.

    Returns:
        the folder of the snapshot.

    Raises:
        SettingsError, WeightsError: as `fetch`.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise SettingsError(f"{repository}: to download it, pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), revision=revision))
    except errors.GatedRepoError as error:
        cure = f"accept its conditions on https://huggingface.co/{repository}, then log in: hf auth login"
        raise WeightsError(f"{repository}: is gated; {cure}") from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"{repository}: has no revision {revision!r}; name a branch, a tag or a commit") from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(f"{repository}: no such file or folder here, and no such repository on the hub") from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{repository}: no such file or folder, and no name of a repository") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise WeightsError(f"{repository}: not in the cache, and the hub cannot be reached; go online once") from error
    except Exception as error:  # the hub's errors, the HTTP client's and the system's have no common base
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise WeightsError(f"{repository}: the download failed ({reason}); the same command resumes it") from error


def cached(repository: str, revision: str | None = None) -> Path | None:
    """The folder of a repository's snapshot in the hub's cache, whatever it holds; None where there is none."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, local_files_only=True, allow_patterns=[], revision=revision))
    except Exception:  # not installed, not there, or no such name: `download` says which
        return None


def cache_folder() -> Path:
    """The hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
