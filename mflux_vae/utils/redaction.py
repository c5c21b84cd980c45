"""Access tokens do not belong into logs, files and messages."""

from __future__ import annotations

import os
import re

HIDDEN = "[token]"

_TOKEN = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{12,}"  # Hugging Face's own, as they look
    r"|(?<=://)[^\s/@]+(?=@)"  # user:password@ in an address
    r"|(?<=[?&]token=)[^\s&]+|(?<=[?&]access_token=)[^\s&]+"
    r"|(?<=Bearer )\S+"
)
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY")


def redacted(text: str) -> str:
    """The text with `HIDDEN` in the place of whatever looks like an access token, or is one in the environment."""
    for name in _VARIABLES:
        secret = os.environ.get(name, "").strip()
        if len(secret) >= 8:
            text = text.replace(secret, HIDDEN)
    return _TOKEN.sub(HIDDEN, text)
