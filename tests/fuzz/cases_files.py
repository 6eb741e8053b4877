"""Mutated adapter files of every kind, and the model they are loaded into."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from helpers.models import denoiser, image, state
from mutations import mutated_bytes, mutated_tensors, mutated_text, mutated_value
from safetensors.torch import save_file
from subjects import Subject, subjects

import diffadapt as da
from diffadapt.formats.adapter_file import checksums
from diffadapt.formats.edit.open_adapters import open_without_base
from diffadapt.formats.edit.resize_combine import resized

WAYS = (
    "bytes",
    "bytes",
    "header text",
    "header values",
    "configuration",
    "configuration",
    "tensors",
    "tensors",
)


class Files:
    """Case number n is a function of the seed: a whole file, a way to damage it, and the damage."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.subjects = subjects(folder)
        self.renew()

    def renew(self) -> None:
        """Another model, after one was left changed."""
        self.model = denoiser()
        self.before = state(self.model)

    def describe(self, number: int) -> str:
        subject, way, _ = self._choose(number)
        return f"{subject.name}, {way}"

    def write(self, number: int) -> Path:
        subject, way, rng = self._choose(number)
        path = subject.write(self.folder)
        if subject.config is None:
            (self.folder / "adapter_config.json").unlink(missing_ok=True)
        if way == "configuration" and subject.config is not None:
            _rewrite_json(self.folder / "adapter_config.json", subject.config, rng)
        elif way in ("configuration", "tensors"):
            _rewrite(path, subject, way, rng)
        elif way == "bytes":
            data = path.read_bytes()
            path.write_bytes(mutated_bytes(data, rng, 8 + int.from_bytes(data[:8], "little")))
        else:
            _rewrite_header(path, way, rng)
        return path.parent if subject.config is not None and number % 2 else path

    def open(self, number: int, path: Path) -> None:
        """Every reader of such files; what loads must work, and be the whole file's adapter if it is damaged
        at random: the hashes know nothing of the damage then."""
        subject, way, _ = self._choose(number)
        errors = [_error(da.read_metadata, path)]
        adapter = da.load(self.model, path)
        try:
            if errors[0] is not None:
                raise AssertionError(f"loads, but its header is refused: {errors[0]!r}")
            with torch.no_grad():
                self.model(image())
            found = {site.name: adapter.adapted_weight(site) for site in adapter.sites}
            if subject.is_own and way == "bytes":
                self._compare(subject, found)
        finally:
            da.detach(adapter)

    def check_untouched(self) -> None:
        if state(self.model) != self.before:
            raise AssertionError("the model is not as before")

    def _compare(self, subject: Subject, found: dict[str, torch.Tensor]) -> None:
        whole = da.load(denoiser(), subject.write(self.folder))
        if sorted(found) != sorted(site.name for site in whole.sites):
            raise AssertionError("a damaged file loads with other layers")
        for name, weight in found.items():
            if not torch.equal(weight, whole.adapted_weight(name)):
                raise AssertionError(f"a damaged file loads with other values at {name}")

    def _choose(self, number: int) -> tuple[Subject, str, random.Random]:
        rng = random.Random(f"{self.seed}/{number}")
        return self.subjects[number % len(self.subjects)], rng.choice(WAYS), rng


class Resized(Files):
    """The same files made smaller without their base."""

    def open(self, number: int, path: Path) -> None:
        opened = open_without_base([(str(path), 1.0)])
        forms, kept = resized(opened.layers(), rank=1)
        if not 0 <= kept <= 1 + 1e-9:
            raise AssertionError(f"keeps {kept} of the change")
        opened.write(forms, self.folder / f"resized-{number % len(self.subjects)}", {})


def _error(function, path: Path) -> Exception | None:
    try:
        function(path)
    except (ValueError, TypeError, OSError) as error:
        return error
    return None


def _rewrite(path: Path, subject: Subject, way: str, rng: random.Random) -> None:
    """Another configuration or other tensors, with hashes that fit: not damaged but hostile."""
    header, tensors = dict(subject.header), subject.tensors
    if way == "tensors":
        tensors = mutated_tensors(tensors, rng)
    else:
        key = next((key for key in ("adapter", "lora_adapter_metadata") if key in header), None)
        if key is None:
            header[rng.choice(("format", "diffadapt.method", "adapter", "é"))] = "diffadapt"
        else:
            text = json.dumps(mutated_value(json.loads(header[key]), rng))
            header[key] = mutated_text(text, rng) if rng.random() < 0.2 else text
    if "sha256" in header:
        header |= checksums(tensors, header["adapter"])
    save_file(
        tensors, path, {key: value.encode("utf-8", "replace").decode() for key, value in header.items()}
    )


def _rewrite_header(path: Path, way: str, rng: random.Random) -> None:
    """The safetensors header itself: types, shapes, offsets, names, metadata."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    text = data[8:end].decode()
    if way == "header values":
        text = json.dumps(mutated_value(json.loads(text), rng))
    else:
        text = mutated_text(text, rng)
    head = text.encode("utf-8", "surrogatepass")
    path.write_bytes(len(head).to_bytes(8, "little") + head + data[end:])


def _rewrite_json(path: Path, config: dict, rng: random.Random) -> None:
    text = json.dumps(mutated_value(config, rng))
    text = mutated_text(text, rng) if rng.random() < 0.2 else text
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
