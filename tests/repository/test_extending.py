"""The examples of docs/extending.md, executed."""

import importlib
import math
import re
from pathlib import Path

import pytest
import torch
from helpers.models import denoiser, image
from helpers.perturb import perturb

import diffadapt as da
from diffadapt import methods
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
