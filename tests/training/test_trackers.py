"""Trackers hold what the log holds, and the pictures; tensorboard also after a resume. Mistakes are told."""

import dataclasses
import importlib.util
import json
import struct
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from helpers.scripts import runner
from helpers.small_run import SmallBatches, small_train_state

from diffadapt.common import runtime
from diffadapt.training import trackers as tracking
from diffadapt.training.loop import train
from diffadapt.training.run_log import Progress
from diffadapt.training.trackers import Trackers

FIGURES = ("loss", "lr", "grad_norm", "seconds")


def run(folder, steps, *, tracker="tensorboard", stop=None, start=0):
    """Trains and tracks up to step `stop`, as if resumed at `start`. Returns the lines of the log."""
    AcceleratorState._reset_state(reset_partial_state=True)
    train_state = small_train_state(max_train_steps=steps, output_dir=str(folder), report_to=tracker)
    train_state.accelerator = Accelerator(cpu=True, log_with=[tracker], project_dir=str(folder / "logs"))
    train_state.step = start
    trackers = Trackers(
        train_state.accelerator, dataclasses.asdict(train_state.options), step=train_state.step
    )
    with Progress(train_state, trackers) as progress:
        for step in train(train_state, SmallBatches()):
            progress.show(step, {"change_norm": 0.5} if step.index == 2 else {})
            progress.log_images("validation", torch.rand(2, 3, 8, 8), step.index)
            if step.index == stop:
                break
    assert trackers.close() == []
    train_state.accelerator.end_training()
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_tensorboard_gets_every_figure_and_forgets_what_a_resume_repeats(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(tmp_path, 5, stop=4)
    lines = run(tmp_path, 5, start=2)
    found = events.EventAccumulator(
        str(tmp_path / "logs" / "diffadapt"), size_guidance={"images": 0}
    ).Reload()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    scalars = found.Scalars("loss")
    assert [event.step for event in scalars] == [1, 2, 3, 4, 5]
    assert [event.value for event in scalars] == pytest.approx([line["loss"] for line in lines], rel=1e-6)
    assert [event.step for event in found.Scalars("change_norm")] == [2]
    assert lines[1]["change_norm"] == 0.5
    assert set(FIGURES) <= set(found.Tags()["scalars"])
    assert len(found.Images("validation")) >= 1


def wandb_history(folder):
    """What an offline run holds of every step: records behind a header of 7 bytes, each with one of 7."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("run-*.wandb")
    data, place, steps = file.read_bytes(), 7, []
    while place < len(data):  # of a short run: longer ones are in blocks
        (length,) = struct.unpack_from("<H", data, place + 4)
        record = Record.FromString(data[place + 7 : place + 7 + length])
        place += 7 + length
        if record.HasField("history"):
            items = record.history.item
            steps.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return steps


def test_wandb_gets_figures_and_pictures_and_writes_to_the_folder_of_logs(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    lines = run(tmp_path, 2, tracker="wandb")
    wandb.teardown()  # what writes the file is another process
    (kept,) = (tmp_path / "logs" / "wandb").glob("offline-run-*")
    for step, (line, logged) in enumerate(zip(lines, wandb_history(kept), strict=True), start=1):
        assert logged["_step"] == step
        assert {name: logged[name] for name in FIGURES} == {name: line[name] for name in FIGURES}
        assert logged["validation/count"] == 2
        assert all((kept / "files" / name).is_file() for name in logged["validation/filenames"])
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="pip install trackio")
def test_trackio_gets_figures_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    lines = run(tmp_path, 2, tracker="trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (record,) = SQLiteStorage.get_run_records(tracking.PROJECT)
    logged = SQLiteStorage.get_logs(tracking.PROJECT, record["name"], run_id=record["id"])
    for name in FIGURES:
        found = {entry["step"]: entry[name] for entry in logged if name in entry}
        assert found == pytest.approx({line["step"]: line[name] for line in lines})
    pictures = [entry["validation/1"] for entry in logged if "validation/1" in entry]
    assert [picture["_type"] for picture in pictures] == ["trackio.image"] * 2
    assert len(list((tmp_path / "trackio" / "media").rglob("*.png"))) == 2 * 2


def test_names_are_checked_at_the_start(monkeypatch):
    assert tracking.check_trackers("none") == []
    pytest.importorskip("tensorboard")
    assert tracking.check_trackers("tensorboard") == ["tensorboard"]
    with pytest.raises(ValueError, match=r"unknown tracker 'tensorbord' .*did you mean tensorboard"):
        tracking.check_trackers("tensorbord")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--report_to wandb needs a package: pip install wandb"):
        tracking.check_trackers("wandb")
    with pytest.raises(ValueError, match="pip install comet-ml"):
        tracking.check_trackers("comet_ml")


def test_one_that_cannot_be_opened_is_an_error_with_a_remedy(monkeypatch):
    class NoKeyError(Exception):
        """As libraries of trackers have them: of no common kind."""

    def refuse(*_, **__):
        raise NoKeyError("no API key configured")

    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "init_trackers", refuse)
    with pytest.raises(ValueError, match=r"cannot be opened: no API key configured; log in .*WANDB_MODE=off"):
        tracking.start_trackers(accelerator, {}, step=0)


class Failing(GeneralTracker):
    """A tracker that fails in one of its calls."""

    name = "failing"
    requires_logging_directory = False

    def __init__(self, call):
        super().__init__(_blank=True)
        self.call, self.logged = call, []

    def start(self):
        """Nothing to open."""

    def store_init_configuration(self, values):
        """Nothing to keep."""

    def log(self, values, step, **_):
        self.logged.append(step)
        if self.call == "log" and step == 2:
            raise ConnectionError("the server is gone")

    def finish(self):
        if self.call == "finish":
            raise TimeoutError


@pytest.mark.parametrize(
    ("call", "failure"),
    [
        ("log", "tracker failing, step 2: the server is gone"),
        ("finish", "tracker failing, the end: TimeoutError"),
    ],
)
@pytest.mark.slow
def test_a_tracker_that_fails_costs_itself_only(tmp_path, monkeypatch, capsys, call, failure):
    first, second = Failing(call), Failing(None)
    start = runtime.make_accelerator

    def with_trackers(**given):
        accelerator = start(**given)
        accelerator.log_with = [first, second]
        return accelerator

    monkeypatch.setattr(runtime, "make_accelerator", with_trackers)
    base = tiny_sd_pipeline(tmp_path / "base")
    write_pictures(tmp_path / "images", 2)
    out = tmp_path / "out"
    code = runner("dreambooth", monkeypatch)(
        *("--pretrained_model_name_or_path", base, "--instance_data_dir", tmp_path / "images"),
        *("--instance_prompt", "a sks dog", "--output_dir", out, "--rank", 2, "--targets", "attention"),
        *("--max_train_steps", 3, "--num_validation_images", 0, "--num_threads", 1),
    )
    assert code == 1
    assert failure in capsys.readouterr().err
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["failures"] == [failure]
    assert first.logged == ([1, 2] if call == "log" else [1, 2, 3])
    assert second.logged == [1, 2, 3]
    assert (out / "adapter_comfyui.safetensors").exists()


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
def test_a_tracker_that_cannot_be_used_is_an_error_before_the_base_is_loaded(
    tmp_path, monkeypatch, capsys, flags
):
    pytest.importorskip("tensorboard")

    def refuse():
        raise RuntimeError("no key")

    monkeypatch.setitem(tracking.TRIALS, "tensorboard", refuse)
    write_pictures(tmp_path / "images", 2)
    code = runner("dreambooth", monkeypatch)(
        *("--pretrained_model_name_or_path", "embedded:emoji", "--instance_data_dir", tmp_path / "images"),
        *("--instance_prompt", "a sks dog", "--output_dir", tmp_path / "out"),
        *("--report_to", "tensorboard", *flags),
    )
    assert code == 2
    assert "a tracker of --report_to cannot be opened: no key; log in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_the_trials_need_of_the_libraries_is_there():
    pytest.importorskip("tensorboard")
    tracking.try_trackers(["tensorboard", "none"])


@pytest.mark.parametrize("has_prompt", [False, True])
def test_wandb_without_a_key_is_an_error_where_it_would_send(monkeypatch, has_prompt):
    def library(mode, key):
        settings = SimpleNamespace(mode=mode)
        old = {"login": lambda key=None: None, "api": SimpleNamespace(api_key=key)}
        new = {"login": lambda key=key, prompt=True: key is not None}
        setup = SimpleNamespace(settings=settings)
        return SimpleNamespace(setup=lambda: setup, **(new if has_prompt else old))

    for mode, key in (("offline", None), ("disabled", None), ("online", "a key")):
        monkeypatch.setitem(sys.modules, "wandb", library(mode, key))
        tracking.try_trackers(["wandb"])
    monkeypatch.setitem(sys.modules, "wandb", library("online", None))
    with pytest.raises(ValueError, match="wandb has no key to log in with; log in"):
        tracking.try_trackers(["wandb"])
