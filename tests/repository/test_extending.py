"""The examples of docs/extending.md, executed."""

import dataclasses
import importlib
import math
import re
from pathlib import Path

import pytest
import torch
from helpers.models import denoiser, image
from helpers.perturb import perturb
from safetensors.torch import load_file

import diffadapt as da
from diffadapt import methods
from diffadapt.formats.export import TARGETS, write_formats
from diffadapt.formats.export.target import save_tensors
from diffadapt.metrics.evaluate import evaluate
from diffadapt.metrics.feature_set import FeatureSet
from diffadapt.metrics.registry import METRICS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def example(name):
    """The code block after the comment `<!-- example: name ... -->`."""
    block = re.search(rf"<!-- example: {name}\b[^\n]*-->\n```python\n(.*?)```", PAGE, re.S)
    assert block is not None, name
    return block[1]


@pytest.fixture
def as_module(tmp_path, monkeypatch):
    """Imports an example as a file of its own, as a reader would write it."""

    def load(name):
        (tmp_path / f"example_{name}.py").write_text(example(name), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(f"example_{name}")

    return load


def test_the_method_attaches_merges_saves_and_loads(as_module, tmp_path, monkeypatch):
    method_class = as_module("method").LoRAFA
    monkeypatch.setitem(methods.METHODS, "lora_fa", method_class)
    monkeypatch.setitem(methods.READABLE, "lora_fa", method_class)
    model = denoiser()
    expected = model(image())
    adapter = da.attach(model, da.make_method("lora_fa(rank=3)"), "attention+conv")
    assert torch.equal(model(image()), expected)
    assert adapter.num_parameters == sum(3 * site.out for site in adapter.sites)

    perturb(adapter)
    changed = model(image())
    assert not torch.allclose(changed, expected)
    file = tmp_path / "adapter.safetensors"
    da.save(adapter, file)
    other = denoiser()
    da.load(other, file)
    assert torch.equal(other(image()), changed)
    da.merge(adapter)
    assert torch.allclose(model(image()), changed, atol=1e-5)


def test_the_metric_is_evaluated_with_its_interval_and_floor(as_module, monkeypatch):
    monkeypatch.setitem(METRICS, "mean_distance", as_module("metric").MEAN_DISTANCE)
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 3, generator=generator)
    generated = torch.randn(200, 3, generator=generator) + torch.tensor([1.0, 0.0, 2.0])
    sets = {"real": FeatureSet({"features": real}), "generated": FeatureSet({"features": generated})}
    evaluation = evaluate("mean_distance", **sets)
    estimate = evaluation.values["mean_distance"]
    assert estimate.value == pytest.approx(5.0, abs=0.8)  # 1^2 + 2^2
    assert estimate.interval.low < estimate.value < estimate.interval.high
    assert 0 < evaluation.floor["mean_distance"] < 0.2
    assert math.isfinite(evaluation.floor["mean_distance"])


def test_the_base_is_the_one_that_a_test_trains_and_exports():
    source = (ROOT / "tests" / "models" / "test_new_family.py").read_text(encoding="utf-8")
    assert example("base").strip() in source


def test_the_export_target_is_written_for_its_program_and_beside_an_adapter(as_module, tmp_path, monkeypatch):
    monkeypatch.setitem(TARGETS, "differences", as_module("target").DIFFERENCES)
    model = denoiser()
    adapter = perturb(da.attach(model, da.LoRA(rank=2), "attention+conv"))
    changed = model(image())
    da.save(adapter, tmp_path / "cat.safetensors")
    (line,) = write_formats(adapter, tmp_path / "cat.safetensors", "differences")
    assert "right in a sum" in line

    other = denoiser()
    weights = dict(other.named_parameters())
    with torch.no_grad():
        for name, difference in load_file(tmp_path / "cat_differences.safetensors").items():
            weights[name.removeprefix("unet.")].add_(difference)
    assert torch.allclose(other(image()), changed, atol=1e-5)


def test_the_export_target_refuses_what_it_cannot_hold_and_what_reads_wrong(as_module, tmp_path, monkeypatch):
    differences = as_module("target").DIFFERENCES
    monkeypatch.setitem(TARGETS, "differences", differences)
    biases = perturb(da.attach(denoiser(), da.make_method("bitfit"), "conv"))
    with pytest.raises(ValueError, match="holds no biases"):
        da.export(biases, tmp_path / "biases.safetensors", to="differences")

    def write_zeros(job, path):
        zeros = {f"{layer.name}.weight": torch.zeros(layer.shape) for layer in job.layers}
        save_tensors(zeros.items(), path, job.dtype)

    monkeypatch.setitem(TARGETS, "differences", dataclasses.replace(differences, write=write_zeros))
    adapter = perturb(da.attach(denoiser(), da.LoRA(rank=2), "conv"))
    with pytest.raises(ValueError, match="is not written: a sum 1: wrong"):
        da.export(adapter, tmp_path / "zeros.safetensors", to="differences")
    assert list(tmp_path.glob("*.safetensors")) == []
