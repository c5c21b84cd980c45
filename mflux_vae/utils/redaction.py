"""Remove access tokens from logs, files and messages."""

from __future__ import annotations

import os
import re

HIDDEN = "[token]"

_TOKEN = re.compile(
    r"\b(?:hf|api_org)_[A-Za-z0-9]{12,}"  # Hugging Face
    r"|(?<=://)[^\s/@]+(?=@)"  # user:password@ in a URL
    r"|(?<=[?&]token=)[^\s&]+|(?<=[?&]access_token=)[^\s&]+"
    r"|(?<=Bearer )\S+"
)
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY")


def redacted(text: str) -> str:
    """Replace access tokens (by their form, or known from environment variables) with `HIDDEN`."""
    for name in _VARIABLES:
        secret = os.environ.get(name, "").strip()
        if len(secret) >= 8:
            text = text.replace(secret, HIDDEN)
    return _TOKEN.sub(HIDDEN, text)
