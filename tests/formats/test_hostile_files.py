"""Files that are damaged or made to hurt: a clear error, nothing allocated, nothing executed, no trace."""

import json
import pickle

import pytest
import torch
from helpers.method_cases import train
from helpers.models import denoiser, state
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffadapt as da
from diffadapt.common.safetensors_file import checksums


@pytest.fixture
def path(tmp_path):
    adapter = da.attach(denoiser(), da.LoRA(rank=2), "conv", seed=7)
    train(adapter)
    da.save(adapter, tmp_path / "lora.safetensors")
    return tmp_path / "lora.safetensors"


def refuse(path, said, kind=ValueError):
    """Loading fails with a message that names the file or the fault, and leaves the model alone."""
    model = denoiser()
    before = state(model)
    with pytest.raises(kind, match=said):
        da.load(model, path)
    assert state(model) == before


def rewrite(path, header=None, tensors=None, **config):
    """The file with another header, tensors or configuration and a fitting hash: not damaged but hostile."""
    with safe_open(path, "pt") as file:
        own = file.metadata()
    tensors = load_file(path) if tensors is None else tensors
    if config:
        own["adapter"] = json.dumps(json.loads(own["adapter"]) | config)
    own |= header or {}
    own = {**own, **checksums(tensors, own["adapter"] or ""), **(header or {})}
    save_file(tensors, path, {key: value for key, value in own.items() if value is not None})


@pytest.mark.parametrize("where", [-1, -300, 0.5])
def test_a_flipped_bit_among_the_tensors_is_found(path, where):
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[where if isinstance(where, int) else start + int(where * (len(data) - start))] ^= 1
    path.write_bytes(data)
    refuse(path, "altered or damaged")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1, -64])
def test_a_truncated_file_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    refuse(path, "truncated or not a safetensors file")


def test_a_longer_file_is_refused(path):
    path.write_bytes(path.read_bytes() + b"\0" * 64)
    refuse(path, "truncated or not a safetensors file")


def test_a_header_longer_than_the_file_is_refused(path):
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    refuse(path, "truncated or not a safetensors file")


def test_a_missing_file_is_named(tmp_path):
    refuse(tmp_path / "nowhere.safetensors", "no adapter file at .*nowhere", FileNotFoundError)


def test_a_folder_is_not_a_file(tmp_path):
    refuse(tmp_path, "adapter", FileNotFoundError)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


def test_a_pickle_is_never_executed(path):
    path.write_bytes(pickle.dumps(Bomb()))
    refuse(path, "not a safetensors file")
    torch.save({"weight": Bomb()}, path)
    refuse(path, "not a safetensors file")


HEADERS = {
    "of another tool": ({"format": "pt"}, "not a diffadapt file"),
    "without a format": ({"format": None}, "not a diffadapt file"),
    "of a later version": ({"format_version": "2"}, "format version '2', this diffadapt reads 1"),
    "without a version": ({"format_version": None}, "format version None"),
    "without a hash": ({"sha256": None}, "altered or damaged"),
    "with another hash": ({"sha256": "0" * 64}, "altered or damaged"),
    "without a configuration": ({"adapter": None}, "configuration is malformed"),
    "with another configuration": ({"adapter_sha256": "0" * 64}, "configuration does not match its SHA-256"),
    "with a configuration that is no json": ({"adapter": "{"}, "configuration is malformed"),
    "with a list for a configuration": ({"adapter": "[]"}, "malformed"),
    "with a number for a configuration": ({"adapter": "1"}, "malformed"),
    "with endless nesting": ({"adapter": "[" * 100_000}, "malformed"),
}


@pytest.mark.parametrize(("header", "said"), HEADERS.values(), ids=HEADERS)
def test_a_header_is_refused(path, header, said):
    rewrite(path, header)
    refuse(path, said)


def lora(**options):
    return {"method": [{"name": "lora", "options": options}]}


def site(**given):
    return {"component": "", "path": "conv_in", "shape": [8, 4, 3, 3], **given}


CONFIGS = {
    "no method": ({"method": None}, "list of methods"),
    "no methods": ({"method": []}, "list of methods"),
    "a method that is a word": ({"method": ["lora"]}, "a name and options"),
    "a method whose name is a list": ({"method": [{"name": ["lora"], "options": {}}]}, "a name and options"),
    "an unknown method": ({"method": [{"name": "lorra", "options": {}}]}, "'lorra'; did you mean lora"),
    "an unknown option": (lora(rank=2, rnak=3), "no option 'rnak'; did you mean rank"),
    "a private option": (lora(rank=2, __class__="x"), "no option '__class__'"),
    "a rank that allocates terabytes": (lora(rank=10**12), "shape"),
    "a rank beyond 64 bits": (lora(rank=10**30), "shape"),
    "a rank of zero": (lora(rank=0), "rank must be"),
    "a negative rank": (lora(rank=-2), "rank must be"),
    "a rank that is text": (lora(rank="2"), "rank must be"),
    "a rank that is true": (lora(rank=True), "rank must be"),
    "a rank that is a list": (lora(rank=[2]), "rank must be"),
    "a multiplier that is no number": (lora(rank=2, alpha=float("nan")), "alpha must be"),
    "an endless multiplier": (lora(rank=2, scale=float("inf")), "scale must be"),
    "a multiplier beyond floats": (lora(rank=2, alpha=10**400), "alpha must be"),
    "a multiplier beyond float32": (lora(rank=2, alpha=1e308), "does not fit into float32"),
    "dropout that is no number": (lora(rank=2, dropout=float("nan")), "dropout must be"),
    "options that are a list": ({"method": [{"name": "lora", "options": []}]}, "a name and options"),
    "an endless seed": ({"seed": float("inf")}, "malformed"),
    "a seed that is text": ({"seed": "cat"}, "malformed|cat"),
    "a seed that is missing": ({"seed": None}, "malformed"),
    "no base": ({"base": None}, "malformed"),
    "a base that is a list": ({"base": []}, "malformed"),
    "sites that are a number": ({"sites": 3}, "malformed"),
    "no sites": ({"sites": []}, ".+"),
    "a site that is a word": ({"sites": ["conv_in"]}, "malformed"),
    "a site without a path": ({"sites": [{"component": "", "shape": [1]}]}, "malformed"),
    "a site of another shape": ({"sites": [site(shape=[8, 4, 5, 5])]}, "conv_in has shape"),
    "a shape that is text": ({"sites": [site(shape="8433")]}, "malformed|conv_in has shape"),
    "a shape that is endless": ({"sites": [site(shape=[10**30, 4])]}, "conv_in has shape"),
    "a site that is not there": (
        {"sites": [site(path="conv_inn")]},
        "'conv_inn' with a weight; did you mean conv_in",
    ),
    "a path into python": ({"sites": [site(path="__class__")]}, "no layer '__class__'"),
    "a site twice": ({"sites": [site(), site()]}, "lists the layer 'conv_in' 2 times"),
    "a component that is not there": (
        {"sites": [site(component="text_encoder")]},
        "'text_encoder' of a pipeline",
    ),
    "a site's rank that is text": ({"sites": [site(rank="2")]}, "rank must be"),
    "a site's rank that is negative": ({"sites": [site(rank=-1)]}, "rank must be"),
    "a site's rank that allocates terabytes": ({"sites": [site(rank=10**12)]}, "shape"),
    "fewer sites than tensors": ({"sites": [site()]}, "holds a tensor"),
}


@pytest.mark.parametrize(("config", "said"), CONFIGS.values(), ids=CONFIGS)
def test_a_configuration_is_refused(path, config, said):
    rewrite(path, **config)
    refuse(path, said)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_are_refused(path, value):
    tensors = load_file(path)
    tensors["lora/conv_in/up"][3, 1] = value
    rewrite(path, tensors=tensors)
    refuse(path, "lora/conv_in/up holds values that are not finite numbers")


def test_integers_in_the_place_of_trained_values_are_refused(path):
    tensors = load_file(path)
    tensors["lora/conv_in/up"] = tensors["lora/conv_in/up"].int()
    rewrite(path, tensors=tensors)
    refuse(path, "lora/conv_in/up")


def test_a_tensor_of_another_shape_is_refused(path):
    tensors = load_file(path)
    tensors["lora/conv_in/up"] = tensors["lora/conv_in/up"].T.contiguous()
    rewrite(path, tensors=tensors)
    refuse(path, r"lora/conv_in/up has shape \(2, 8\), expected \(8, 2\)")


def test_a_missing_tensor_is_named_with_near_ones(path):
    tensors = load_file(path)
    tensors["lora/conv_in/upp"] = tensors.pop("lora/conv_in/up")
    rewrite(path, tensors=tensors)
    refuse(path, "lacks the tensor 'lora/conv_in/up'; did you mean lora/conv_in/upp")


def test_a_tensor_too_many_is_refused(path):
    rewrite(path, tensors={**load_file(path), "lora/conv_in/extra": torch.zeros(1)})
    refuse(path, "'lora/conv_in/extra'")
