"""Adapter files: complete, checked, strict, and never more dangerous than data."""

import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from helpers.method_cases import CASES, train
from helpers.models import Denoiser, denoiser, image, pipeline, state
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import diffadapt as da
from diffadapt.adapters.fingerprint import fingerprint


def targets(case):
    """Layers of the tiny model that the method changes, whatever their kind."""
    kinds = set().union(*(part.kinds for part in case.method.members))
    presets = {"linear": "linear", "conv": "conv", "norm": "norm", "embedding": "embedding"}
    return "+".join(preset for kind, preset in presets.items() if kind in kinds)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """For every method: a file, and what the model it was saved from computes."""
    folder, saved = tmp_path_factory.mktemp("files"), {}
    for number, case in enumerate(CASES):
        model = denoiser()
        adapter = da.attach(model, case.method, targets(case), seed=7)
        train(adapter)
        da.save(adapter, folder / f"{number}.safetensors", base="tiny", metadata={"note": "three cats"})
        weights = {site.name: adapter.adapted_weight(site) for site in adapter.sites}
        saved[case] = folder / f"{number}.safetensors", weights, model(image())
    return saved


@pytest.fixture
def path(tmp_path):
    """A LoRA on the convolutions."""
    adapter = da.attach(denoiser(), da.LoRA(rank=2), "conv", seed=7)
    train(adapter)
    da.save(adapter, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def assert_same(path, other):
    assert da.read_metadata(path) == da.read_metadata(other)  # with the hash of all tensors
    assert path.stat().st_size == other.stat().st_size


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.slow
def test_a_loaded_adapter_computes_the_same_bits(files, case):
    path, weights, output = files[case]
    model = denoiser()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapter = da.load(model, path)
    assert adapter.method == case.method
    assert (adapter.name, adapter.seed, adapter.strength) == ("default", 7, 1.0)
    assert torch.equal(model(image()), output)
    for site, weight in weights.items():
        assert torch.equal(adapter.adapted_weight(site), weight)


ELSEWHERE = """
import sys, pickle, torch, diffadapt as da
sys.path.insert(0, sys.argv[1])
from helpers.models import denoiser
torch.set_num_threads(2)
found = []
for path in sys.argv[3:]:
    adapter = da.load(denoiser(), path)
    found.append({site.name: adapter.adapted_weight(site) for site in adapter.sites})
pickle.dump(found, open(sys.argv[2], "wb"))
"""


@pytest.mark.slow
def test_a_file_gives_the_same_bits_in_another_process_and_thread_count(files, tmp_path):
    paths = [str(path) for path, *_ in files.values()]
    here = str(Path(__file__).parents[1])
    arguments = [sys.executable, "-c", ELSEWHERE, here, str(tmp_path / "found"), *paths]
    subprocess.run(arguments, check=True, env={**os.environ, "OMP_NUM_THREADS": "2"})
    found = pickle.loads((tmp_path / "found").read_bytes())
    for other, (path, weights, _) in zip(found, files.values(), strict=True):
        assert other.keys() == weights.keys()
        assert all(torch.equal(other[site], weight) for site, weight in weights.items()), path


@pytest.mark.parametrize("case", CASES, ids=str)
def test_saving_a_loaded_adapter_writes_the_same_file(files, case, tmp_path):
    path, *_ = files[case]
    adapter = da.load(denoiser(), path)
    da.save(adapter, tmp_path / "again.safetensors", base="tiny", metadata={"note": "three cats"})
    assert_same(tmp_path / "again.safetensors", path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_file_holds_no_weight_of_the_base(files, case):
    path, *_ = files[case]
    with safe_open(path, "pt") as file:
        stored = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    adapter = da.attach(denoiser(), case.method, targets(case))
    assert stored == sum(parameter.numel() for parameter in adapter.parameters())


def test_a_merged_or_weakened_adapter_is_saved_whole(path, tmp_path):
    model = denoiser()
    adapter = da.load(model, path)
    adapter.strength = 0.3
    da.merge(adapter)
    da.save(adapter, tmp_path / "again.safetensors")
    assert_same(tmp_path / "again.safetensors", path)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_names_decide_not_the_order_of_layers(files, case):
    class Reordered(Denoiser):
        def __init__(self):
            super().__init__()
            for name in sorted(self._modules):
                self._modules[name] = self._modules.pop(name)

    path, weights, _ = files[case]
    model = Reordered()
    model.load_state_dict(denoiser().state_dict())
    adapter = da.load(model, path, strict_base=True)
    for site, weight in weights.items():
        assert torch.equal(adapter.adapted_weight(site), weight)


@pytest.mark.parametrize("case", [c for c in CASES if targets(c).startswith("linear")], ids=str)
@pytest.mark.slow
def test_one_file_holds_the_adapters_of_unet_and_text_encoder(tmp_path, case):
    pipe, text = pipeline(), torch.randn(3, 6)
    adapter = da.attach(pipe, case.method, "attention+norm", text_encoder_targets="qv")
    train(adapter)
    da.save(adapter, tmp_path / "both.safetensors")
    other = pipeline()
    da.load(other, tmp_path / "both.safetensors")
    assert torch.equal(other.unet(image()), pipe.unet(image()))
    assert torch.equal(other.text_encoder(text), pipe.text_encoder(text))
    with pytest.raises(ValueError, match="text_encoder"):
        da.load(pipeline().unet, tmp_path / "both.safetensors")


def test_a_file_of_a_bare_model_loads_into_a_pipeline_and_back(tmp_path):
    bare, pipe = denoiser(), pipeline()
    pipe.unet.load_state_dict(bare.state_dict())
    adapter = da.attach(bare, da.LoRA(rank=2), "all", rank_patterns={"conv_in": 3})
    train(adapter)
    da.save(adapter, tmp_path / "bare.safetensors")
    loaded = da.load(pipe, tmp_path / "bare.safetensors")
    assert torch.equal(pipe.unet(image()), bare(image()))
    da.save(loaded, tmp_path / "pipe.safetensors")
    again = denoiser()
    da.load(again, tmp_path / "pipe.safetensors")
    assert torch.equal(again(image()), bare(image()))


def test_strength_and_name_are_given_when_loading(path):
    model = denoiser()
    adapters = [da.load(model, path, name=name, strength=0.5) for name in ("one", "two")]
    whole = denoiser()
    da.load(whole, path)
    assert list(da.attached(model)) == ["one", "two"]
    torch.testing.assert_close(model(image()), whole(image()))
    assert adapters[0].strength == 0.5


def test_the_header_tells_configuration_base_and_notes(files):
    path, *_ = files[CASES[0]]
    header = da.read_metadata(path)
    assert header["note"] == "three cats"
    assert header["adapter"]["base"]["name"] == "tiny"
    assert header["adapter"]["method"] == [{"name": "lora", "options": CASES[0].method.settings}]
    assert header["adapter"]["sites"][0] == {"component": "", "path": "conv_in", "shape": [8, 4, 3, 3]}


def test_another_fine_tune_of_the_base_warns_or_is_refused(path):
    model = denoiser(seed=5)
    with pytest.warns(UserWarning, match="trained on other weights"):
        da.load(model, path)
    model = denoiser(seed=5)
    before = state(model)
    with pytest.raises(ValueError, match="trained on other weights"):
        da.load(model, path, strict_base=True)
    assert state(model) == before


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_a_base_cast_to_half_precision_is_the_same_base(path, precision, tmp_path):
    half = denoiser().to(precision)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        da.load(half, path, strict_base=True)  # trained in float32, used in half
    again = denoiser().to(precision)
    da.save(da.attach(again, da.LoRA(rank=2), "conv"), tmp_path / "half.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        da.load(denoiser(), tmp_path / "half.safetensors", strict_base=True)  # and the other way


def test_a_file_with_exact_values_alone_is_still_known(path):
    tensors, header = load_file(path), safe_open(path, "pt").metadata()
    del header["adapter_sha256"]  # as files were written before
    config = json.loads(header["adapter"])
    config["base"] = {key: config["base"][key] for key in ("name", "values")}
    save_file(tensors, path, {**header, "adapter": json.dumps(config)})
    da.load(denoiser(), path, strict_base=True)
    with pytest.raises(ValueError, match="trained on other weights"):
        da.load(denoiser(seed=5), path, strict_base=True)


def test_the_fingerprint_sees_a_single_changed_layer():
    model = denoiser()
    layer_states = list(da.attach(model, da.LoRA(), "conv").layer_states.values())
    before = fingerprint(layer_states)
    with torch.no_grad():
        model.depthwise.weight.mul_(1.01)
    assert fingerprint(layer_states) != before


def test_a_merged_neighbour_does_not_change_the_fingerprint(path):
    model = denoiser()
    other = da.attach(model, da.LoRA(rank=2), "conv", name="other")
    train(other)
    da.merge(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        da.load(model, path, strict_base=True)


class Wide(Denoiser):
    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(4, 8, 5, padding=2)


class Renamed(Denoiser):
    def __init__(self):
        super().__init__()
        self.conv_inn = self._modules.pop("conv_in")


@pytest.mark.parametrize(
    ("make", "said"),
    [(Wide, r"conv_in has shape \(8, 4, 3, 3\) there, shape \(8, 4, 5, 5\) here"), (Renamed, "conv_inn")],
)
def test_another_architecture_is_refused_naming_the_first_difference(path, make, said):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=said) as error:
        da.load(model, path)
    assert "another architecture" in str(error.value)
    assert state(model) == before


def test_a_header_is_json_and_the_tensors_are_what_the_plan_says(path):
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert json.loads(header["adapter"])["method"] == [{"name": "lora", "options": da.LoRA(rank=2).settings}]
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(path).items()}
    assert shapes["lora/conv_out/up"] == (4, 2)
    assert shapes["lora/depthwise/down"] == (2, 9)
    assert len(shapes) == 6
    save_file({}, path)  # the same name, without a header
    with pytest.raises(ValueError, match="not a diffadapt file"):
        da.load(denoiser(), path)
