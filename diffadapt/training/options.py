"""Options that every training script understands: names, types, defaults and help in one place.

A script's options are a frozen dataclass derived from `TrainOptions`; `parsing` makes its command line.
"""

import dataclasses
import typing
from dataclasses import dataclass

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def option(default: object, help: str, *, choices: tuple[str, ...] | None = None) -> typing.Any:
    """A dataclass field that is also a command-line option."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainOptions:
    """What every training script understands. None: the default of the base's family."""

    # the base
    pretrained_model_name_or_path: str | None = option(None, "base model: folder, hub name or embedded:NAME")
    revision: str | None = option(None, "revision of a base on the hub")
    variant: str | None = option(None, "variant of the base's files, as fp16")
    pretrained_vae_model_name_or_path: str | None = option(None, "another autoencoder than the base's own")
    prediction_type: str | None = option(
        None,
        "what the base predicts, where its scheduler says it wrongly",
        choices=("epsilon", "v_prediction", "sample"),
    )
    output_dir: str = option("runs/train", "where everything is written")
    seed: int = option(0, "data order, noise, timesteps and the adapter's start follow from it")
    # pictures
    follow_links: bool = option(False, "follow links that lead out of a folder of images too")
    resolution: int | None = option(None, "side of the training pictures in pixels; default: the base's own")
    center_crop: bool | None = option(None, "cut the middle of a picture instead of a random square")
    random_flip: bool = option(False, "mirror every other picture, at random")
    cache_latents: str | None = option(
        None,
        "keep encoded pictures; default: memory, when they are always cut alike",
        choices=("memory", "disk", "none"),
    )
    cache_dir: str | None = option(None, "folder of --cache_latents disk; several runs can share it")
    train_batch_size: int | None = option(None, "pictures per process and microstep")
    # the adapter
    adapter: str = option("lora", "method, as flora or flora(rank=8); `diffadapt methods` lists them")
    rank: int | None = option(None, "rank of the adapter")
    alpha: float | None = option(None, "multiplier alpha/rank of the update")
    scale: float | None = option(None, "multiplier of the update, instead of alpha")
    adapter_options: str | None = option(None, "further fields of the method, as kernel_rank=2,init=gaussian")
    param_budget: str | None = option(
        None, "choose the largest rank with at most so many parameters: 500000, 500k, 1.5M"
    )
    targets: str | None = option(
        None, "what is adapted: attention, qv, conv, linear, norm, all, A+B, or globs"
    )
    train_text_encoder: bool = option(False, "adapt the text encoders too, in the same file")
    text_encoder_targets: str | None = option(
        None, "what of them, as --targets; default with --train_text_encoder: attention"
    )
    text_encoder_lr: float | None = option(
        None, "their learning rate; default with --train_text_encoder: --learning_rate"
    )
    # length and saving
    max_train_steps: int | None = option(None, "optimizer steps")
    checkpointing_steps: int = option(
        500, "write checkpoint-N every so many steps, and after the last one; 0: after the last one alone"
    )
    checkpoints_total_limit: int | None = option(
        None, "keep so many checkpoints; an old one is removed once the new one is complete"
    )
    resume_from_checkpoint: str | None = option(
        None,
        "'latest' or a checkpoint folder; the run goes on exactly. 'latest' without any begins a new run",
    )
    accept_changes: str | None = option(
        None, "options that may differ from the checkpoint's, as learning_rate,data,processes"
    )
    overwrite_output_dir: bool = option(
        False, "remove what an earlier run left in the output folder, then begin a new one"
    )
    dry_run: bool = option(False, "show the summary with the memory estimate, then end")
    # optimization
    gradient_accumulation_steps: int | None = option(
        None, "microsteps per optimizer step; default: those of the launcher, else 1"
    )
    shard_base: bool = option(False, "spread the frozen base over the processes (FSDP2): less memory on each")
    gradient_checkpointing: bool = option(False, "recompute activations in backward: less memory, slower")
    optimizer: str = option(
        "adamw",
        "adamw, adamw8bit (pip install bitsandbytes), prodigy (pip install prodigyopt) or any class of "
        "torch.optim, as SGD",
    )
    optimizer_options: str | None = option(
        None, "further arguments of the optimizer, as momentum=0.9,nesterov=true"
    )
    learning_rate: float | None = option(
        None, "default: what the adapter's method recommends; 1 for prodigy, which finds its own"
    )
    lr_scheduler: str | None = option(None, "learning-rate schedule, by diffusers' name", choices=SCHEDULES)
    lr_warmup_steps: int = option(0, "steps of rising rate; at most a tenth of the run is used")
    lr_num_cycles: int = option(1, "hard restarts of cosine_with_restarts")
    lr_power: float = option(1.0, "power of the polynomial schedule")
    adam_beta1: float = option(0.9, "for adamw, adamw8bit and prodigy")
    adam_beta2: float = option(0.999, "for adamw, adamw8bit and prodigy")
    adam_weight_decay: float = option(1e-2, "for adamw, adamw8bit and prodigy")
    adam_epsilon: float = option(1e-8, "for adamw, adamw8bit and prodigy")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm; 0: never")
    use_ema: bool = option(False, "keep a moving average of the adapter: pictures and files are made of it")
    ema_decay: float = option(0.9999, "decay of that average; in update n at most n / (n + 9)")
    # the loss
    snr_gamma: float | None = option(
        None, "min-SNR weighting of the loss (arXiv 2303.09556); the paper uses 5"
    )
    noise_offset: float = option(
        0.0, "deviation of a constant added to each channel of the noise, for darker and lighter pictures"
    )
    skip_nonfinite: int = option(
        0, "leave out up to so many steps whose loss or gradient is not finite, then end with an error"
    )
    # the machine
    mixed_precision: str | None = option(
        None,
        "precision of activations, and of the frozen base on a GPU; default: that of accelerate launch, else "
        "what is fast on the machine",
        choices=("no", "fp16", "bf16"),
    )
    base_precision: str | None = option(
        None,
        "precision of the frozen base alone; default: half with mixed precision on a GPU, else fp32",
        choices=("fp32", "fp16", "bf16"),
    )
    num_threads: int | None = option(None, "CPU threads; default: all available cores")
    # what is shown
    validation_prompt: str | None = option(
        None, "shown before and after; default: the subject in new contexts"
    )
    num_validation_images: int | None = option(None, "pictures made before and after; 0: none")
    validation_steps: int | None = option(
        None, "make pictures every so many steps too, through a saved file, in validation/"
    )
    num_inference_steps: int | None = option(None, "denoising steps of those pictures")
    guidance_scale: float | None = option(None, "classifier-free guidance of those pictures")
    sample_batch_size: int | None = option(None, "pictures drawn at once")
    extractor: str | None = option(None, "CLIP model for the figures: folder, hub name or embedded:clip")
    log_adapter_stats: int | None = option(
        None, "every so many steps log how large the updates are beside the weights, and what they amplify"
    )
    report_to: str = option(
        "none", "trackers of accelerate that get the figures: tensorboard, wandb, trackio, A,B or none"
    )
    logging_dir: str | None = option(None, "where trackers write; default: logs in the output folder")
    # what is given away
    export_formats: str | None = option(
        None,
        "also written for other programs: kohya (ComfyUI, A1111), diffusers, merged, A,B or none; default: "
        "kohya, where it can hold the adapter",
    )
    push_to_hub: bool = option(
        False,
        "upload the result to the hub, its grid of training pictures too; else nothing is sent",
    )
    hub_model_id: str | None = option(None, "name of that repository; default: the output folder's")
    hub_private: bool = option(False, "make that repository private")
    config: str | None = option(None, "YAML file of options; the command line wins")
