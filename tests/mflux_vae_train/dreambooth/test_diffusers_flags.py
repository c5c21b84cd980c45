"""Each flag of diffusers' DreamBooth scripts is a setting of the same name, or is ignored with a reason."""

from __future__ import annotations

import dataclasses
import logging
import typing
from collections.abc import Sequence
from pathlib import Path

import pytest

from mflux_vae.errors import SettingsError
from mflux_vae_train.dreambooth.config import DreamBoothSettings
from mflux_vae_train.dreambooth.ignored_flags import IGNORED_FLAGS
from mflux_vae_train.dreambooth.planning.bnb_config import with_quantization
from mflux_vae_train.settings.fields import field_type, is_tuple
from mflux_vae_train.settings.flags import settings_from
from mflux_vae_train.settings.values import Refused

NEEDED = ["--model=tiny", "--instance_data_dir=pictures", "--instance_prompt=a photo of sks dog"]

FLUX = {
    "allow_tf32": True, "adam_beta1": "0.8", "adam_beta2": "0.9", "adam_epsilon": "1e-7", "adam_weight_decay": "1e-3",
    "cache_latents": True, "caption_column": "text", "center_crop": True, "checkpointing_steps": "100",
    "checkpoints_total_limit": "3", "class_data_dir": "dogs", "class_prompt": "a dog", "dataloader_num_workers": "4",
    "enable_xformers_memory_efficient_attention": True, "gradient_accumulation_steps": "2",
    "gradient_checkpointing": True, "guidance_scale": "3.5", "instance_data_dir": "mine", "instance_prompt": "a",
    "learning_rate": "1e-5", "local_rank": "0", "logging_dir": "logs", "logit_mean": "0.5", "logit_std": "2",
    "lora_alpha": "8", "lora_dropout": "0.1", "lora_layers": "attn.to_k,attn.to_q", "lr_num_cycles": "2",
    "lr_power": "2", "lr_scheduler": "constant_with_warmup", "lr_warmup_steps": "5", "max_grad_norm": "2",
    "max_train_steps": "10", "mixed_precision": "bf16", "mode_scale": "1.1", "num_class_images": "20",
    "num_train_epochs": "3", "num_validation_images": "2", "optimizer": "AdamW", "output_dir": "somewhere",
    "pretrained_model_name_or_path": "black-forest-labs/FLUX.1-dev", "prior_loss_weight": "0.5", "prodigy_beta3": "0.9",
    "prodigy_decouple": True, "prodigy_safeguard_warmup": True, "prodigy_use_bias_correction": True,
    "random_flip": True, "rank": "8", "repeats": "2", "report_to": "wandb", "resolution": "64",
    "resume_from_checkpoint": "latest", "revision": "main", "sample_batch_size": "2", "scale_lr": True, "seed": "7",
    "train_batch_size": "2", "use_8bit_adam": True, "validation_epochs": "5", "validation_prompt": "b",
    "variant": "fp16", "weighting_scheme": "logit_normal", "with_prior_preservation": True,
    "adam_weight_decay_text_encoder": "1e-3", "cache_dir": "there", "dataset_config_name": "c", "dataset_name": "d",
    "enable_npu_flash_attention": True, "hub_model_id": "a/b", "hub_token": "t", "image_column": "image",
    "image_interpolation_mode": "lanczos", "max_sequence_length": "512", "prior_generation_precision": "bf16",
    "push_to_hub": True, "text_encoder_lr": "5e-6", "train_text_encoder": True, "upcast_before_saving": True,
    "caption_dropout": "0.1", "use_aspect_ratio_buckets": True, "aspect_ratio_buckets": "64,64;64,48",
    # scripts for Stable Diffusion
    "noise_offset": "0.1", "offset_noise": True, "output_kohya_format": True, "pre_compute_text_embeddings": True,
    "set_grads_to_none": True, "snr_gamma": "5", "text_encoder_use_attention_mask": True, "tokenizer_max_length": "77",
    "tokenizer_name": "x", "use_dora": True, "validation_steps": "9", "class_labels_conditioning": "x",
    "validation_scheduler": "x", "skip_save_text_encoder": True, "validation_images": "x",
    "num_dataloader_workers": "1", "clip_skip": "2", "pretrained_vae_model_name_or_path": "sdxl-fp16-fix",
    "do_edm_style_training": True, "token_abstraction": "TOK", "num_new_tokens_per_abstraction": "2",
    "train_text_encoder_ti": True, "train_text_encoder_ti_frac": "0.5", "train_text_encoder_frac": "0.8",
    "use_blora": True, "lora_unet_blocks": "unet.up_blocks.0.attentions.0,unet.up_blocks.0.attentions.1",
    # scripts for FLUX.2 klein, Z-Image and Krea 2
    "bnb_quantization_config_path": "bnb.json", "do_fp8_training": True, "final_validation_prompt": "c",
    "fsdp_text_encoder": True, "offload": True, "skip_final_inference": True, "text_encoder_out_layers": "10 20 30",
    "validation_guidance_scale": "0", "validation_model_path": "krea/Krea-2-Turbo",
    "validation_num_inference_steps": "8",
}  # fmt: skip
"""Example values; True for flags without a value."""

_ALL = """
    adam_beta1=0.9 adam_beta2=0.999 adam_epsilon=1e-08 allow_tf32 center_crop checkpointing_steps=500
    checkpoints_total_limit class_data_dir class_prompt dataloader_num_workers=0
    enable_xformers_memory_efficient_attention gradient_accumulation_steps=1 gradient_checkpointing hub_model_id
    hub_token instance_data_dir instance_prompt local_rank=-1 logging_dir=logs lr_num_cycles=1 lr_power=1.0
    lr_scheduler=constant lr_warmup_steps=500 max_grad_norm=1.0 max_train_steps mixed_precision num_class_images=100
    num_train_epochs=1 num_validation_images=4 pretrained_model_name_or_path prior_generation_precision
    prior_loss_weight=1.0 push_to_hub report_to=tensorboard resume_from_checkpoint revision sample_batch_size=4
    scale_lr seed train_batch_size=4 train_text_encoder use_8bit_adam validation_prompt variant with_prior_preservation
"""
_SD = """
    adam_weight_decay=0.01 class_labels_conditioning pre_compute_text_embeddings resolution=512
    text_encoder_use_attention_mask tokenizer_max_length tokenizer_name validation_images
"""
_SDXL = """
    adam_weight_decay=0.0001 cache_dir caption_column dataset_config_name dataset_name do_edm_style_training
    image_column=image image_interpolation_mode=lanczos learning_rate=0.0001 lora_dropout=0.0 optimizer=AdamW
    output_dir=lora-dreambooth-model pretrained_vae_model_name_or_path prodigy_beta3 prodigy_decouple=True
    prodigy_safeguard_warmup=True prodigy_use_bias_correction=True random_flip rank=4 repeats=1 resolution=1024
    snr_gamma text_encoder_lr=5e-06 use_dora validation_epochs=50
"""
_FLOW = """
    adam_beta1=0.9 adam_beta2=0.999 adam_epsilon=1e-08 adam_weight_decay=0.0001 allow_tf32 cache_dir cache_latents
    caption_column center_crop checkpointing_steps=500 checkpoints_total_limit class_data_dir class_prompt
    dataloader_num_workers=0 dataset_config_name dataset_name gradient_accumulation_steps=1 gradient_checkpointing
    hub_model_id hub_token image_column=image instance_data_dir instance_prompt local_rank=-1 logging_dir=logs
    logit_mean=0.0 logit_std=1.0 lora_dropout=0.0 lora_layers lr_num_cycles=1 lr_power=1.0 lr_scheduler=constant
    lr_warmup_steps=500 max_grad_norm=1.0 max_sequence_length=512 max_train_steps mixed_precision mode_scale=1.29
    num_class_images=100 num_train_epochs=1 num_validation_images=4 optimizer=AdamW pretrained_model_name_or_path
    prior_loss_weight=1.0 prodigy_beta3 prodigy_decouple=True prodigy_safeguard_warmup=True
    prodigy_use_bias_correction=True push_to_hub random_flip repeats=1 report_to=tensorboard resolution=512
    resume_from_checkpoint revision sample_batch_size=4 scale_lr seed train_batch_size=4 upcast_before_saving
    use_8bit_adam validation_epochs=50 validation_prompt variant weighting_scheme=none with_prior_preservation
"""
_FLUX = """
    adam_weight_decay_text_encoder=0.001 enable_npu_flash_attention guidance_scale=3.5 learning_rate=0.0001 lora_alpha=4
    prior_generation_precision rank=4 text_encoder_lr=5e-06
"""
_NEWER = """
    aspect_ratio_buckets bnb_quantization_config_path do_fp8_training final_validation_prompt offload
    skip_final_inference use_aspect_ratio_buckets
"""
SCRIPTS = {
    "train_dreambooth": f"""{_ALL} {_SD}
        learning_rate=5e-06 offset_noise output_dir=dreambooth-model set_grads_to_none skip_save_text_encoder snr_gamma
        validation_scheduler=DPMSolverMultistepScheduler validation_steps=100""",
    "train_dreambooth_lora": f"""{_ALL} {_SD}
        image_interpolation_mode=lanczos learning_rate=0.0005 lora_dropout=0.0 output_dir=lora-dreambooth-model rank=4
        validation_epochs=50""",
    "train_dreambooth_lora_sdxl": f"""{_ALL} {_SDXL}
        adam_weight_decay_text_encoder=0.001 output_kohya_format""",
    "train_dreambooth_lora_sdxl_advanced": f"""{_ALL} {_SDXL}
        adam_weight_decay_text_encoder cache_latents clip_skip lora_unet_blocks noise_offset=0
        num_new_tokens_per_abstraction=2 token_abstraction=TOK train_text_encoder_frac=1.0 train_text_encoder_ti
        train_text_encoder_ti_frac=0.5 use_blora""",
    "train_dreambooth_lora_flux": f"""{_FLOW} {_FLUX}
        output_dir=flux-dreambooth-lora train_text_encoder""",
    # text_encoder_out_layers=10 20 30 is refused: the model was trained with others
    "train_dreambooth_lora_flux2_klein": f"""{_FLOW} {_FLUX} {_NEWER}
        caption_dropout=0.0 fsdp_text_encoder output_dir=flux-dreambooth-lora text_encoder_out_layers""",
    "train_dreambooth_lora_z_image": f"""{_FLOW} {_FLUX} {_NEWER}
        fsdp_text_encoder output_dir=z-image-dreambooth-lora""",
    "train_dreambooth_lora_krea2": f"""{_FLOW} {_NEWER}
        caption_dropout=0.0 learning_rate=0.0003 lora_alpha=32 output_dir=krea2-dreambooth-lora rank=32
        validation_guidance_scale=0.0 validation_model_path validation_num_inference_steps=8""",
}
"""Flags of the scripts, with their defaults."""

FIELDS = {
    name: field for field in dataclasses.fields(DreamBoothSettings) for name in (field.name, *field.metadata["aliases"])
}
HINTS = typing.get_type_hints(DreamBoothSettings)


@pytest.mark.parametrize("name", FLUX)
def test_every_diffusers_flag_is_a_setting_or_ignored(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    value = FLUX[name]
    words = [f"--{name}"] if value is True else [f"--{name}", str(value)]
    needed = [word for word in NEEDED if not word.startswith(f"--{name}=")]
    if name == "pretrained_model_name_or_path":
        needed = NEEDED[1:]
    if isinstance(IGNORED_FLAGS.get(name), Refused):
        with pytest.raises(SettingsError, match=f"--{name}: "):
            settings_from(DreamBoothSettings, [*needed, *words], ignored_flags=IGNORED_FLAGS)
        return
    given = settings_from(DreamBoothSettings, [*needed, *words], ignored_flags=IGNORED_FLAGS)
    messages = [record.getMessage() for record in caplog.records]
    if name in IGNORED_FLAGS:
        assert name not in FIELDS, "a setting does something"
        assert messages == [f"--{name} has no effect: {IGNORED_FLAGS[name]}"]
        return
    field = FIELDS[name]
    found = getattr(given, field.name)
    assert not messages
    kind, _ = field_type(HINTS[field.name])
    if is_tuple(HINTS[field.name]):
        assert found == (value,)
    elif kind is str:
        assert found.lower() == str(value).lower()  # AdamW is adamw
    else:
        assert found == kind(value)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_of_a_script_with_its_default(script: str, caplog: pytest.LogCaptureFixture) -> None:
    words = SCRIPTS[script].split()
    names = {word.split("=")[0] for word in words}
    assert names <= FLUX.keys() and names <= FIELDS.keys() | IGNORED_FLAGS.keys()
    stated = [f"--{word}" for word in words if "=" in word]
    settings_from(DreamBoothSettings, [*NEEDED, *stated], ignored_flags=IGNORED_FLAGS)
    ignored = {record.getMessage().split()[0].removeprefix("--") for record in caplog.records}
    assert ignored == {
        word.split("=")[0] for word in words if "=" in word and isinstance(IGNORED_FLAGS.get(word.split("=")[0]), str)
    }


def test_a_file_with_all_flags_of_a_script_off(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    refused = [name for name, why in IGNORED_FLAGS.items() if isinstance(why, Refused)]
    file.write_text("".join(f"{name}: {'null' if i % 2 else 'false'}\n" for i, name in enumerate(refused)))
    settings_from(DreamBoothSettings, [*NEEDED, f"--config={file}"], ignored_flags=IGNORED_FLAGS)
    file.write_text("learning_rate: 1e-4\nuse_blora: true\n")
    with pytest.raises(SettingsError, match="line 2: use_blora"):
        settings_from(DreamBoothSettings, [*NEEDED, f"--config={file}"], ignored_flags=IGNORED_FLAGS)


def test_a_quantization_of_bitsandbytes(tmp_path: Path) -> None:
    file = tmp_path / "bnb.json"

    def read(content: str, *words: str) -> tuple[DreamBoothSettings, Sequence[str]]:
        file.write_text(content)
        given = settings_from(DreamBoothSettings, [*NEEDED, f"--bnb_quantization_config_path={file}", *words])
        return with_quantization(given)

    nf4 = '{"_load_in_4bit": true, "load_in_8bit": false, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"}'
    settings, (line,) = read(nf4)
    assert settings.quantize == read(nf4, "--quantize=4")[0].quantize == 4
    assert "affine" in line and line.endswith("without effect: bnb_4bit_quant_type")
    settings, (line,) = read('{"load_in_8bit": true}')
    assert settings.quantize == 8 and "without effect" not in line
    for content, word in (("{}", "must be true"), ("[4]", "list"), ("{4}", "JSON")):
        with pytest.raises(SettingsError, match=f"bnb.json.*{word}"):
            read(content)
    with pytest.raises(SettingsError, match="4 bits"):
        read(nf4, "--quantize=8")
    with pytest.raises(SettingsError, match="--train_mode lora"):
        read(nf4, "--train_mode=full")
    file.unlink()
    with pytest.raises(SettingsError, match="does not exist"):
        with_quantization(settings)


def test_text_encoder_layers_that_the_model_was_trained_with() -> None:
    words = [*NEEDED, "--text_encoder_out_layers", "9", "18", "27"]
    settings_from(DreamBoothSettings, words, ignored_flags=IGNORED_FLAGS)


def test_an_ignored_flag_with_several_values() -> None:
    words = [*NEEDED, "--validation_images", "a.png", "b.png", "--rank", "8"]
    assert settings_from(DreamBoothSettings, words, ignored_flags=IGNORED_FLAGS).rank == 8


def test_reasons_are_one_line() -> None:
    for name, why in IGNORED_FLAGS.items():
        reason = why.reason if isinstance(why, Refused) else why
        assert len(reason) > 15 and "\n" not in reason and not reason.endswith("."), name
