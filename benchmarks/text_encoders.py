"""The text encoders T5, CLIP and Qwen3 against transformers: four prompts at once.

    python -m benchmarks.text_encoders

T5 1.1 base (12 layers, width 768, gated GELU) on 4 x 256 tokens, CLIP ViT-B's text encoder (12 layers, width 512) on
4 x 77, and 4 layers of Qwen3 of width 1024 on 4 x 128, a quarter of them padding.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from benchmarks.harness.backends import compiled_if, mlx_work, torch_device, torch_work
from benchmarks.harness.cli import Options, main
from benchmarks.harness.rows import Implementation, Row, Work
from benchmarks.harness.weights import fill_mlx, fill_torch

PROMPTS = 4
T5: dict[str, Any] = {
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 12,
    "num_heads": 12,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
CLIP: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "vocab_size": 49408,
    "eos_token_id": 49407,
}
QWEN3: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32128,
}
CASES = {"T5": (T5, 256), "CLIP": (CLIP, 77), "Qwen3": (QWEN3, 128)}
GAINS = {".SelfAttention.q.": T5["d_kv"] ** -0.5}
"""T5 scales its queries by their weights alone."""


def rows(options: Options) -> list[Row]:
    """The measurements."""
    return [
        Row(
            work=f"{name}, encode {PROMPTS} x {tokens} tokens",
            ours=Implementation(
                name="mflux-vae",
                build="benchmarks.text_encoders:ours",
                settings={"case": name},
                imports=(f"mflux_vae_train.pipelines.text.{name.lower()}",),
            ),
            peers=[
                Implementation(
                    name=torch,
                    build="benchmarks.text_encoders:transformers",
                    settings={"case": name, **variant},
                    imports=(f"transformers.models.{name.lower()}.modeling_{name.lower()}", "torch"),
                    optional=variant["compiled"],
                )
                for torch, variant in options.torch_variants(images=False).items()
            ],
            target=1.0,
            tolerance=1e-2 if options.gpu else 1e-3,
        )
        for name, (_, tokens) in CASES.items()
    ]


def inputs(case: str) -> np.ndarray:
    """Token ids (prompts, tokens), the last one CLIP's end of text."""
    config, tokens = CASES[case]
    ids = np.random.default_rng(0).integers(10, config["vocab_size"] - 10, (PROMPTS, tokens))
    ids[:, -1] = config.get("eos_token_id", 1)
    return ids


def padding(case: str) -> np.ndarray:
    """(prompts, tokens), 0 where Qwen3's tokens are padding."""
    tokens = CASES[case][1]
    return (np.arange(tokens) < np.linspace(tokens / 2, tokens, PROMPTS)[:, None]).astype(np.int32)


def ours(case: str) -> Work:
    """This project's encoder."""
    import mlx.core as mx

    from mflux_vae_train.pipelines.text.clip import CLIPTextConfig, CLIPTextModel
    from mflux_vae_train.pipelines.text.qwen3 import Qwen3Config, Qwen3Encoder
    from mflux_vae_train.pipelines.text.t5 import T5Config, T5Encoder

    ids, mask = mx.array(inputs(case)), mx.array(padding(case))
    if case == "T5":
        t5 = T5Encoder(T5Config(**T5))
        fill_mlx(t5, GAINS)
        return mlx_work(lambda: {"hidden": t5(ids)})
    if case == "Qwen3":
        qwen3 = Qwen3Encoder(Qwen3Config(**QWEN3))
        fill_mlx(qwen3)
        return mlx_work(lambda: {"hidden": qwen3(ids, mask, [QWEN3["num_hidden_layers"]])})
    clip = CLIPTextModel(CLIPTextConfig(**CLIP))
    fill_mlx(clip)
    return mlx_work(lambda: dict(zip(("hidden", "pooled"), clip(ids), strict=True)))


def transformers(case: str, compiled: bool, gpu: bool) -> Work:
    """transformers' encoder."""
    import torch
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        Qwen3Config,
        Qwen3Model,
        T5Config,
        T5EncoderModel,
    )

    device = torch_device(gpu)
    network: Any
    if case == "T5":
        network, prefix = T5EncoderModel(T5Config(**T5)), ""
    elif case == "Qwen3":
        network, prefix = Qwen3Model(Qwen3Config(**QWEN3, rope_theta=1e6)), "model."
    else:
        network, prefix = CLIPTextModel(CLIPTextConfig(**CLIP)), "text_model."
    fill_torch(network, GAINS if case == "T5" else None, prefix=prefix)
    given = {"input_ids": torch.from_numpy(inputs(case)).to(device)}
    if case == "Qwen3":
        given["attention_mask"] = torch.from_numpy(padding(case)).to(device)
    network = compiled_if(compiled, network.eval().to(device))

    def run() -> dict[str, Any]:
        with torch.inference_mode():
            out = network(**given)
        return {"hidden": out.last_hidden_state} | ({"pooled": out.pooler_output} if case == "CLIP" else {})

    return torch_work(run, device)


if __name__ == "__main__":
    sys.exit(main({"text_encoders": rows}, __doc__))
