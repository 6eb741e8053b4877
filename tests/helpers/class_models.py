"""Tiny class-conditional pipelines under new class tables: sizes, outputs, a few steps of training."""

import copy

import torch
from diffusers import UNet2DModel
from helpers.class_pipelines import class_tables

import diffadapt as da

CLASSES = {"unet": 3, "dit": 1000}  # of the bases; the null class is the row behind them
MORE, FEWER = {"unet": 5, "dit": 1004}, {"unet": 2, "dit": 2}


def copied(pipe):
    """The pipeline with a network of its own."""
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    parts = {**pipe.components, part: copy.deepcopy(getattr(pipe, part))}
    further = {"null_class": pipe.null_class} if part == "unet" else {}
    made = type(pipe)(**parts, **further)
    made.set_progress_bar_config(disable=True)
    return made


def network(pipe):
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def tables_of(model):
    return [model.class_embedding] if isinstance(model, UNet2DModel) else class_tables(model)


def output(pipe, *labels):
    """What the network makes of fixed noise when it is told these classes."""
    model = network(pipe)
    x = torch.randn(1, model.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    x, t = x.expand(len(labels), -1, -1, -1), torch.full((len(labels),), 500)
    return model(x, t, class_labels=torch.tensor(labels)).sample


def picture(pipe, label, guidance=2.0):
    seed = [torch.Generator().manual_seed(1)]
    options = {"num_inference_steps": 2, "generator": seed, "output_type": "np"}
    return torch.tensor(pipe([label], guidance_scale=guidance, **options).images)


def attached(pipe, classes):
    return da.attach(pipe, da.make_method("lora(rank=2)+class_embedding", classes=classes), "attention")


def trained(adapter, pipe, *labels):
    """Two steps of a large rate, on the classes that are named."""
    optimizer = torch.optim.SGD(adapter.parameters(), lr=3.0)
    for _ in range(2):
        optimizer.zero_grad()
        output(pipe, *labels).square().mean().backward()
        optimizer.step()
    return adapter


def table(adapter):
    (own,) = (tensor for part in adapter.parts for tensor in part.shared.values())
    return own
