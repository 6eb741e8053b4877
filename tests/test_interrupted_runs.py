"""Ctrl-C: once to stop after the step with a checkpoint, twice to stop at once."""

import os
import signal

import pytest
from pipelines import tiny_sd_pipeline, write_pictures
from scripts import runner

from diffadapt import exits
from diffadapt.training import state
from diffadapt.training.run import Run
from diffadapt.training.stop import StopRequest


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_exits_with_130_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    log = Run.log

    def interrupted(training, step):
        log(training, step)
        if step.index == 2:
            interrupt()

    monkeypatch.setattr(Run, "log", interrupted)
    arguments = {
        "pretrained_model_name_or_path": tiny_sd_pipeline(tmp_path / "base"),
        "instance_data_dir": write_pictures(tmp_path / "mine", 2),
        "instance_prompt": "a sks dog",
        "output_dir": tmp_path / "out",
        "num_validation_images": 0,
        "max_train_steps": 9,
        "num_threads": 1,
    }
    before = signal.getsignal(signal.SIGINT)
    pairs = [part for name, value in arguments.items() for part in (f"--{name}", value)]
    assert runner("dreambooth", monkeypatch)(*pairs) == 130
    assert "the same command with --resume_from_checkpoint latest" in "".join(capsys.readouterr())
    assert state.find("latest", tmp_path / "out").name == "checkpoint-3"  # the step it fell into
    assert not (tmp_path / "out" / "run.json").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once():
    with StopRequest() as stop:
        interrupt()
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            interrupt()


def test_signals_of_both_kinds_are_noted():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM


def test_a_command_that_is_interrupted_ends_with_130_and_no_traceback(capsys):
    def main():
        raise KeyboardInterrupt

    assert exits.run(main) == 130
    assert capsys.readouterr().err == "stopped\n"
