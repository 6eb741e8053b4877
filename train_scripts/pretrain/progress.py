"""Checkpoints of an interrupted recipe: model and optimizer in one safetensors file, written whole or not."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer


def set_learning_rate(optimizer: Optimizer, step: int, steps: int, *, warmup: int = 100) -> None:
    """Sets each group's rate: its `peak` after a linear warm-up, on a cosine that ends at `steps`."""
    warmup_factor = min(1, (step + 1) / warmup)
    cosine_factor = 0.5 + 0.5 * math.cos(math.pi * min(1, step / steps))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * (warmup_factor * cosine_factor)


def save(path: Path, model: nn.Module, optimizer: Optimizer, step: int, seconds: float) -> None:
    """Writes the state after `step` steps to a temporary name, then renames it."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors[f"model.{name}"] = tensor.contiguous()
    for index, entries in optimizer.state_dict()["state"].items():
        for name, value in entries.items():
            tensors[f"optimizer.{index}.{name}"] = value.contiguous()
    save_file(tensors, f"{path}.part", metadata={"step": str(step), "seconds": json.dumps(seconds)})
    os.replace(f"{path}.part", path)


def restore(path: Path, model: nn.Module, optimizer: Optimizer) -> tuple[int, float]:
    """Loads the state if there is one; returns the steps done and the seconds they took."""
    if not path.exists():
        return 0, 0.0
    model_state = {}
    optimizer_state = optimizer.state_dict()
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        for name in file.keys():  # noqa: SIM118
            tensor = file.get_tensor(name)
            if name.startswith("model."):
                model_state[name.removeprefix("model.")] = tensor
            elif name.startswith("optimizer."):
                _, index, entry = name.split(".")
                optimizer_state["state"].setdefault(int(index), {})[entry] = tensor
    model.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    return int(metadata["step"]), json.loads(metadata["seconds"])


def replace_folder(folder: Path, write: Callable[[str], object]) -> None:
    """Writes a folder under a temporary name, then puts it in the place of the old one."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    write(str(part))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
