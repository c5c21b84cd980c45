"""Download from the Hugging Face hub into its cache; resumes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mflux_vae.errors import SettingsError, WeightsError
from mflux_vae.pretrained import refused
from mflux_vae.weights.formats.files import SUFFIXES, read_json
from mflux_vae.weights.keymaps.diffusers import STEM

_ID = re.compile(r"([\w.-]+/[\w.-]+?)(?:/(.+))?")
_CONFIGS = ("model_index.json", "config.json", "vae/config.json")
_WEIGHTS = (f"{STEM}.safetensors", f"{STEM}-*.safetensors", f"{STEM}.safetensors.index.json")
_OLD_WEIGHTS = (f"{STEM}.bin",)


def split(source: str) -> tuple[str, str] | None:
    """Split `owner/name/inside` into repository and path ("" if absent); None for other strings."""
    found = _ID.fullmatch(source)
    if found is None or source.startswith((".", "~")) or Path(found[1]).suffix in SUFFIXES:
        return None
    return found[1], found[2] or ""


def fetch(repository: str, inside: str = "") -> Path:
    """Download only the autoencoder of a repository.

    Args:
        repository: `owner/name`.
        inside: file or folder in it; "": the folder `vae`, or the root.

    Returns:
        cached file, or cached folder with `config.json` and weights.

    Raises:
        SettingsError: huggingface_hub is not installed.
        WeightsError: the repository does not exist, has no autoencoder, is gated, or is neither reachable nor cached.
    """
    if Path(inside).suffix in SUFFIXES:
        return download(repository, [inside]) / inside
    parts = [f"{inside}/config.json"] if inside else list(_CONFIGS)
    root = download(repository, parts)
    folder = inside or ("vae" if (root / "vae" / "config.json").is_file() else "")
    if not (root / folder / "config.json").is_file():
        raise WeightsError(f"{repository}: no {inside or 'vae'}/config.json; name one of its files: {repository}/FILE")
    refused.check_config(read_json(root / folder / "config.json"), repository)  # before the weights
    for names in (_WEIGHTS, _OLD_WEIGHTS):
        root = download(repository, [str(Path(folder) / name) for name in (*names, "config.json")])
        if any((root / folder).glob(f"{STEM}*")):
            return root / folder
    raise WeightsError(f"{repository}: no {Path(folder) / _WEIGHTS[0]}")


def download(repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """Download missing files of a repository into the hub's cache; resumes.

    Args:
        patterns: `fnmatch` patterns of paths.
        revision: branch, tag or commit; None: the main branch.

    Returns:
        folder of the snapshot.

    Raises:
        SettingsError, WeightsError: as `fetch`.
    """
    try:
        from huggingface_hub import errors, snapshot_download
    except ImportError as error:
        raise SettingsError(f"{repository}: downloading needs huggingface_hub; pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns), revision=revision))
    except errors.GatedRepoError as error:
        fix = f"accept its conditions on https://huggingface.co/{repository}, then log in: hf auth login"
        raise WeightsError(f"{repository}: gated; {fix}") from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"{repository}: no revision {revision!r}; give a branch, tag or commit") from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(f"{repository}: no such file, folder or hub repository") from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{repository}: no such file or folder, and not a valid repository name") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise WeightsError(f"{repository}: not cached and the hub cannot be reached; go online once") from error
    except Exception as error:  # errors of the hub, the HTTP client and the system have no common base
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise WeightsError(f"{repository}: download failed ({reason}); run the command again to resume") from error


def cached(repository: str, revision: str | None = None) -> Path | None:
    """Cached snapshot folder of a repository, complete or not; None if there is none."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(repository, local_files_only=True, allow_patterns=[], revision=revision))
    except Exception:  # `download` reports the reason
        return None


def file_hashes(repository: str, revision: str | None = None) -> dict[str, str]:
    """Hash of each file of a repository by path, as the hub lists them; empty if it cannot be reached."""
    try:
        from huggingface_hub import HfApi

        files = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=30).siblings or []
        return {one.rfilename: one.lfs.sha256 if one.lfs else str(one.blob_id) for one in files}
    except Exception:  # `download` reports the reason
        return {}


def has_autoencoder(repository: str, inside: str = "") -> bool:
    """Whether the autoencoder of a repository is in the cache, see `fetch`."""
    folder = cached(repository)
    if folder is None or Path(inside).suffix in SUFFIXES:
        return folder is not None and (folder / inside).is_file()
    return any(any((folder / part).glob(f"{STEM}*")) for part in {inside, "vae", ""})


def cache_folder() -> Path:
    """Folder of the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)
