"""Checkpoints on a disk that is full, and how many are kept."""

import subprocess
from pathlib import Path

import pytest
from helpers.small_run import SmallBatches, bits, same_bits, small_train_state
from safetensors.torch import load_file

from diffadapt.training.checkpoint import checkpoint_io
from diffadapt.training.checkpoint.checkpoint_files import find_checkpoint
from diffadapt.training.loop import train
from diffadapt.training.run_log import Log


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def steps_of(train_state, folder):
    """Trains and saves after every step."""
    for _ in train(train_state, SmallBatches()):
        checkpoint_io.save_checkpoint(train_state, folder)


def test_only_the_newest_are_kept(tmp_path):
    steps_of(small_train_state(max_train_steps=11, checkpoints_total_limit=2), tmp_path)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-11"]
    steps_of(small_train_state(max_train_steps=3), tmp_path / "all")
    assert len(names(tmp_path / "all")) == 3


def test_old_ones_stay_when_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    train_state = small_train_state(max_train_steps=3, checkpoints_total_limit=1)
    steps = train(train_state, SmallBatches())
    next(steps)
    checkpoint_io.save_checkpoint(train_state, tmp_path)
    next(steps)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_io, "save_file", full)
        with pytest.raises(OSError, match=r"the last good one is .*checkpoint-1; make room"):
            checkpoint_io.save_checkpoint(train_state, tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]
    checkpoint_io.restore_checkpoint(
        small_train_state(max_train_steps=3, checkpoints_total_limit=1), tmp_path / "checkpoint-1"
    )


def test_what_a_killed_process_left_is_swept_away(tmp_path):
    for rest in (".unfinished-checkpoint-1", ".removed-checkpoint-2"):
        (tmp_path / rest).mkdir()
    steps_of(small_train_state(max_train_steps=1), tmp_path)
    assert names(tmp_path) == ["checkpoint-1"]


def test_one_that_is_written_again_is_never_half_there(tmp_path, monkeypatch):
    train_state = small_train_state(max_train_steps=1)
    steps_of(train_state, tmp_path)

    def killed(path, **_):
        if (path / "state.safetensors").exists():
            (path / "state.safetensors").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_io.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint_io.save_checkpoint(train_state, tmp_path)
    again = small_train_state(max_train_steps=1)
    checkpoint_io.restore_checkpoint(again, find_checkpoint("latest", tmp_path))
    assert same_bits(bits(train_state), bits(again))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MiB, where mounting is allowed."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here; the test with a patched writer stands for this one")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # safetensors maps its files


def test_a_full_disk_ends_with_a_message_and_the_last_checkpoint_whole(small_disk):
    train_state = small_train_state("lora(rank=16)", max_train_steps=9)
    kept, message = {}, ""
    for _ in train(train_state, SmallBatches()):
        try:
            checkpoint_io.save_checkpoint(train_state, small_disk)
        except OSError as error:
            message = str(error)
            break
        kept = bits(train_state)
    latest = find_checkpoint("latest", small_disk)
    assert "No space left" in message or "os error 28" in message
    assert f"the last good one is {latest}; make room" in message
    assert 1 < train_state.step < 9
    assert latest.name == f"checkpoint-{train_state.step - 1}"
    assert not [path for path in small_disk.iterdir() if path.name.startswith(".")]
    again = small_train_state("lora(rank=16)", max_train_steps=9)
    checkpoint_io.restore_checkpoint(again, latest)
    assert same_bits(kept, bits(again))
    load_file(latest / "adapter.safetensors")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a file on a full disk, as Linux has it")
def test_a_log_on_a_full_disk_says_what_to_do(tmp_path):
    log = Log(tmp_path / "log.jsonl")
    log.write(step=1)
    log.path.unlink()
    log.path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"cannot write .*log.jsonl .*No space left.*make room, then repeat"):
        log.write(step=2)
