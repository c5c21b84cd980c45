"""A tokenizer folder like Qwen3's, with a small vocabulary."""

from __future__ import annotations

import json
from pathlib import Path

from mflux_vae_train.pipelines.text.tokenizer import qwen_backend
from mflux_vae_train.tiny_world.tokenizers import _byte_characters

MERGES = [
    ("Ġ", "a"),
    ("p", "h"),
    ("ph", "o"),
    ("t", "o"),
    ("pho", "to"),
    ("Ġ", "d"),
    ("o", "g"),
    ("Ġd", "og"),
    ("Ċ", "Ċ"),
]
SPECIAL = {"<|endoftext|>": True, "<|im_start|>": True, "<|im_end|>": True, "<think>": False, "</think>": False}
"""Added tokens, and whether they are marked as special."""

CHAT_TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
"""The part of Qwen3's template that applies to messages without tools."""


def write_qwen_tokenizer(folder: Path, *, fast: bool = True) -> int:
    """Write the folder and return the number of ids.

    Args:
        fast: with `tokenizer.json`, as published; else with `vocab.json` and `merges.txt` alone.
    """
    from tokenizers import AddedToken

    pieces = [*sorted(_byte_characters().values()), *(left + right for left, right in MERGES)]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    folder.mkdir(parents=True, exist_ok=True)
    if fast:
        backend = qwen_backend(vocab, MERGES)
        backend.add_tokens([AddedToken(text, normalized=False, special=special) for text, special in SPECIAL.items()])
        backend.save(str(folder / "tokenizer.json"))
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = ["#version: 0.2", *(f"{left} {right}" for left, right in MERGES)]
    (folder / "merges.txt").write_text("\n".join(merges) + "\n", encoding="utf-8")
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(len(vocab) + index): {"content": text, **plain, "special": special}
        for index, (text, special) in enumerate(SPECIAL.items())
    }
    settings = {
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return len(vocab) + len(SPECIAL)
