"""Continue an interrupted recipe: model and optimizer in one safetensors file, written whole or not."""

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


def set_rate(optimizer: Optimizer, step: int, steps: int, *, warmup: int = 100) -> None:
    """Each group's `peak` rate, after a linear warm-up, on a cosine that ends at `steps`."""
    share = min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * min(1, step / steps)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share


def save(path: Path, model: nn.Module, optimizer: Optimizer, step: int, seconds: float) -> None:
    """Write the state after `step` steps to a temporary name, then rename it."""
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    for index, entries in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value.contiguous() for name, value in entries.items()}
    save_file(tensors, f"{path}.part", metadata={"step": str(step), "seconds": json.dumps(seconds)})
    os.replace(f"{path}.part", path)


def restore(path: Path, model: nn.Module, optimizer: Optimizer) -> tuple[int, float]:
    """Load the state if there is one: the steps done and the seconds they took."""
    if not path.exists():
        return 0, 0.0
    with safe_open(path, "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    state = optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, entry = name.split(".")
            state["state"].setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict(state)
    return int(about["step"]), json.loads(about["seconds"])


def replace_folder(folder: Path, write: Callable[[str], object]) -> None:
    """Write a folder under a temporary name, then put it in the place of the old one."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    write(str(part))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)
