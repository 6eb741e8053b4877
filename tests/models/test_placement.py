"""Components come to a device when they are needed and leave it. Moves are recorded: there is no GPU."""

import weakref

import pytest
import torch
from helpers.family_pipelines import tiny_folder
from torch import nn

from diffadapt.models import placement as placement_module
from diffadapt.models.families import load_base
from diffadapt.models.placement import Placement

GPU = torch.device("cuda", 0)


class Pipe:
    """A pipeline with components of one weight each."""

    def __init__(self):
        for name in ("text_encoder", "text_encoder_2", "transformer", "vae"):
            setattr(self, name, nn.Linear(1, 1))
        self.tokenizer = object()

    def register_modules(self, **components):
        vars(self).update(components)


@pytest.fixture
def moves(monkeypatch):
    """(component, type of device) of every move, in order."""
    pipe = Pipe()
    record = []

    def note(module, device):
        (name,) = (name for name, value in vars(pipe).items() if value is module)
        record.append((name, device.type))

    monkeypatch.setattr(placement_module, "move", note)
    return record, pipe


def test_components_visit_the_device_and_leave_it_also_after_a_failure(moves):
    record, pipe = moves
    placement = Placement(pipe, GPU, is_staged=True)

    def fail_while_encoding():
        with placement.on_device(["text_encoder", "tokenizer", "absent"]):
            assert record == [("text_encoder", "cuda")]
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fail_while_encoding()
    assert record == [("text_encoder", "cuda"), ("text_encoder", "cpu")]


def test_what_is_there_already_does_not_leave(moves):
    record, pipe = moves
    placement = Placement(pipe, GPU, is_staged=True)
    placement.to_device(["transformer"])
    with placement.on_device(["transformer", "vae"]), placement.on_device(["vae"]):
        assert record == [("transformer", "cuda"), ("vae", "cuda")]
    assert record[2:] == [("vae", "cpu")]


def test_text_encoders_can_compute_elsewhere(moves):
    record, pipe = moves
    placement = Placement(pipe, GPU, text_encoder_device=torch.device("cpu"), is_staged=True)
    with placement.on_device(["text_encoder_2", "vae"]):
        assert sorted(record) == [("text_encoder_2", "cpu"), ("vae", "cuda")]


def test_a_base_that_was_loaded_in_place_is_not_moved(moves):
    record, pipe = moves
    with Placement(pipe, GPU).on_device(["vae"]), Placement(pipe).on_device(["vae"]):
        assert record == []


def test_what_is_released_is_freed_unless_it_is_kept():
    pipe = Pipe()
    placement = Placement(pipe, GPU, is_staged=True)
    first, second = weakref.ref(pipe.text_encoder), weakref.ref(pipe.text_encoder_2)
    placement.release(["text_encoder"])
    placement.release(["text_encoder_2"], keep=True)
    assert first() is None
    assert pipe.text_encoder is None
    assert pipe.text_encoder_2 is None
    with placement.restored():
        assert pipe.text_encoder_2 is second()
        assert pipe.text_encoder is None
    assert pipe.text_encoder_2 is None


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_denoiser_has_shapes_first_and_the_same_weights_later(family, tmp_path_factory):
    folder = str(tiny_folder(family, tmp_path_factory))
    at_once = load_base(folder, dtype=torch.bfloat16)
    staged = load_base(folder, dtype=torch.bfloat16, is_staged=True)
    shapes = staged.denoiser
    assert {parameter.device.type for parameter in shapes.parameters()} == {"meta"}
    assert shapes.dtype == torch.bfloat16
    staged.placement.load_denoiser()
    assert staged.denoiser is not shapes
    expected = at_once.denoiser.state_dict()
    loaded = staged.denoiser.state_dict()
    assert loaded.keys() == expected.keys()
    for name, value in loaded.items():
        assert torch.equal(value, expected[name]), name
        assert value.dtype == expected[name].dtype
    assert not staged.denoiser.training
    assert not any(parameter.requires_grad for parameter in staged.denoiser.parameters())
    denoiser = staged.denoiser
    staged.placement.load_denoiser()
    assert staged.denoiser is denoiser
