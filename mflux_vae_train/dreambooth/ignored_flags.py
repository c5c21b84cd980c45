"""Flags of diffusers' DreamBooth scripts that are accepted and have no effect here, each with the reason for the log.

All their other flags are fields of `DreamBoothSettings` with the same names.
"""

from __future__ import annotations

from collections.abc import Mapping

_MLX = "it is an option of torch or CUDA"
_PRECISION = (
    "the base model computes in bfloat16 on Metal and CUDA and in float32 on a CPU; trained weights, noise and loss are"
    " float32"
)
_LOADED = "images are encoded once before training, so there is no data loader"
_HUB = "nothing is uploaded; run `hf upload` on the output folder"
_DATASET = "images come from the folder --instance_data_dir, with prompts in metadata.jsonl or .txt files"
_WEIGHTING = "noise levels are weighted with --weighting_scheme"
_NO_OFFSET = "noise is drawn without an offset, as the models were trained"

IGNORED_FLAGS: Mapping[str, str] = {
    # machine
    "allow_tf32": _MLX,
    "enable_xformers_memory_efficient_attention": "attention is MLX's fused kernel, which does not store the scores",
    "enable_npu_flash_attention": _MLX,
    "set_grads_to_none": _MLX,
    "local_rank": "`mlx.launch` starts and numbers the processes",
    "dataloader_num_workers": _LOADED,
    "num_dataloader_workers": _LOADED,
    "mixed_precision": _PRECISION,
    "prior_generation_precision": _PRECISION,
    "upcast_before_saving": "adapters are trained and saved in float32",
    # data
    "cache_latents": "latents are always cached",
    "pre_compute_text_embeddings": "prompts are always encoded once, before training",
    "dataset_name": _DATASET,
    "dataset_config_name": _DATASET,
    "image_column": _DATASET,
    "image_interpolation_mode": "images are resized with the Lanczos filter",
    # objective
    "snr_gamma": _WEIGHTING,
    "offset_noise": _NO_OFFSET,
    "noise_offset": _NO_OFFSET,
    # text encoders
    "skip_save_text_encoder": "the adapters of text encoder and denoiser are saved in one file",
    # hub
    "push_to_hub": _HUB,
    "hub_token": "downloads use the token of `hf auth login` or HF_TOKEN, and " + _HUB,
    "hub_model_id": _HUB,
    "cache_dir": "downloads go to the Hub's cache; move it with the environment variable HF_HOME",
    # decided by pipelines
    "tokenizer_name": "the pipeline's tokenizers are used",
    "tokenizer_max_length": "the pipeline's tokenizers are used",
    "text_encoder_use_attention_mask": "pipelines mask padding as their models were trained",
    "class_labels_conditioning": "pipelines are conditioned on prompts alone",
    "validation_scheduler": "previews use the pipeline's sampler",
    "validation_images": "previews are sampled from prompts: --validation_prompt",
}
