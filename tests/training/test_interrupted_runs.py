"""Ctrl-C: once to stop after the step with a checkpoint, twice to stop at once."""

import io
import os
import select
import signal
import subprocess
import sys

import pytest
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from helpers.scripts import runner

from diffadapt.common import exit_codes
from diffadapt.training.checkpoint.checkpoint_files import find_checkpoint
from diffadapt.training.run import Run
from diffadapt.training.signals import StopRequest


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
    assert find_checkpoint("latest", tmp_path / "out").name == "checkpoint-3"  # the step it fell into
    assert not (tmp_path / "out" / "run.json").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_says_at_once_what_it_does_and_a_second_one_stops_at_once(capfd):
    with StopRequest() as stop:
        interrupt()
        assert stop.received == signal.SIGINT
        assert capfd.readouterr().err == (
            "\nCtrl-C: stops after this step and saves a checkpoint; "
            "Ctrl-C again stops at once, without saving\n"
        )
        with pytest.raises(KeyboardInterrupt, match="without saving; the last checkpoint"):
            interrupt()


def test_a_signal_after_ctrl_c_does_not_lose_the_checkpoint():
    with StopRequest() as stop:
        interrupt()
        os.kill(os.getpid(), signal.SIGTERM)  # of a launcher that ended on the same Ctrl-C
        assert stop.received == signal.SIGINT


def test_only_the_main_process_speaks(capfd):
    with StopRequest(announce=False):
        interrupt()
    assert capfd.readouterr().err == ""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_is_noted_and_nohup_stays_ignored():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received == signal.SIGHUP
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


LOSES_ITS_OUTPUT = """
import os, signal, sys
from diffadapt.training.signals import StopRequest
from accelerate import Accelerator

with StopRequest() as stop:
    sys.stdin.readline()  # until the reader of the output is gone
    os.kill(os.getpid(), signal.SIGINT)
    stop.agreed(Accelerator(cpu=True))
    print("a line for nobody", flush=True)
    sys.exit(7)
"""


@pytest.mark.skipif(not hasattr(select, "poll"), reason="Windows cannot ask a pipe for its reader")
@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_any_more_still_ends_as_it_should():
    process = subprocess.Popen(
        [sys.executable, "-c", LOSES_ITS_OUTPUT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    process.stdout.close()  # as `| tee log` does when Ctrl-C ends it first
    process.stdin.write(b"go on\n")
    process.stdin.close()
    assert process.wait(timeout=240) == 7


def test_signals_of_both_kinds_are_noted():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received == signal.SIGTERM


def test_a_command_that_is_interrupted_ends_with_130_and_no_traceback(capsys):
    def main():
        raise KeyboardInterrupt

    assert exit_codes.run_command(main) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_what_a_terminal_cannot_show_is_escaped_and_no_fault(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert exit_codes.run_command(lambda: print("“a cat”") or 0) == 0
    terminal.flush()
    assert terminal.buffer.getvalue() == b"\\u201ca cat\\u201d\n"
