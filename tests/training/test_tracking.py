"""Trackers: tensorboard holds what the log holds, also after a resume; mistakes are told at the start."""

import importlib.util
import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from small_run import SmallBatches, small_trainer

from diffadapt.training import tracking
from diffadapt.training.loop import train
from diffadapt.training.record import Progress

events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def run(folder, steps, *, stop=None, start=0):
    """Trains and tracks up to step `stop`, as if resumed at `start`."""
    AcceleratorState._reset_state(reset_partial_state=True)
    trainer = small_trainer(max_train_steps=steps, output_dir=str(folder), report_to="tensorboard")
    trainer.accelerator = Accelerator(cpu=True, log_with=["tensorboard"], project_dir=str(folder / "logs"))
    trainer.step = start
    with Progress(trainer) as progress:
        for step in train(trainer, SmallBatches()):
            progress.show(step, {"change_norm": 0.5} if step.index == 2 else {})
            progress.track_pictures("validation", torch.rand(2, 3, 8, 8), step.index)
            if step.index == stop:
                break
    trainer.accelerator.end_training()


def test_tensorboard_gets_every_figure_and_forgets_what_a_resume_repeats(tmp_path):
    run(tmp_path, 5, stop=4)
    run(tmp_path, 5, start=2)
    found = events.EventAccumulator(
        str(tmp_path / "logs" / "diffadapt"), size_guidance={"images": 0}
    ).Reload()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    scalars = found.Scalars("loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5]
    assert [event.value for event in scalars] == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    assert [event.step for event in found.Scalars("change_norm")] == [2]
    assert lines[1]["change_norm"] == 0.5
    assert {"lr", "grad_norm", "seconds"} <= set(found.Tags()["scalars"])
    assert len(found.Images("validation")) >= 1


def test_names_are_checked_at_the_start(monkeypatch):
    assert tracking.check_trackers("none") == []
    assert tracking.check_trackers("tensorboard") == ["tensorboard"]
    with pytest.raises(ValueError, match=r"unknown tracker 'tensorbord' .*did you mean tensorboard"):
        tracking.check_trackers("tensorbord")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--report_to wandb needs a package: pip install wandb"):
        tracking.check_trackers("wandb")
    with pytest.raises(ValueError, match="pip install comet-ml"):
        tracking.check_trackers("comet_ml")
