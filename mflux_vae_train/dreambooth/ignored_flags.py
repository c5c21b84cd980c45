"""Flags of diffusers' DreamBooth scripts that are accepted and have no effect here, each with the reason for the log.

All their other flags are fields of `DreamBoothSettings` with the same names.
"""

from __future__ import annotations

from collections.abc import Mapping

_REASONS = {
    # machine
    "it is an option of torch or CUDA": "allow_tf32 enable_npu_flash_attention set_grads_to_none",
    "attention is MLX's fused kernel, which does not store the scores": "enable_xformers_memory_efficient_attention",
    "`mlx.launch` starts and numbers the processes": "local_rank",
    "images are encoded once before training, so there is no data loader": (
        "dataloader_num_workers num_dataloader_workers"
    ),
    "the base model computes in bfloat16 on Metal and CUDA and in float32 on a CPU; trained weights, noise and loss are"
    " float32": "mixed_precision prior_generation_precision",
    "adapters are trained and saved in float32": "upcast_before_saving",
    # data
    "latents are always cached": "cache_latents",
    "prompts are always encoded once, before training": "pre_compute_text_embeddings",
    "images come from the folder --instance_data_dir, with prompts in metadata.jsonl, metadata.csv or .txt files": (
        "dataset_name dataset_config_name image_column"
    ),
    "images are resized with the Lanczos filter": "image_interpolation_mode",
    # text encoders
    "the adapters of text encoder and denoiser are saved in one file": "skip_save_text_encoder",
    # hub
    "nothing is uploaded; run `hf upload` on the output folder": "push_to_hub hub_model_id",
    "downloads use the token of `hf auth login` or HF_TOKEN, and nothing is uploaded": "hub_token",
    "downloads go to the Hub's cache; move it with the environment variable HF_HOME": "cache_dir",
    # pipeline
    "the pipeline's tokenizers are used": "tokenizer_name tokenizer_max_length",
    "pipelines mask padding as their models were trained": "text_encoder_use_attention_mask",
    "pipelines are conditioned on prompts alone": "class_labels_conditioning",
    "previews use the pipeline's sampler": "validation_scheduler",
    "previews are sampled from prompts: --validation_prompt": "validation_images",
}

IGNORED_FLAGS: Mapping[str, str] = {name: reason for reason, names in _REASONS.items() for name in names.split()}
