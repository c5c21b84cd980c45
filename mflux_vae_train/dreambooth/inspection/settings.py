"""Settings of a run, of which the folder of images is enough for a check."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mflux_vae.image_folder.scan import scan
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.data.captions import captions
from mflux_vae_train.dreambooth.data.identifier import identifier_of, is_identifier
from mflux_vae_train.pipelines.protocol import Recommended
from mflux_vae_train.settings.fields import check_fields, flag
from mflux_vae_train.settings.origins import origins_of

NO_MODEL = "none"

ASSUMED = Recommended(
    resolution=512, size_multiple=8, learning_rate=1e-4, learning_rate_full=1e-6, guidance=3.5, steps=20, rank=16
)
"""Of an unknown model. All but its sizes is unused in a check."""

_RARE_WORD = "sks"


@dataclass(frozen=True, kw_only=True)
class CheckSettings(DreamBoothSettings):
    """Settings of a run. Without a model there is `NO_MODEL`, without a prompt an assumed one."""

    NEEDED: ClassVar[Mapping[str, str]] = {"instance_data_dir": "concepts"}

    model: str = flag("as for training", NO_MODEL, aliases=("pretrained_model_name_or_path",), path=True)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.concepts is None and self.instance_data_dir and not self.instance_prompt:
            object.__setattr__(self, "instance_prompt", assumed_prompt(Path(self.instance_data_dir)))
        super().__post_init__()


def assumed_prompt(folder: Path) -> str:
    """ "a photo of sks dog" for a folder `dog`, with the identifier of most captions in place of sks.

    Raises:
        ImageError: there is no such folder.
        SettingsError: its metadata cannot be read.
    """
    found = captions(scan(folder), prompt="", errors=[])
    words = Counter(word for image in sorted(found.captioned) if (word := identifier_of(found.texts[image])))
    identifier = words.most_common(1)[0][0] if words else _RARE_WORD
    names = [word for word in re.findall("[a-z]+", folder.resolve().name.lower()) if not is_identifier(word)]
    return f"a photo of {identifier} {' '.join(names) or 'subject'}"


def assumptions(settings: CheckSettings) -> list[str]:
    """A line for each setting that a run needs or takes from its model, and that was not given."""
    lines = []
    if settings.model == NO_MODEL:
        size = "" if settings.resolution else f"--resolution {ASSUMED.resolution} is assumed, and "
        lines.append(f"no --model: {size}tokens of prompts are not counted")
    if settings.concepts is None and "instance_prompt" not in origins_of(settings):
        lines.append(f"no --instance_prompt: {settings.instance_prompt!r} is assumed")
    return lines
