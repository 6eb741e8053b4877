"""How long attaching, saving and loading take, and how they grow with the number of layers."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cost_models
from torch import nn

import diffadapt as da

LAYERS = 500  # linear layers of the smallest model


def measure(repeats: int) -> dict:
    """Median seconds: attaching to SDXL's denoiser, and all three for 1, 2 and 4 times as many layers."""
    model, repeats = cost_models.unfilled_sdxl(), max(repeats, 1)
    attaching = {}
    for method in (da.LoRA(rank=16), da.FLoRA(rank=16)):
        for targets in ("attention", "attention+conv"):
            rounds = [_attach(model, method, targets) for _ in range(repeats)]
            seconds = statistics.median(time for time, _ in rounds)
            attaching[f"{method.name}, {targets}"] = {"seconds": seconds, "sites": rounds[0][1]}
    growth = {str(times): _all_three(times * LAYERS, repeats) for times in (1, 2, 4)}
    return {"title": "Attaching, saving and loading", "sdxl": attaching, "growth": growth, "layers": LAYERS}


def _attach(model: nn.Module, method: da.LoRA, targets: str) -> tuple[float, int]:
    start = time.perf_counter()
    adapter = da.attach(model, method, targets)
    seconds, sites = time.perf_counter() - start, len(adapter.sites)
    da.detach(adapter)
    return seconds, sites


def _all_three(layers: int, repeats: int) -> dict[str, float]:
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(layers)))
    times: dict[str, list[float]] = {"attach": [], "save": [], "load": []}
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "adapter.safetensors"
            adapter = _timed(times["attach"], lambda: da.attach(model, da.LoRA(rank=4), "linear"))
            _timed(times["save"], lambda adapter=adapter, file=file: da.save(adapter, file))
            da.detach(adapter)
            adapter = _timed(times["load"], lambda file=file: da.load(model, file))
            da.detach(adapter)
    return {name: statistics.median(values) for name, values in times.items()}


def _timed(times: list[float], run: Callable[[], da.Adapter | None]) -> da.Adapter | None:
    start = time.perf_counter()
    result = run()
    times.append(time.perf_counter() - start)
    return result
