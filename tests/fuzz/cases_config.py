"""Mutated configurations: YAML option files, and the state of a training run beside its tensors."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from helpers.models import denoiser, image, state
from mutations import mutated_tensors, mutated_text, mutated_value
from safetensors.torch import load_file, save_file

import diffadapt as da
from diffadapt.training.checkpoint import checkpoint_io
from diffadapt.training.checkpoint.state_check import state_digest
from diffadapt.training.options import TrainOptions
from diffadapt.training.parsing import parse, write_config

WAYS = ("options", "options", "options as text", "state", "state as text", "state tensors")


class Configs:
    """Case number n is a function of the seed: an option file or a checkpoint, and its damage."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder / "checkpoint-1", seed
        self.renew()
        checkpoint_io.save_checkpoint(self.train_state, folder)
        write_config(self.train_state.options, self.folder)
        self.options = (self.folder / "config.yaml").read_text(encoding="utf-8")
        self.values = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        self.tensors = load_file(self.folder / "state.safetensors")

    def renew(self) -> None:
        """Another run, after one was left changed: one step of AdamW on a tiny model."""
        self.model = denoiser()
        adapter = da.attach(self.model, da.LoRA(rank=2), "conv_in", seed=7)
        optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        self.model(image()).square().mean().backward()
        optimizer.step()
        scheduler.step()
        self.train_state = SimpleNamespace(
            adapter=adapter,
            optimizer=optimizer,
            scheduler=scheduler,
            accelerator=SimpleNamespace(scaler=None, is_main_process=True, num_processes=1),
            average=None,
            metadata={},
            data={},
            run_id="0123456789abcdef",
            position=2,
            batch_size=2,
            skipped=0,
            options=TrainOptions(output_dir=str(self.folder.parent), max_train_steps=3),
            step=1,
        )
        self.before = self._now()

    def describe(self, number: int) -> str:
        return self._choose(number)[0]

    def write(self, number: int) -> Path:
        way, rng = self._choose(number)
        for name, text in (("config.yaml", self.options), ("state.json", json.dumps(self.values))):
            (self.folder / name).write_text(text, encoding="utf-8")
        save_file(self.tensors, self.folder / "state.safetensors")
        if way == "state tensors":
            self._write_state(self.values, mutated_tensors(self.tensors, rng))
            return self.folder
        own = yaml.safe_load(self.options) if way.startswith("options") else self.values
        dumped = self.options if way.startswith("options") else json.dumps(own)
        if way.endswith("text"):
            text = mutated_text(dumped, rng)
        elif way == "options":
            text = yaml.safe_dump(mutated_value(own, rng), sort_keys=False)
        else:
            self._write_state(mutated_value(own, rng), self.tensors)
            return self.folder
        path = self.folder / ("config.yaml" if way.startswith("options") else "state.json")
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return path

    def _write_state(self, values: object, tensors: dict[str, torch.Tensor]) -> None:
        """With a hash that fits: not damaged but hostile."""
        if isinstance(values, dict):
            values.pop("sha256", None)
            values = {**values, "sha256": state_digest(values, tensors)}
        (self.folder / "state.json").write_text(json.dumps(values), encoding="utf-8")
        save_file(tensors, self.folder / "state.safetensors")

    def open(self, number: int, path: Path) -> None:
        if path.name == "config.yaml":
            dataclasses.asdict(parse(TrainOptions, ["--config", str(path)]))
            return
        checkpoint_io.restore_checkpoint(self.train_state, self.folder)
        if not all(torch.isfinite(tensor).all() for tensor in self.train_state.adapter.state_dict().values()):
            raise AssertionError("values that are no numbers are restored")
        self.renew()

    def check_untouched(self) -> None:
        if self._now() != self.before:
            raise AssertionError("the run is not as before")

    def _now(self) -> list:
        train_state = self.train_state
        tensors = [*train_state.adapter.state_dict().values()]
        for own in train_state.optimizer.state_dict()["state"].values():
            tensors += own.values()
        values = [
            train_state.step,
            train_state.optimizer.param_groups[0]["lr"],
            str(train_state.scheduler.state_dict()),
        ]
        return [state(self.model), [str(value) for value in tensors], values]

    def _choose(self, number: int) -> tuple[str, random.Random]:
        rng = random.Random(f"{self.seed}/{number}/configs")
        return rng.choice(WAYS), rng
