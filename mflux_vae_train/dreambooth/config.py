"""Settings of a DreamBooth run. Each field is a command-line flag, a key of the YAML file, and a line of the help."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from mflux_vae.errors import SettingsError
from mflux_vae_train.optimizers import registry
from mflux_vae_train.pipelines.noise import SCHEMES
from mflux_vae_train.settings.fields import check_fields, flag

OPTIMIZER_FLAGS = {
    **{f"adam_{option}": option for option in ("beta1", "beta2", "epsilon", "weight_decay")},
    **{f"prodigy_{option}": option for option in ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")},
}
"""The option of an optimizer that each flag sets, see `optimizers.registry`."""


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One subject of a run that teaches several: an item of `DreamBoothSettings.concepts`. None: as the run's own."""

    instance_data_dir: str = flag("folder with the pictures of the subject")
    instance_prompt: str = flag("prompt that names the subject")
    class_prompt: str | None = flag("prompt for its class", None)
    class_data_dir: str | None = flag("folder with pictures of its class", None)
    repeats: int | None = flag("times that each picture counts in an epoch", None, least=1)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("instance_data_dir", "instance_prompt"):
            if not getattr(self, name).strip():
                raise SettingsError(f"--{name} is empty")
        if self.class_prompt is not None and not self.class_prompt.strip():
            raise SettingsError("--class_prompt is empty; leave it out to have it derived from --instance_prompt")


@dataclass(frozen=True, kw_only=True)
class DreamBoothSettings:
    """Everything a DreamBooth run can be told. `None` means that the run or the pipeline chooses, and says what.

    A *step* is an optimizer update everywhere: warm-up, schedule, checkpoints and validation count updates.

    Raises:
        SettingsError: a value is of the wrong kind or outside its limits, or two settings exclude each other.
    """

    model: str = flag(
        "name of a registered pipeline, a folder that one of them opens, owner/name on the Hugging Face hub, or a file"
        " of a denoiser's weights (the other parts are then downloaded)",
        aliases=("pretrained_model_name_or_path",),
        group="what is learnt, from what",
    )
    revision: str | None = flag("branch, tag or commit of a model on the hub", None)
    variant: str | None = flag("of the weights files, such as fp16", None)
    instance_data_dir: str = flag("folder with the pictures of the subject [required]", "")
    instance_prompt: str = flag('prompt that names the subject, e.g. "a photo of sks dog" [required]', "")
    concepts: tuple[Concept, ...] | None = flag(
        "several subjects instead of one: in a YAML file a list of instance_data_dir, instance_prompt, class_prompt,"
        " class_data_dir, repeats",
        None,
    )
    output_dir: str = flag("folder for adapter, checkpoints, samples and logs", "dreambooth-output")
    resolution: int | None = flag("side of a training picture in pixels (none: the pipeline's)", None, least=8)
    caption_column: str | None = flag(
        "key of the prompt in metadata.jsonl, which wins over a picture's own .txt file, which wins over"
        " --instance_prompt (none: text or prompt)",
        None,
    )
    repeats: int = flag("times that each picture counts in an epoch", 1, least=1)
    center_crop: bool = flag("take the centre of each picture, not one of --num_crops places by chance", True)
    num_crops: int = flag("places that a picture is cut at with --no_center_crop", 4, least=2)
    random_flip: bool = flag("mirror half of the samples", False)
    use_aspect_ratio_buckets: bool = flag(
        "train each picture in the nearest of eleven shapes with the pixels of --resolution, instead of a square", False
    )
    aspect_ratio_buckets: str | None = flag('shapes of your own, "height,width;height,width;..."', None)
    masked_loss: bool = flag(
        "errors count by the grey of NAME-mask.png beside NAME.jpg: white fully, black not at all", False
    )
    encodings_dir: str | None = flag(
        "folder where runs share encoded pictures and prompts (none: in --output_dir)", None
    )

    class_prompt: str | None = flag(
        "prompt for the class (none: derived from --instance_prompt where that is clear)",
        None,
        group="prior preservation",
    )
    class_data_dir: str | None = flag(
        "folder with class pictures, filled up by the base model (none: in --output_dir)", None
    )
    prior_preservation: str | None = flag(
        "keep the class alive by pictures of it; by the base model's own predictions for the class prompt, without"
        " pictures (dop); or not (none given: class_images where a class prompt is known)",
        None,
        choices=("class_images", "dop", "none"),
    )
    with_prior_preservation: bool | None = flag("the same as --prior_preservation class_images", None)
    prior_loss_weight: float | None = flag("weight of the prior term (none: the pipeline's; 1 for dop)", None, least=0)
    num_class_images: int = flag("class pictures wanted; missing ones are generated", 10, least=1)
    sample_batch_size: int | None = flag(
        "class pictures drawn at once (none: a million pixels, at most sixteen pictures)", None, least=1
    )

    train_mode: str = flag(
        "train a low-rank adapter, or all weights", "lora", choices=("lora", "full"), group="what is trained"
    )
    rank: int | None = flag("rank of the adapter (none: the pipeline's)", None, least=1)
    lora_alpha: float | None = flag("scale of the adapter is alpha / rank (none: alpha = rank)", None, above=0)
    lora_dropout: float = flag("dropout in front of the adapter", 0.0, least=0, below=1)
    lora_layers: str | None = flag(
        "layers to adapt: attention, attention+mlp, all, or names (to_q) and patterns (*.attn.*) with commas between"
        " (none: the pipeline's)",
        None,
    )
    use_dora: bool = flag("train the magnitude of each weight row beside the adapter (DoRA)", False)
    lora_weights: str | None = flag(
        "adapter to start from, in PEFT's or kohya's naming: its rank, alpha and layers stand", None
    )
    train_text_encoder: bool = flag("also train an adapter on the text encoder that the pipeline offers", False)
    output_kohya_format: bool = flag("write the adapter in kohya's naming, too", False)
    fuse: bool = flag("leave a whole pipeline with the adapter in its weights, too", False)
    quantize: int | None = flag(
        "hold the frozen weights in 4 or 8 bits: an adapter is trained over them (QLoRA)",
        None,
        least=4,
        most=8,
        group="fitting into memory",
    )
    gradient_checkpointing: bool = flag("compute activations twice instead of keeping them", False)
    max_sequence_length: int | None = flag(
        "tokens of a prompt (none, or more than that: as many as the model was trained with)", None, least=1
    )
    memory_limit: float | None = flag(
        "GB that the run may take, by its estimate; one that takes more is refused (none: all there are, and a"
        " warning)",
        None,
        above=0,
    )
    train_batch_size: int | None = flag(
        "instance pictures in a micro-batch; auto: the most that fit into memory, and as many fewer micro-batches",
        1,
        least=1,
        group="how much",
    )
    gradient_accumulation_steps: int = flag("micro-batches in an update", 4, least=1)
    max_train_steps: int = flag("optimizer updates", 800, least=1)
    num_train_epochs: int | None = flag(
        "passes over the instance pictures, instead of --max_train_steps", None, least=1
    )
    caption_dropout: float | None = flag(
        "share of training prompts replaced by the empty one, which guidance needs (none: the pipeline's)",
        None,
        least=0,
        below=1,
        group="objective",
    )
    weighting_scheme: str | None = flag(
        "how noise levels are drawn and errors weighted (none given: as the pipeline recommends)",
        None,
        choices=tuple(SCHEMES),
    )
    logit_mean: float = flag(
        "mean of the schemes that draw from a normal distribution: above 0 trains less noisy levels, as in diffusers"
        " (in kohya's scripts more noisy ones)",
        0.0,
    )
    logit_std: float = flag("standard deviation of the same schemes", 1.0, above=0)
    mode_scale: float = flag("how much mode prefers the middle levels", 1.29, least=-1, most=1.75)
    guidance: float | None = flag(
        "guidance of class pictures and previews (none: the pipeline's)", None, least=0, aliases=("guidance_scale",)
    )

    learning_rate: float | None = flag(
        "peak learning rate (none: the pipeline's for the train mode)", None, above=0, group="optimizer"
    )
    text_encoder_lr: float | None = flag(
        "that of --train_text_encoder (none: a twentieth of --learning_rate; not Prodigy's, which has one for all)",
        None,
        above=0,
    )
    scale_lr: bool = flag("multiply --learning_rate by the number of pictures in an update", False)
    lr_scheduler: str = flag(
        "shape after warm-up; constant, too, has one",
        "cosine",
        choices=("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    )
    lr_num_cycles: int = flag("cosines one after the other, of cosine_with_restarts", 1, least=1)
    lr_power: float = flag("power of polynomial", 1.0, above=0)
    lr_warmup_steps: int = flag("updates of linear warm-up", 50, least=0)
    optimizer: str = flag(
        registry.help_text(registry.with_default_rate()), "adamw", choices=registry.with_default_rate()
    )
    use_8bit_adam: bool = flag("the same as --optimizer adamw8bit", False)
    max_grad_norm: float = flag("clip gradients to this global norm", 1.0, above=0)
    adam_beta1: float = flag("decay of the first moment (not Adafactor's)", 0.9, least=0, below=1)
    adam_beta2: float | None = flag(
        "decay of the second moment (none: 0.999; 0.99 for Lion; Adafactor's grows by itself)", None, least=0, below=1
    )
    adam_weight_decay: float = flag("decoupled weight decay", 1e-4, least=0)
    adam_weight_decay_text_encoder: float = flag(
        "that of --train_text_encoder (not Prodigy's, which has one for all)", 1e-3, least=0
    )
    adam_epsilon: float = flag("epsilon of AdamW and Prodigy", 1e-8, above=0)
    prodigy_beta3: float | None = flag(
        "decay of what Prodigy finds its rate by (none: the square root of --adam_beta2)", None, above=0, below=1
    )
    prodigy_decouple: bool = flag("decay Prodigy's weights as AdamW does", True)
    prodigy_use_bias_correction: bool = flag("Adam's bias correction in Prodigy", True)
    prodigy_safeguard_warmup: bool = flag("keep a warm-up out of Prodigy's estimate", True)

    validation_prompt: tuple[str, ...] | None = flag(
        "prompts of the previews, any number of them (none: --instance_prompt of each subject)", None, group="watching"
    )
    validation_steps: int | None = flag("updates between previews (none: eight times over the run)", None, least=1)
    validation_epochs: int | None = flag("epochs between previews, instead of --validation_steps", None, least=1)
    num_validation_images: int = flag("pictures of each prompt in a preview; 0 for no previews", 4, least=0)
    report_to: str | None = flag(
        "where numbers and pictures go beside the run's own report.html; all: those that are installed (extras"
        " tensorboard, wandb)",
        None,
        choices=("tensorboard", "wandb", "all", "none"),
    )
    logging_dir: str | None = flag("folder for what --report_to writes (none: logs in --output_dir)", None)

    checkpointing_steps: int | None = flag(
        "updates between checkpoints (none: only at the end)", 200, least=1, group="saving and resuming"
    )
    checkpoints_total_limit: int | None = flag("checkpoints kept, newest first (none: all)", 2, least=1)
    resume_from_checkpoint: str | None = flag('"latest" in --output_dir, or the folder of a checkpoint', None)
    allow_changes: bool = flag("continue a run although its data, model or settings have changed", False)
    seed: int = flag("every random draw is a function of it", 0, least=0, below=2**32)
    dry_run: bool = flag("say what would happen, and stop", False)

    def __post_init__(self) -> None:
        if isinstance(self.optimizer, str):  # diffusers writes AdamW
            object.__setattr__(self, "optimizer", self.optimizer.lower())
        check_fields(self)
        self._settle_concepts()
        for name in ("model", "output_dir"):
            if not getattr(self, name).strip():
                raise SettingsError(f"--{name} is empty")
        folders = {os.path.realpath(self.output_dir): "output_dir"}
        for concept in self.subjects:
            for name in ("instance_data_dir", "class_data_dir"):
                if (folder := getattr(concept, name)) is None:
                    continue
                # what a run writes into one, class pictures or a loss curve, would be taken for pictures of the other
                if (other := folders.setdefault(os.path.realpath(folder), name)) != name:
                    raise SettingsError(f"--{other} and --{name} are the same folder, {folder}; each needs its own")
        flagged, named = self.with_prior_preservation, self.prior_preservation
        if None not in (flagged, named) and flagged != (named == "class_images"):
            raise SettingsError(
                f"--{'' if flagged else 'no_'}with_prior_preservation contradicts --prior_preservation {named}"
            )
        if self.validation_steps is not None and self.validation_epochs is not None:
            raise SettingsError("--validation_steps and --validation_epochs: give one of them")
        if self.train_mode == "full" and self.prior_preservation == "dop":
            raise SettingsError(
                "--prior_preservation dop compares with the base model, which --train_mode full changes"
            )
        if self.use_8bit_adam and self.optimizer not in ("adamw", "adamw8bit"):
            raise SettingsError(f"--use_8bit_adam: only with --optimizer adamw, and --optimizer is {self.optimizer}")
        if self.use_8bit_adam:
            object.__setattr__(self, "optimizer", "adamw8bit")
        given = [f"--{name}" for name in _OF_LORA if getattr(self, name) not in (None, 0)]  # False is 0
        if given and self.train_mode == "full":
            raise SettingsError(f"{', '.join(given)}: only with --train_mode lora, and --train_mode is full")
        if self.lora_weights is not None and self.lora_layers is not None:
            raise SettingsError("--lora_layers: --lora_weights says which layers")
        if self.use_dora and self.output_kohya_format:
            raise SettingsError("--output_kohya_format cannot hold what --use_dora trains")

        if self.quantize not in (None, 4, 8):
            raise SettingsError(f"--quantize is {self.quantize}; 4 or 8 is allowed")
        if self.quantize is not None and self.train_mode == "full":
            raise SettingsError("--quantize: only with --train_mode lora, as quantised weights cannot be trained")

    @property
    def subjects(self) -> tuple[Concept, ...]:
        """The concepts, or the single one that the settings describe, each with its `repeats`."""
        concepts = self.concepts or (Concept(**{name: getattr(self, name) for name in _OF_THE_FIRST}),)
        return tuple(replace(one, repeats=one.repeats or self.repeats) for one in concepts)

    def _settle_concepts(self) -> None:
        """Where there are concepts, these settings' own fields are those of the first."""
        missing = [f"--{name}" for name in _OF_THE_FIRST[:2] if self.concepts is None and not getattr(self, name)]
        if missing:
            raise SettingsError("missing: " + ", ".join(missing))
        for name in _OF_THE_FIRST:
            first = getattr(self.subjects[0], name)
            if getattr(self, name) not in ("", None, first):
                raise SettingsError(f"--{name} is given beside --concepts, which say it of each")
            object.__setattr__(self, name, first)


_OF_LORA = (
    *("rank", "lora_alpha", "lora_dropout", "lora_layers", "use_dora", "lora_weights"),
    *("output_kohya_format", "fuse", "train_text_encoder"),
)

_OF_THE_FIRST = ("instance_data_dir", "instance_prompt", "class_prompt", "class_data_dir")
