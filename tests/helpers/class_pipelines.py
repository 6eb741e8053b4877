"""Tiny random class-conditional pipelines, and class folders, for tests."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel, UNet2DModel
from PIL import Image

from diffadapt.pipelines import ClassConditionalPipeline

CLASSES = 3


def tiny_class_unet(rows=CLASSES + 1):
    """For 8-pixel pictures, with attention."""
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
        num_class_embeds=rows,
    )


def class_pipeline(folder, *, prediction_type="epsilon", null_class=CLASSES, seed=0):
    """Writes a random UNet2DModel pipeline of three classes and returns its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        scheduler = DDIMScheduler(prediction_type=prediction_type)
        ClassConditionalPipeline(tiny_class_unet(), scheduler, null_class).save_pretrained(folder)
    return Path(folder)


def dit_pipeline(folder, *, learns_sigma=True, seed=0):
    """Writes a random DiT pipeline (latents 4 x 8 x 8 of 16-pixel pictures) and returns its folder."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformer = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8 if learns_sigma else 4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
        table = class_tables(transformer)[0].weight
        for other in class_tables(transformer)[1:]:  # as in converted models: copies of one table
            other.weight.data.copy_(table)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
        DiTPipeline(transformer, vae, DDIMScheduler()).save_pretrained(folder)
    return Path(folder)


def class_tables(transformer):
    """The copies of the class table in the blocks of a DiT."""
    return [block.norm1.emb.class_embedder.embedding_table for block in transformer.transformer_blocks]


def write_classes(folder, *, each=3, names=("ant", "bee", "cat"), side=16):
    """Class folders with pictures that differ by class; returns the folder."""
    for label, name in enumerate(names):
        (Path(folder) / name).mkdir(parents=True)
        for number in range(each):
            colour = tuple(40 + (70 * label + 23 * number + 50 * channel) % 200 for channel in range(3))
            picture = Image.new("RGB", (side, side), colour)
            picture.paste((255, 255, 255), (label, number, label + 4, number + 4))
            picture.save(Path(folder) / name / f"{number}.png")
    return Path(folder)


def arguments(base, output, **more):
    """Of train_scripts/class_conditional.py: few steps on a base for pictures of 8 pixels."""
    fixed = {
        "pretrained_model_name_or_path": base,
        "output_dir": output,
        "adapter": "lora(rank=2)",
        "num_inference_steps": 2,
        "guidance_scale": 2,
        "num_validation_images": 4,
        "train_batch_size": 4,
        "max_train_steps": 4,
        "num_threads": 1,
    }
    return [item for name, value in {**fixed, **more}.items() for item in (f"--{name}", value)]
