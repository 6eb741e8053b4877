"""Options that all training scripts share: name, type, default and help text.

Each class below is one group of `--help`; the first line of its docstring is the group's heading. A script
derives its own options from `TrainOptions`, and `parsing` turns the result into a command line. A default of
None means "not given": the help text says what is used then.
"""

import dataclasses
import typing
from dataclasses import dataclass
from typing import TypeVar

from diffadapt.models.base_names import is_embedded
from diffadapt.models.noise_schedule import DENSITIES

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")

OptionsT = TypeVar("OptionsT", bound="TrainOptions")  # the options class of one script


def option(default: object, help: str, *, choices: tuple[str, ...] | None = None) -> typing.Any:
    """A dataclass field that is also a command-line option."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class BaseModelOptions:
    """Base model"""

    pretrained_model_name_or_path: str | None = option(
        None,
        "base model: a diffusers folder, a hub name, a .safetensors checkpoint or embedded:NAME "
        "(default: that of the script's demonstration)",
    )
    revision: str | None = option(None, "branch, tag or commit of a base model on the hub")
    variant: str | None = option(None, "variant of the base model's weight files, such as fp16")
    pretrained_vae_model_name_or_path: str | None = option(
        None, "autoencoder to use instead of the base model's: folder, hub name or .safetensors file"
    )
    transformer: str | None = option(
        None, "weights of the denoiser to use instead of the base model's: a .gguf or .safetensors file"
    )
    prediction_type: str | None = option(
        None,
        "override the scheduler's prediction type",
        choices=("epsilon", "v_prediction", "sample"),
    )

    @property
    def is_demo(self) -> bool:
        """Whether the base is one that is shipped with the package, for demonstration."""
        return is_embedded(self.pretrained_model_name_or_path or "")


@dataclass(frozen=True)
class OutputOptions:
    """Output folder and seed"""

    output_dir: str = option("runs/train", "folder for checkpoints, images and the final adapter")
    seed: int = option(0, "random seed of data order, crops, noise, timesteps and adapter initialization")


@dataclass(frozen=True)
class ImageOptions:
    """Training images"""

    follow_links: bool = option(False, "follow symbolic links that lead out of an image folder")
    resolution: int | None = option(
        None, "height and width of the training images in pixels (default: the base model's)"
    )
    center_crop: bool | None = option(
        None, "crop images at the center instead of at random (default: by base model)"
    )
    random_flip: bool = option(False, "flip images horizontally with probability 1/2")
    cache_latents: str | None = option(
        None,
        "where to cache encoded images (default: memory with --center_crop or square images, else none)",
        choices=("memory", "disk", "none"),
    )
    cache_dir: str | None = option(
        None, "cache folder for --cache_latents disk; several runs can share one folder"
    )
    train_batch_size: int | None = option(
        None, "images per process and accumulation step (default: by base model)"
    )


@dataclass(frozen=True)
class AdapterOptions:
    """Adapter"""

    adapter: str = option(
        "lora", "adapter method, such as flora or flora(rank=8); `diffadapt methods` lists all methods"
    )
    rank: int | None = option(None, "rank of the adapter (default: the method's)")
    alpha: float | None = option(
        None, "scale the update by alpha/rank (default: the method's, often the rank)"
    )
    scale: float | None = option(None, "scale the update by this factor instead of alpha/rank")
    adapter_options: str | None = option(
        None, "more options of the method as NAME=VALUE,..., such as kernel_rank=2,init=gaussian"
    )
    param_budget: str | None = option(
        None, "choose the largest rank with at most this many trained parameters: 500000, 500k or 1.5M"
    )
    targets: str | None = option(
        None,
        "layers to adapt: attention, qv, mlp, conv, linear, norm, all, a glob on layer names, or several "
        "joined with +; attention@blocks.{4-11} in some blocks only (default: by base model)",
    )
    train_text_encoder: bool = option(False, "also adapt the text encoders; saved in the same file")
    text_encoder_targets: str | None = option(
        None,
        "layers of the text encoders to adapt, as in --targets (default: attention)",
    )
    text_encoder_lr: float | None = option(
        None, "learning rate for the text encoders (default: --learning_rate)"
    )
    assistant_adapter: str | None = option(
        None,
        "adapter file that is frozen, works during training and is taken off to generate images: the way to "
        "train on a distilled base",
    )


@dataclass(frozen=True)
class CheckpointOptions:
    """Training length, checkpoints and resuming"""

    max_train_steps: int | None = option(None, "number of optimizer steps (default: by base model)")
    checkpointing_steps: int = option(
        500,
        "save a checkpoint every N steps; one is always saved after the last step, with 0 only that one",
    )
    checkpoints_total_limit: int | None = option(
        None, "keep at most N checkpoints and delete the oldest (default: keep all)"
    )
    resume_from_checkpoint: str | None = option(
        None,
        "resume bit-exactly from a checkpoint folder, or from the newest one with 'latest' (starts a new run "
        "if there is none)",
    )
    accept_changes: str | None = option(
        None,
        "options allowed to differ from those of the checkpoint, comma-separated, such as "
        "learning_rate,data,processes",
    )
    overwrite_output_dir: bool = option(
        False, "start a new run in an output folder that holds an earlier one, and delete that one's files"
    )
    dry_run: bool = option(False, "print the summary of the run with a memory estimate, then exit")


@dataclass(frozen=True)
class OptimizationOptions:
    """Optimization"""

    gradient_accumulation_steps: int | None = option(
        None, "batches to accumulate per optimizer step (default: that of the launcher, else 1)"
    )
    shard_base: bool = option(
        False, "shard the frozen base model over all processes (FSDP2) to save memory on each"
    )
    offload_blocks: int | None = option(
        None,
        "keep only N blocks of the frozen base model on the GPU at a time, while the others wait in main "
        "memory: less GPU memory, but slower (default: all on the GPU)",
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, but slower"
    )
    optimizer: str = option(
        "adamw",
        "adamw, adamw8bit (pip install bitsandbytes), prodigy (pip install prodigyopt) or any optimizer of "
        "torch.optim, such as SGD",
    )
    optimizer_options: str | None = option(
        None, "more arguments of the optimizer as NAME=VALUE,..., such as momentum=0.9,nesterov=true"
    )
    learning_rate: float | None = option(
        None,
        "peak learning rate (default: the one recommended for the adapter method, or 1 for prodigy)",
    )
    lr_scheduler: str | None = option(
        None, "learning-rate schedule, by its name in diffusers (default: by base model)", choices=SCHEDULES
    )
    lr_warmup_steps: int = option(0, "warm-up steps of the learning rate, limited to a tenth of the run")
    lr_num_cycles: int = option(1, "number of cycles for the cosine_with_restarts schedule")
    lr_power: float = option(1.0, "power of the polynomial schedule")
    adam_beta1: float = option(0.9, "beta1 of adamw, adamw8bit and prodigy")
    adam_beta2: float = option(0.999, "beta2 of adamw, adamw8bit and prodigy")
    adam_weight_decay: float = option(1e-2, "weight decay of adamw, adamw8bit and prodigy")
    adam_epsilon: float = option(1e-8, "epsilon of adamw, adamw8bit and prodigy")
    max_grad_norm: float = option(1.0, "clip the global gradient norm to this value; 0: no clipping")
    use_ema: bool = option(
        False, "keep an exponential moving average of the adapter, used for images and saved files"
    )
    ema_decay: float = option(0.9999, "decay of the moving average; after n updates at most n / (n + 9)")


@dataclass(frozen=True)
class LossOptions:
    """Loss"""

    snr_gamma: float | None = option(
        None,
        "gamma of Min-SNR loss weighting, 5 in its paper, arXiv 2303.09556 (default: no weighting)",
    )
    noise_offset: float = option(
        0.0,
        "standard deviation of a random constant added to each noise channel, for darker and brighter images",
    )
    timestep_density: str | None = option(
        None,
        "of a flow-matching base: how noise levels are distributed (default: logit_normal, which prefers "
        "middle levels)",
        choices=DENSITIES,
    )
    timestep_shift: str | None = option(
        None,
        "of a flow-matching base: a number above 1 moves noise levels towards noise; auto: as far as the "
        "base moves them to generate images (default: auto)",
    )
    skip_nonfinite: int = option(
        0, "skip up to N steps whose loss or gradient is not finite; one more is an error"
    )


@dataclass(frozen=True)
class HardwareOptions:
    """Precision and hardware"""

    mixed_precision: str | None = option(
        None,
        "precision of activations, and of the frozen base model on a GPU (default: that of "
        "`accelerate launch`, else whichever is fast on this machine)",
        choices=("no", "fp16", "bf16"),
    )
    base_precision: str | None = option(
        None,
        "precision of the frozen base model (default: that of --mixed_precision on a GPU, fp32 on a CPU); "
        "int8, fp8 and nf4 quantise the Linear layers in the denoiser's blocks",
        choices=("fp32", "fp16", "bf16", "int8", "fp8", "nf4"),
    )
    text_encoder_device: str | None = option(
        None,
        "where captions are encoded: cpu, if the text encoders do not fit on the GPU (default: on the GPU)",
        choices=("cpu",),
    )
    num_threads: int | None = option(None, "number of CPU threads (default: one per idle core)")


@dataclass(frozen=True)
class ValidationOptions:
    """Validation and logging"""

    validation_prompt: str | None = option(
        None,
        "prompt for images before and after training (default: prompts chosen by the script)",
    )
    num_validation_images: int | None = option(
        None, "number of images to generate before and after training; 0: none (default: by base model)"
    )
    validation_steps: int | None = option(
        None,
        "also generate images every N steps from a saved adapter file, into validation/ (default: never)",
    )
    num_inference_steps: int | None = option(None, "denoising steps for images (default: by base model)")
    guidance_scale: float | None = option(
        None, "classifier-free guidance scale for images (default: by base model)"
    )
    sample_batch_size: int | None = option(None, "images to generate per batch (default: by base model)")
    extractor: str | None = option(
        None,
        "CLIP model for the reported metrics: folder, hub name or embedded:clip (default: none, "
        "so no metrics, except in the demonstrations)",
    )
    log_adapter_stats: int | None = option(
        None,
        "log update norms relative to the weights, and their amplification, every N steps (default: never)",
    )
    report_to: str = option(
        "none", "experiment trackers, comma-separated: tensorboard, wandb, trackio or others of accelerate"
    )
    logging_dir: str | None = option(None, "log folder of the trackers (default: OUTPUT_DIR/logs)")


@dataclass(frozen=True)
class ExportOptions:
    """Export and upload"""

    export_formats: str | None = option(
        None,
        "also export the adapter for other programs, comma-separated: kohya (ComfyUI, A1111), diffusers, "
        "merged, or none (default: kohya if it can represent the adapter)",
    )
    push_to_hub: bool = option(
        False,
        "upload the output folder to the hub, including the image grid, which shows training images",
    )
    hub_model_id: str | None = option(
        None, "repository to upload to, as USER/NAME (default: name of the output folder)"
    )
    hub_private: bool = option(False, "make the repository private")


@dataclass(frozen=True)
class ConfigFileOptions:
    """Config file"""

    config: str | None = option(
        None, "YAML file with any of these options; the command line takes precedence"
    )


# Dataclasses collect the fields of their bases from the last to the first, so the groups stand in reverse.
@dataclass(frozen=True)
class TrainOptions(
    ConfigFileOptions,
    ExportOptions,
    ValidationOptions,
    HardwareOptions,
    LossOptions,
    OptimizationOptions,
    CheckpointOptions,
    AdapterOptions,
    ImageOptions,
    OutputOptions,
    BaseModelOptions,
):
    """Options of every training script."""


def option_group(options_class: type[TrainOptions], name: str) -> str:
    """The heading under which `--help` lists an option: that of the class which declares it first."""
    for declaring in reversed(options_class.__mro__):
        if name in getattr(declaring, "__dataclass_fields__", {}):
            return declaring.__doc__.splitlines()[0].removesuffix(".")
    raise KeyError(name)
