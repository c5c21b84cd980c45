"""CLIP tokenizer folders with few words, in the layouts of the published Stable Diffusion models."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mflux_vae_train.tiny_world.tokenizers import BOS, EOS, build_clip_tokenizer

LAYOUTS = {"sd1": EOS, "sd2": "!", "sdxl": EOS, "sdxl_2": "!"}
"""Padding token by layout."""


def write_clip_folder(words: Iterable[str], folder: Path, layout: str, max_length: int = 77) -> int:
    """`vocab.json`, `merges.txt` and settings, without `tokenizer.json`; returns the vocabulary's size.

    SD 1 and 2 describe their tokens where they are named, and SD 2 says in `tokenizer_config.json` that it pads with
    the end of text. SDXL describes its tokens in `added_tokens_decoder`.
    """
    size = build_clip_tokenizer(words, folder, max_length)
    (folder / "tokenizer.json").unlink()
    special: dict[str, Any] = {"bos_token": _token(BOS), "eos_token": _token(EOS), "unk_token": _token(EOS)}
    config: dict[str, Any] = {name: {"__type": "AddedToken", **token} for name, token in special.items()}
    config |= {"pad_token": EOS, "model_max_length": max_length, "tokenizer_class": "CLIPTokenizer"}
    if layout.startswith("sdxl"):
        described = {size - 2: _token(BOS), size - 1: _token(EOS)}
        if layout == "sdxl_2":
            described = {0: _token("!", normalized=False), **described}
        config |= {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": LAYOUTS[layout]}
        config["added_tokens_decoder"] = {str(index): {**token, "special": True} for index, token in described.items()}
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": LAYOUTS[layout]}))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return size


def _token(text: str, *, normalized: bool = True) -> dict[str, Any]:
    return {"content": text, "lstrip": False, "normalized": normalized, "rstrip": False, "single_word": False}
