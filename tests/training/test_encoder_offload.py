"""Encoders leave the GPU between encoding and drawing. There is none here: moves are recorded."""

from types import SimpleNamespace

import pytest
import torch
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from helpers.scripts import runner
from torch import nn

from diffadapt.training import encoder_offload


class Mover(nn.Module):
    """A part of a pipeline that notes where it is sent."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def to(self, device):
        self.seen.append(torch.device(device).type)
        return self


@pytest.fixture
def gpu(monkeypatch):
    """A device that is not there, whose memory can be told to be emptied."""
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    return torch.device("cuda", 0)


def idle_of(*, cached=True, streaming=False, train_text_encoder=False):
    names = ("vae", "text_encoder", "text_encoder_2", "unet", "safety_checker")
    parts = {name: nn.Linear(1, 1) for name in names} | {"tokenizer": object()}
    pipe = SimpleNamespace(components=parts)
    model = SimpleNamespace(
        pipe=pipe,
        denoiser_name="unet",
        text_encoders={name: parts[name] for name in names if name.startswith("text_encoder")},
        train_text_encoder=train_text_encoder,
    )
    batches = SimpleNamespace(cache={} if cached else None, is_streaming=streaming)
    found = encoder_offload.unused_encoders(model, batches)
    return {name for name, part in parts.items() if any(part is one for one in found)}


def test_what_steps_use_stays():
    texts = {"text_encoder", "text_encoder_2"}
    assert idle_of() == {"vae", "safety_checker"} | texts
    assert idle_of(cached=False) == {"safety_checker"} | texts
    assert idle_of(train_text_encoder=True) == {"vae", "safety_checker"}
    assert idle_of(streaming=True) == {"safety_checker"}


def test_parts_rest_wake_to_draw_and_come_back_after_a_failure(gpu):
    part = Mover()

    def fail_in_a_step():
        with encoder_offload.offloaded([part], gpu):
            with encoder_offload.onloaded([part], gpu):
                assert part.seen == ["cpu", "cuda"]
            assert part.seen == ["cpu", "cuda", "cpu"]
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fail_in_a_step()
    assert part.seen[-1] == "cuda"


def test_on_a_cpu_nothing_is_moved():
    part = Mover()
    cpu = torch.device("cpu")
    with encoder_offload.offloaded([part], cpu), encoder_offload.onloaded([part], cpu):
        pass
    assert part.seen == []


def test_a_run_draws_only_with_what_is_awake(monkeypatch, tmp_path):
    """Moves and drawings in their order: rest at the first step, wake for every validation and at the end."""
    seen = []
    monkeypatch.setattr(encoder_offload, "_move", lambda parts, to, device: seen.append((len(parts), to)))
    monkeypatch.setattr(
        "diffadapt.training.report.base.Report._generate",
        lambda self, wanted, label: seen.append("draw") or torch.zeros(len(wanted), 3, 8, 8),
    )
    away, home = (2, torch.device("cpu")), (2, "home")
    monkeypatch.setattr(
        "diffadapt.training.run.offloaded", lambda parts, device: encoder_offload.offloaded(parts, "home")
    )
    monkeypatch.setattr(
        "diffadapt.training.run.onloaded", lambda parts, device: encoder_offload.onloaded(parts, "home")
    )
    tiny_sd_pipeline(tmp_path / "base")
    write_pictures(tmp_path / "mine", 2)
    run = runner("dreambooth", monkeypatch)
    told = {
        "pretrained_model_name_or_path": tmp_path / "base",
        "instance_data_dir": tmp_path / "mine",
        "instance_prompt": "a sks dog",
        "output_dir": tmp_path / "out",
        "num_validation_images": 1,
        "train_batch_size": 1,
        "max_train_steps": 2,
        "validation_steps": 1,
        "num_threads": 1,
    }
    given = [part for name, value in told.items() for part in (f"--{name}", value)]
    assert run(*given, "--center_crop") == 0
    one = [home, "draw", away]
    assert seen == ["draw", away, *one, *one, home, "draw"]
