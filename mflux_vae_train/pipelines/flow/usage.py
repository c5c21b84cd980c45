"""Instructions for using an adapter in other programs, as Markdown."""

from __future__ import annotations

MODEL = "path/to/the/base/model"
"""Stands for a model without a repository."""

FOLDER = "path/to/this/folder"

NO_DORA = "mflux reads no DoRA. Train with `--fuse` to get a whole pipeline instead."


def diffusers(class_name: str, model: str, adapter: str, prompt: str, *, steps: int, guidance: float) -> str:
    """Python code that draws an image.

    Args:
        class_name: of the pipeline.
        model: repository or folder.
        adapter: name of its file, in PEFT's naming.
    """
    return f"""```python
import torch
from diffusers import {class_name}

pipeline = {class_name}.from_pretrained({model!r}, torch_dtype=torch.bfloat16)
pipeline.load_lora_weights({FOLDER!r}, weight_name={adapter!r})
image = pipeline(prompt={prompt!r}, num_inference_steps={steps}, guidance_scale={guidance:g}).images[0]
```"""
