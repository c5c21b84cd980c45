"""Settings of a DreamBooth run. Each field is a command-line flag, a key of the YAML file and a line of the help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from mflux_vae.errors import SettingsError
from mflux_vae.utils.paths import same_place
from mflux_vae_train.optimizers import registry
from mflux_vae_train.pipelines.noise import SCHEMES
from mflux_vae_train.settings.fields import check_fields, flag
from mflux_vae_train.training import awake

OPTIMIZER_FLAGS = {
    **{f"adam_{option}": option for option in ("beta1", "beta2", "epsilon", "weight_decay")},
    **{f"prodigy_{option}": option for option in ("beta3", "decouple", "use_bias_correction", "safeguard_warmup")},
}
"""The option of an optimizer that each flag sets, see `optimizers.registry`."""


OFFSET_NOISE = 0.1
"""Size of the noise offset in diffusers' scripts with ``--offset_noise``."""

_CONCEPT_FIELDS = ("instance_data_dir", "instance_prompt", "class_prompt", "class_data_dir", "validation_data_dir")

_REPLACES = (
    *(
        ((name,), (other,))
        for pair in (
            ("max_train_steps", "num_train_epochs"),
            ("validation_steps", "validation_epochs"),
            ("prior_preservation", "with_prior_preservation"),
            ("optimizer", "use_8bit_adam"),
        )
        for name, other in (pair, pair[::-1])
    ),
    (("lora_weights",), ("rank", "lora_alpha", "lora_layers", "use_dora")),
    (("concepts",), _CONCEPT_FIELDS),
    (_CONCEPT_FIELDS[:2], ("concepts",)),
)


@dataclass(frozen=True, kw_only=True)
class Concept:
    """One subject of a run with several: an item of `DreamBoothSettings.concepts`. None: the run's setting."""

    instance_data_dir: str = flag("folder with images of the subject", path=True)
    instance_prompt: str = flag("prompt that names the subject")
    class_prompt: str | None = flag("prompt for its class", None)
    class_data_dir: str | None = flag("folder with images of its class", None, path=True)
    validation_data_dir: str | None = flag("folder with held-out images of the subject", None, path=True)
    repeats: int | None = flag("how often each image is used in an epoch", None, least=1)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("instance_data_dir", "instance_prompt"):
            if not getattr(self, name).strip():
                raise SettingsError(f"--{name} is empty")
        if self.class_prompt is not None and not self.class_prompt.strip():
            raise SettingsError("--class_prompt is empty; leave it out to derive it from --instance_prompt")


@dataclass(frozen=True, kw_only=True)
class DreamBoothSettings:
    """All settings of a DreamBooth run. `planning.resolve` fills in those that are None, and the log lists them.

    A *step* is an optimizer update everywhere: warm-up, schedule, checkpoints and validation count updates.

    Attributes:
        MAIN: flags that ``--help`` shows.
        NEEDED: settings that must be given unless another one is.
        REPLACES, EXCLUSIVE, COMPUTED: settings with several names, see `settings.origins`.

    Raises:
        SettingsError: a value has the wrong type or is out of range, or two settings exclude each other.
    """

    MAIN: ClassVar[Sequence[str]] = (
        *("model", "instance_data_dir", "instance_prompt", "output_dir", "resolution", "prior_preservation", "rank"),
        *("quantize", "gradient_checkpointing", "train_batch_size", "gradient_accumulation_steps", "max_train_steps"),
        *("learning_rate", "validation_prompt", "dry_run"),
    )
    NEEDED: ClassVar[Mapping[str, str]] = {"instance_data_dir": "concepts", "instance_prompt": "concepts"}
    REPLACES: ClassVar[Sequence[tuple[Sequence[str], Sequence[str]]]] = _REPLACES
    EXCLUSIVE: ClassVar[Sequence[tuple[str, str]]] = (("num_train_epochs", "max_train_steps"),)
    COMPUTED: ClassVar[Mapping[str, str]] = {"max_train_steps": "num_train_epochs"}

    model: str = flag(
        "name of a pipeline, folder of a model, owner/name on the Hugging Face Hub, or file with a denoiser's weights"
        " (the other parts are then downloaded)",
        aliases=("pretrained_model_name_or_path",),
        group="model and data",
        path=True,
    )
    vae: str | None = flag(
        "another autoencoder for the model: a name such as sdxl-fp16-fix, a folder, a file, or owner/name on the Hub"
        " (default: the model's)",
        None,
        aliases=("pretrained_vae_model_name_or_path",),
        path=True,
    )
    revision: str | None = flag("branch, tag or commit of a model on the Hub", None)
    variant: str | None = flag("variant of the weight files, such as fp16", None)
    prediction_type: str | None = flag(
        "what the denoiser in a --model file predicts, if the file does not state it",
        None,
        choices=("epsilon", "v_prediction"),
    )
    preview_model: str | None = flag(
        "another model of the same architecture, given like --model, that draws previews (with the adapter) and class"
        " images: the distilled sibling of a base model needs a tenth of the steps. Its class images differ from the"
        " base model's (default: --model)",
        None,
        aliases=("validation_model_path",),
        path=True,
    )
    instance_data_dir: str = flag("folder with images of the subject [required]", "", path=True)
    instance_prompt: str = flag('prompt that names the subject, e.g. "a photo of sks dog" [required]', "")
    concepts: tuple[Concept, ...] | None = flag(
        "several subjects: a YAML list with instance_data_dir, instance_prompt and, optionally, class_prompt,"
        " class_data_dir, validation_data_dir, repeats of each",
        None,
    )
    output_dir: str = flag("folder for adapter, checkpoints, previews and logs", "dreambooth-output", path=True)
    resolution: int | None = flag("side of the training images in pixels (default: the pipeline's)", None, least=8)
    caption_column: str | None = flag(
        "key of the prompts in metadata.jsonl or metadata.csv (default: text or prompt); an image without a prompt"
        " there uses the .txt or .caption file beside it, then --instance_prompt",
        None,
    )
    repeats: int = flag("how often each image is used in an epoch", 1, least=1)
    center_crop: bool = flag("crop the centre of each image; with --no_center_crop one of --num_crops crops", True)
    num_crops: int = flag("number of crops along an image's longer side, with --no_center_crop", 4, least=2)
    random_flip: bool = flag("flip half of the samples horizontally", False)
    use_aspect_ratio_buckets: bool = flag(
        "train each image in the nearest of eleven aspect ratios, all with the pixel count of a square", False
    )
    aspect_ratio_buckets: str | None = flag('custom shapes: "height,width;height,width;..."', None)
    masked_loss: bool = flag(
        "weight the loss of NAME.jpg by the grey levels of NAME-mask.png, NAME-masklabel.png or masks/NAME.png: white"
        " 1, black 0",
        False,
    )
    encodings_dir: str | None = flag(
        "cache of encoded images and prompts, which runs can share (default: in --output_dir)", None, path=True
    )

    class_prompt: str | None = flag(
        "prompt for the class of the subject (default: derived from --instance_prompt if it is unambiguous)",
        None,
        group="prior preservation",
    )
    class_data_dir: str | None = flag(
        "folder with class images; the base model generates missing ones (default: in --output_dir)", None, path=True
    )
    prior_preservation: str | None = flag(
        "class_images: also train on images of the class; dop: keep the prediction for the class prompt at the base"
        " model's, without images (default: class_images if there is a class prompt)",
        None,
        choices=("class_images", "dop", "none"),
    )
    with_prior_preservation: bool | None = flag("same as --prior_preservation class_images", None)
    prior_loss_weight: float | None = flag(
        "weight of the prior preservation loss (default: the pipeline's; 1 for dop)", None, least=0
    )
    num_class_images: int = flag("number of class images; 0 for no prior preservation", 10, least=0)
    sample_batch_size: int | None = flag(
        "batch size for generating class images (default: a million pixels, at most sixteen images)", None, least=1
    )

    train_mode: str = flag(
        "train a low-rank adapter, or all weights", "lora", choices=("lora", "full"), group="trained weights"
    )
    rank: int | None = flag("rank of the adapter (default: the pipeline's)", None, least=1)
    lora_alpha: float | None = flag("the adapter is scaled by alpha / rank (default: the rank)", None, above=0)
    lora_dropout: float = flag("dropout on the input of the adapter", 0.0, least=0, below=1)
    lora_layers: str | None = flag(
        "layers to adapt: attention, attention+mlp, all, or a comma-separated list of names (to_q) and patterns"
        " (*.attn.*) (default: the pipeline's)",
        None,
    )
    use_dora: bool = flag("also train the magnitude of each weight row (DoRA)", False)
    lora_weights: str | None = flag(
        "adapter to start from: a file, or the folder of a run, adapter or checkpoint, in PEFT's or kohya's naming; it"
        " sets rank, alpha and layers",
        None,
        path=True,
    )
    assistant_lora: str | None = flag(
        "adapter that is active in training only, as a help for distilled models: a file, a folder, or owner/name/FILE"
        " on the Hub; class images, previews and the result are without it",
        None,
        path=True,
    )
    train_text_encoder: bool = flag(
        "also train the text encoders that the pipeline offers, an adapter or all weights as --train_mode says", False
    )
    output_kohya_format: bool = flag("also save the adapter in kohya's naming", False)
    fuse: bool = flag("also save the whole pipeline with the adapter fused into its weights", False)
    fuse_single_file: bool = flag(
        "with --fuse or --train_mode full: also save the whole pipeline as one file for ComfyUI and others", False
    )
    quantize: int | None = flag(
        "quantize the frozen weights to 4 or 8 bits, and train an adapter on them (QLoRA)",
        None,
        least=4,
        most=8,
        group="memory",
    )
    bnb_quantization_config_path: str | None = flag(
        "JSON file of a BitsAndBytesConfig: same as --quantize 4 or 8", None, path=True
    )
    gradient_checkpointing: bool | None = flag(
        "recompute activations in the backward pass to save memory (default: if the run does not fit without)", None
    )
    max_sequence_length: int | None = flag("maximum number of tokens of a prompt (default: the model's)", None, least=1)
    clip_skip: int | None = flag(
        "last layers of the text encoder to leave out, beyond those that the model leaves out; one less than in kohya's"
        " scripts and AUTOMATIC1111 (default: 0)",
        None,
        least=0,
    )
    memory_limit: float | None = flag(
        "refuse a run whose estimated memory exceeds this many GB (default: log a warning if it exceeds the available"
        " memory)",
        None,
        above=0,
    )
    estimate_for: str | None = flag(
        "with --dry_run: estimate memory for another device; give its memory as --memory_limit (default: this device)",
        None,
        choices=("mac", "cuda", "cpu"),
    )
    train_batch_size: int | None = flag(
        "instance images in a micro-batch; auto: as many as fit into memory, with as many fewer micro-batches",
        1,
        least=1,
        group="length",
    )
    gradient_accumulation_steps: int = flag("micro-batches in an update", 4, least=1)
    exact_micro_batches: bool = flag("compute micro-batches one by one, also small ones on a CPU", False)
    max_train_steps: int = flag("number of optimizer updates", 800, least=1)
    num_train_epochs: int | None = flag("number of epochs, instead of --max_train_steps", None, least=1)
    caption_dropout: float | None = flag(
        "share of training prompts replaced by the empty prompt, for classifier-free guidance; of class images, too,"
        " other than in diffusers' scripts (default: the pipeline's)",
        None,
        least=0,
        below=1,
        group="objective",
    )
    weighting_scheme: str | None = flag(
        "how noise levels are drawn and losses weighted (default: the pipeline's)", None, choices=tuple(SCHEMES)
    )
    logit_mean: float = flag(
        "mean of the schemes that draw from a normal distribution; above 0 trains lower noise levels, as in diffusers"
        " (in kohya's scripts higher ones)",
        0.0,
    )
    logit_std: float = flag("standard deviation of these schemes", 1.0, above=0)
    mode_scale: float = flag("how strongly mode prefers medium noise levels", 1.29, least=-1, most=1.75)
    snr_gamma: float | None = flag(
        "limit of the Min-SNR weight of the loss, 5 is usual (default: no such weight); for discrete noise schedules",
        None,
        above=0,
    )
    noise_offset: float | None = flag(
        "add a random constant of this size to the noise of each channel, 0.1 is usual (default: none); for discrete"
        " noise schedules",
        None,
        least=0,
    )
    offset_noise: bool | None = flag("same as --noise_offset 0.1", None)
    guidance: float | None = flag(
        "guidance scale of class images and previews (default: that of the model that draws them); without"
        " --preview_model, models with an input for it are trained with it",
        None,
        least=0,
        aliases=("guidance_scale", "validation_guidance_scale"),
    )
    num_inference_steps: int | None = flag(
        "denoising steps of class images and previews (default: those of the model that draws them)",
        None,
        least=1,
        aliases=("validation_num_inference_steps",),
    )

    learning_rate: float | None = flag(
        "peak learning rate (default: the pipeline's for the train mode)", None, above=0, group="optimizer"
    )
    text_encoder_lr: float | None = flag(
        "learning rate of the text encoders (default: learning_rate / 20, or with --train_mode full the same; unused by"
        " prodigy)",
        None,
        above=0,
    )
    scale_lr: bool = flag("multiply --learning_rate by the number of images per update", False)
    lr_scheduler: str = flag(
        "schedule after the warm-up",
        "cosine",
        choices=("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    )
    lr_num_cycles: int = flag("number of cycles of cosine_with_restarts", 1, least=1)
    lr_power: float = flag("power of polynomial", 1.0, above=0)
    lr_warmup_steps: int = flag("updates of linear warm-up, before every schedule", 50, least=0)
    optimizer: str = flag(
        registry.help_text(registry.with_default_rate()), "adamw", choices=registry.with_default_rate()
    )
    use_8bit_adam: bool = flag("same as --optimizer adamw8bit", False)
    max_grad_norm: float = flag("clip gradients to this global norm", 1.0, above=0)
    adam_beta1: float = flag("decay of the first moment (unused by adafactor)", 0.9, least=0, below=1)
    adam_beta2: float | None = flag(
        "decay of the second moment (default: 0.999, or 0.99 for lion; unused by adafactor)", None, least=0, below=1
    )
    adam_weight_decay: float = flag("decoupled weight decay", 1e-4, least=0)
    adam_weight_decay_text_encoder: float = flag("weight decay of the text encoders (unused by prodigy)", 1e-3, least=0)
    adam_epsilon: float = flag("epsilon of adamw and prodigy", 1e-8, above=0)
    prodigy_beta3: float | None = flag(
        "decay of prodigy's rate estimate (default: square root of --adam_beta2)", None, above=0, below=1
    )
    prodigy_decouple: bool = flag("decoupled weight decay in prodigy", True)
    prodigy_use_bias_correction: bool = flag("Adam's bias correction in prodigy", True)
    prodigy_safeguard_warmup: bool = flag("keep the warm-up out of prodigy's estimate", True)

    validation_prompt: tuple[str, ...] | None = flag(
        "prompts of the previews, one or more (default: --instance_prompt of each subject)",
        None,
        aliases=("final_validation_prompt",),
        group="monitoring",
    )
    validation_steps: int | None = flag("updates between previews (default: an eighth of the run)", None, least=1)
    validation_epochs: int | None = flag("epochs between previews, instead of --validation_steps", None, least=1)
    num_validation_images: int = flag("images per prompt in a preview; 0 for no previews", 4, least=0)
    validation_data_dir: str | None = flag(
        "folder with more images of the subject, with captions and masks as in --instance_data_dir: they are not"
        " trained, and the loss on them is measured during the run, always with the same noise",
        None,
        path=True,
    )
    validation_share: float | None = flag(
        "share of the instance images to hold out for that instead, at least one of each subject (0.2 of ten are two)",
        None,
        above=0,
        below=1,
    )
    validation_loss_steps: int | None = flag(
        "updates between measurements of the held-out loss (default: --validation_steps)", None, least=1
    )
    report_to: str | None = flag(
        "trackers for metrics and previews, beside report.html; all: those that are installed (extras tensorboard,"
        " wandb)",
        None,
        choices=("tensorboard", "wandb", "all", "none"),
    )
    open_report: bool = flag("open report.html in the browser when training starts", False)
    logging_dir: str | None = flag("folder for the trackers' files (default: logs in --output_dir)", None, path=True)

    checkpointing_steps: int | None = flag(
        "updates between checkpoints (none: only at the end)", 200, least=1, group="saving and resuming"
    )
    checkpoints_total_limit: int | None = flag("number of newest checkpoints to keep (none: all)", 2, least=1)
    keep_best: bool = flag("also keep the adapter with the lowest held-out loss so far, in best/", False)
    resume_from_checkpoint: str | None = flag(
        "latest, or a checkpoint to go back to: its name in --output_dir, or a path", None, path=True
    )
    allow_changes: bool = flag("continue a run although its data, model or settings have changed", False)
    seed: int = flag("seed of all random numbers", 0, least=0, below=2**32)
    caffeinate: bool = flag(awake.HELP, True)
    dry_run: bool = flag("show what the command would do, and stop", False)

    def __post_init__(self) -> None:
        check_fields(self)
        self._adopt_first_concept()
        for name in ("model", "output_dir"):
            if not getattr(self, name).strip():
                raise SettingsError(f"--{name} is empty")
        folders = [("output_dir", self.output_dir)]
        for concept in self.subjects:
            for name in ("instance_data_dir", "class_data_dir", "validation_data_dir"):
                if (folder := getattr(concept, name)) is None:
                    continue
                # images that a run writes into one folder would be read as images of the other
                for other, its_folder in folders:
                    if other != name and same_place(its_folder, folder):
                        raise SettingsError(f"--{other} and --{name} are the same folder, {folder}; give two folders")
                folders.append((name, folder))
        flagged, named = self.with_prior_preservation, self.prior_preservation
        if None not in (flagged, named) and flagged != (named == "class_images"):
            raise SettingsError(
                f"--{'' if flagged else 'no_'}with_prior_preservation contradicts --prior_preservation {named}"
            )
        if self.offset_noise and self.noise_offset is None:
            object.__setattr__(self, "noise_offset", OFFSET_NOISE)
        if self.validation_steps is not None and self.validation_epochs is not None:
            raise SettingsError("--validation_steps and --validation_epochs exclude each other; give one of them")
        held_out = [one.validation_data_dir for one in self.subjects if one.validation_data_dir is not None]
        if held_out and self.validation_share is not None:
            raise SettingsError("--validation_data_dir and --validation_share exclude each other; give one of them")
        if self.keep_best and not held_out and self.validation_share is None:
            raise SettingsError("--keep_best needs held-out images: give --validation_share or --validation_data_dir")
        if self.train_mode == "full" and self.prior_preservation == "dop":
            raise SettingsError(
                "--prior_preservation dop compares with the base model, which --train_mode full changes"
            )
        if self.use_8bit_adam and self.optimizer not in ("adamw", "adamw8bit"):
            raise SettingsError(f"--use_8bit_adam: only with --optimizer adamw, and --optimizer is {self.optimizer}")
        if self.use_8bit_adam:
            object.__setattr__(self, "optimizer", "adamw8bit")
        if self.preview_model is not None and self.preview_model == self.model:
            raise SettingsError("--preview_model is --model, which draws previews anyway; leave it out")
        given = [f"--{name}" for name in _LORA_ONLY if getattr(self, name) not in (None, 0)]  # False is 0
        if given and self.train_mode == "full":
            raise SettingsError(f"{', '.join(given)}: only with --train_mode lora, and --train_mode is full")
        if self.lora_weights is not None and self.lora_layers is not None:
            raise SettingsError("--lora_layers cannot be combined with --lora_weights, which sets the layers")
        if self.use_dora and self.assistant_lora is not None:
            raise SettingsError("--assistant_lora cannot be combined with --use_dora, whose magnitudes include it")
        if self.use_dora and self.output_kohya_format:
            raise SettingsError("--output_kohya_format cannot be combined with --use_dora (no magnitudes)")
        if self.quantize not in (None, 4, 8):
            raise SettingsError(f"--quantize is {self.quantize}; 4 or 8 is allowed")
        if self.quantize is not None and self.train_mode == "full":
            raise SettingsError("--quantize: only with --train_mode lora, as quantized weights cannot be trained")

    @property
    def subjects(self) -> tuple[Concept, ...]:
        """The concepts, or the single one that the settings describe, each with its `repeats`."""
        concepts = self.concepts or (Concept(**{name: getattr(self, name) for name in _CONCEPT_FIELDS}),)
        return tuple(replace(one, repeats=one.repeats or self.repeats) for one in concepts)

    def _adopt_first_concept(self) -> None:
        """Set the run's own fields to those of the first concept."""
        missing = [f"--{name}" for name in _CONCEPT_FIELDS[:2] if self.concepts is None and not getattr(self, name)]
        if missing:
            raise SettingsError("missing: " + ", ".join(missing))
        first_concept = self.subjects[0]
        for name in _CONCEPT_FIELDS:
            first = getattr(first_concept, name)
            if getattr(self, name) not in ("", None, first):
                raise SettingsError(f"--{name} cannot be combined with --concepts; set it in each concept")
            object.__setattr__(self, name, first)


_LORA_ONLY = (
    *("rank", "lora_alpha", "lora_dropout", "lora_layers", "use_dora", "lora_weights"),
    *("assistant_lora", "output_kohya_format", "fuse", "preview_model", "keep_best"),
)
