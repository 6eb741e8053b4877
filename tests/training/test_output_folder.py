"""A used output folder: a new run asks, a resumed one keeps to its own checkpoints, nothing old is left."""

import json
import os
import signal
from dataclasses import dataclass

import pytest
import torch
import yaml
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from helpers.scripts import runner, stop_after
from safetensors.torch import load_file

from diffadapt.training import output_folder
from diffadapt.training.checkpoint.checkpoint_files import list_checkpoints, run_id_of
from diffadapt.training.options import TrainOptions, option

pytestmark = pytest.mark.slow

STEPS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sd_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(base, tmp_path, monkeypatch):
    """Runs dreambooth.py on three images into tmp_path/out. Further options win."""
    write_pictures(tmp_path / "images", 3)
    script = runner("dreambooth", monkeypatch)

    def start(*flags, **further):
        options = {
            "pretrained_model_name_or_path": base,
            "instance_data_dir": tmp_path / "images",
            "instance_prompt": "a sks dog",
            "output_dir": tmp_path / "out",
            "adapter": "lora",
            "rank": 2,
            "targets": "attention",
            "max_train_steps": STEPS,
            "train_batch_size": 2,
            "mixed_precision": "no",
            "num_validation_images": 0,
            "export_formats": "none",
            "num_threads": 1,
            **further,
        }
        options = {name: value for name, value in options.items() if value is not None}
        return script(*flags, *[part for name, value in options.items() for part in (f"--{name}", value)])

    return start


def names(folder):
    return sorted(path.name for path in list_checkpoints(folder))


def test_a_new_run_asks_before_it_uses_the_folder_of_another(run, tmp_path, capsys):
    assert run(checkpointing_steps=2) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert run(checkpointing_steps=2, max_train_steps=2) == 2
    message = capsys.readouterr().err
    assert "holds a run already (adapter.safetensors, run.json" in message
    assert f"--output_dir {tmp_path / 'out'}-2" in message
    assert "--overwrite_output_dir" in message
    assert "--resume_from_checkpoint latest" in message
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


def test_a_folder_that_is_overwritten_keeps_nothing_of_the_run_before(run, tmp_path):
    pictures = {"num_validation_images": 2, "num_inference_steps": 1}
    assert run(checkpointing_steps=1, export_formats="kohya", **pictures) == 0
    (tmp_path / "out" / "notes.txt").write_text("mine", encoding="utf-8")
    assert (tmp_path / "out" / "adapter_comfyui.safetensors").exists()
    assert run("--overwrite_output_dir", adapter="bitfit", rank=None, max_train_steps=2) == 0
    left = {"adapter.safetensors", "checkpoint-2", "config.yaml", "log.jsonl", "notes.txt", "run.json"}
    present = {path.name for path in (tmp_path / "out").iterdir() if path.is_file() or any(path.iterdir())}
    assert present == left | {"README.md"}


def test_files_of_others_are_not_replaced_without_asking(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("of a person", encoding="utf-8")
    assert run() == 2
    assert "(README.md)" in capsys.readouterr().err
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "of a person"


@pytest.mark.parametrize("name", ["samples/before/mine.png", "validation/mine.png", "log.jsonl/mine.txt"])
def test_folders_of_others_are_not_removed_without_asking(run, tmp_path, capsys, name):
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("of a person", encoding="utf-8")
    assert run() == 2
    assert "holds a run already" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "of a person"


@pytest.mark.parametrize("name", ["samples", "validation", "logs", "checkpoint-4", "class_images"])
def test_a_file_where_a_folder_belongs_is_told_at_the_start(run, tmp_path, capsys, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("of a person", encoding="utf-8")
    assert run(validation_steps=1, num_validation_images=1, num_inference_steps=1) == 2
    assert f"{tmp_path / 'out' / name} is a file where a run writes a folder" in capsys.readouterr().err
    assert (tmp_path / "out" / name).read_text(encoding="utf-8") == "of a person"
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_latest_without_a_checkpoint_begins_a_run_and_says_so(run, tmp_path, capsys):
    assert run(resume_from_checkpoint="latest") == 0
    assert f"no checkpoint in {tmp_path / 'out'} yet: a new run begins" in capsys.readouterr().out


def test_the_end_of_a_run_has_a_checkpoint_that_ends_it_again(run, tmp_path):
    assert run() == 0
    out = tmp_path / "out"
    assert names(out) == [f"checkpoint-{STEPS}"]
    first = load_file(out / "adapter.safetensors")
    os.remove(out / "adapter.safetensors")
    os.remove(out / "run.json")
    log = (out / "log.jsonl").read_text(encoding="utf-8")
    assert run(resume_from_checkpoint="latest", export_formats="kohya") == 0
    again = load_file(out / "adapter.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert (out / "log.jsonl").read_text(encoding="utf-8") == log
    assert (out / "adapter_comfyui.safetensors").exists()
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["steps"] == STEPS


def test_a_resumed_run_is_the_one_that_stopped_and_removes_its_own_checkpoints_only(
    run, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        stop_after(1, signal.SIGTERM, patched)
        assert run() == 128 + signal.SIGTERM
    stopped = run_id_of(tmp_path / "out" / "checkpoint-2")
    other = tmp_path / "out" / "checkpoint-1"
    other.mkdir()
    (other / "state.json").write_text('{"run": "another"}', encoding="utf-8")
    limit = {"checkpoints_total_limit": 1, "checkpointing_steps": 1}
    assert run(resume_from_checkpoint=tmp_path / "out" / "checkpoint-2", **limit) == 0
    assert names(tmp_path / "out") == ["checkpoint-1", f"checkpoint-{STEPS}"]
    assert run_id_of(tmp_path / "out" / f"checkpoint-{STEPS}") == stopped
    assert run(resume_from_checkpoint="latest") == 2  # which run is the latest?


def test_a_checkpoint_is_not_continued_in_the_folder_of_another_run(run, tmp_path, capsys):
    assert run() == 0
    assert run(output_dir=tmp_path / "two", seed=1) == 0
    assert run(output_dir=tmp_path / "two", resume_from_checkpoint=tmp_path / "out" / "checkpoint-4") == 2
    assert "holds another run" in capsys.readouterr().err


def test_fewer_steps_than_the_checkpoint_are_an_error(run, capsys):
    assert run() == 0
    assert run(resume_from_checkpoint="latest", max_train_steps=3, lr_scheduler="constant") == 2
    assert "has made 4 steps, more than --max_train_steps 3" in capsys.readouterr().err


def test_no_checkpoint_but_the_last_is_written_with_0(run, tmp_path, monkeypatch):
    assert run(checkpointing_steps=0) == 0
    assert names(tmp_path / "out") == [f"checkpoint-{STEPS}"]
    with monkeypatch.context() as patched:
        stop_after(2, signal.SIGTERM, patched)
        assert run(checkpointing_steps=0, output_dir=tmp_path / "two") == 128 + signal.SIGTERM
    (stopped,) = names(tmp_path / "two")
    assert stopped in ("checkpoint-2", "checkpoint-3")


@pytest.mark.parametrize(
    ("option", "place", "further"),
    [
        ("logging_dir", "images/logs", {"report_to": "tensorboard"}),
        ("class_data_dir", "images/class", {"class_prompt": "a dog"}),
        ("class_data_dir", "images", {"class_prompt": "a dog"}),
    ],
)
def test_no_folder_that_is_written_may_lie_in_the_data(run, tmp_path, capsys, option, place, further):
    pytest.importorskip("tensorboard")
    flags = ["--with_prior_preservation"] if option == "class_data_dir" else []
    assert run(*flags, **{option: tmp_path / place}, **further) == 2
    assert f"--{option} '{tmp_path / place}' lies in --instance_data_dir" in capsys.readouterr().err
    assert len(list((tmp_path / "images").iterdir())) == 3


def test_images_that_the_run_would_remove_are_no_data(run, tmp_path, capsys):
    assert run(num_validation_images=1, num_inference_steps=1) == 0
    samples = tmp_path / "out" / "samples" / "after"
    assert run("--overwrite_output_dir", instance_data_dir=samples) == 2
    assert "is a folder that the run in" in capsys.readouterr().err
    assert len(list(samples.iterdir())) == 2
    assert run(instance_data_dir=samples, output_dir=tmp_path / "two") == 0


@pytest.mark.parametrize("place", [".", "runs/one"])
def test_an_output_folder_in_the_base_is_refused(run, base, capsys, place):
    before = sorted(base.rglob("*"))
    assert run(output_dir=base / place) == 2
    assert "would write into the model or remove it" in capsys.readouterr().err
    assert sorted(base.rglob("*")) == before


def test_a_base_that_the_run_would_remove_is_refused(run, tmp_path, capsys):
    assert run(export_formats="merged") == 0
    merged = tmp_path / "out" / "adapter_merged"
    assert run("--overwrite_output_dir", pretrained_model_name_or_path=merged) == 2
    assert "would write into the model or remove it" in capsys.readouterr().err
    assert (merged / "model_index.json").exists()
    assert run(pretrained_model_name_or_path=merged, output_dir=tmp_path / "two") == 0


def test_a_folder_of_images_beside_the_results_is_data(run, tmp_path):
    write_pictures(tmp_path / "work" / "images", 2)
    assert run(instance_data_dir=tmp_path / "work" / "images", output_dir=tmp_path / "work") == 0
    assert (
        run(
            "--overwrite_output_dir",
            instance_data_dir=tmp_path / "work" / "images",
            output_dir=tmp_path / "work",
        )
        == 0
    )
    assert len(list((tmp_path / "work" / "images").glob("*.png"))) == 2


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
def test_a_folder_of_class_images_is_tried_before_the_base_is_loaded(run, tmp_path, capsys, flags):
    place = "/proc/class_images"
    prior = {"class_prompt": "a dog", "class_data_dir": place, "num_class_images": 2}
    assert run("--with_prior_preservation", *flags, **prior) == 2
    assert f"--class_data_dir '{place}' cannot be written to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_all_class_images_need_not_be_writable(tmp_path):
    write_pictures(tmp_path / "class", 2)

    @dataclass(frozen=True)
    class Options(TrainOptions):
        class_data_dir: str | None = option(None, "where")
        num_class_images: int = option(2, "how many")

    options = Options(output_dir="out", class_data_dir=str(tmp_path / "class"))
    assert "class_data_dir" not in output_folder.output_folders(options)
    more = Options(output_dir="out", class_data_dir=str(tmp_path / "class"), num_class_images=3)
    assert "class_data_dir" in output_folder.output_folders(more)


@pytest.mark.parametrize("place", [".", "runs/one"])
def test_an_output_folder_in_the_data_is_refused(run, tmp_path, capsys, place):
    output = tmp_path / "images" / place
    assert run(output_dir=output) == 2
    message = capsys.readouterr().err
    assert "lies in --instance_data_dir" in message
    assert "name a folder outside of it" in message
    assert sorted(path.suffix for path in (tmp_path / "images").iterdir()) == [".png"] * 3


def test_images_in_the_output_folder_of_a_run_are_refused(run, tmp_path, capsys):
    assert run(output_dir=tmp_path / "one") == 0
    write_pictures(tmp_path / "one", 2)
    assert run(instance_data_dir=tmp_path / "one", output_dir=tmp_path / "two") == 2
    assert "is the output folder of an earlier run" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def test_the_default_folder_is_numbered_where_it_holds_a_run(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Options(TrainOptions):
        output_dir: str = option("runs/default", "where")

    monkeypatch.chdir(tmp_path)
    assert output_folder.resolve_output_dir(Options())[0].output_dir == "runs/default"
    (tmp_path / "runs" / "default").mkdir(parents=True)
    (tmp_path / "runs" / "default" / "run.json").write_text("{}", encoding="utf-8")
    options, notices = output_folder.resolve_output_dir(Options())
    assert options.output_dir == "runs/default-2"
    assert notices == ["runs/default holds an earlier run; this one is in runs/default-2"]
    assert (
        output_folder.resolve_output_dir(Options(overwrite_output_dir=True))[0].output_dir == "runs/default"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"output_dir": " "}, "--output_dir is empty"),
        ({"overwrite_output_dir": True, "resume_from_checkpoint": "latest"}, "leave one of them out"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        output_folder.resolve_output_dir(TrainOptions(**{"output_dir": "x", **given}))


def test_config_yaml_names_its_run_and_stays_readable(run, tmp_path):
    assert run() == 0
    assert output_folder.run_id_in(tmp_path / "out") == run_id_of(tmp_path / "out" / "checkpoint-4")
    assert (
        yaml.safe_load((tmp_path / "out" / "config.yaml").read_text(encoding="utf-8"))["max_train_steps"]
        == STEPS
    )
