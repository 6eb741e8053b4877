"""What a run needs at its end is tried before the first step; what fails at the end costs itself only."""

import json
from types import SimpleNamespace

import pytest
from helpers.class_pipelines import tiny_class_unet
from helpers.pipelines import tiny_clip, tiny_sd_pipeline, tiny_unet, write_pictures
from helpers.scripts import runner
from helpers.small_run import SmallBatches, bits, small_train_state
from safetensors.torch import load_file

import diffadapt as da
from diffadapt.training import run as run_module
from diffadapt.training.checkpoint.checkpoint_io import save_adapter
from diffadapt.training.loop import train
from diffadapt.training.option_checks import check_ranges
from diffadapt.training.options import TrainOptions
from diffadapt.training.report.base import Report
from diffadapt.training.report.subject import SubjectReport

pytestmark = pytest.mark.slow

MODELS = {"num_validation_images": 1, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sd_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture
def run(base, tmp_path, monkeypatch):
    """Runs dreambooth.py on two images into tmp_path/out. Further options win."""
    write_pictures(tmp_path / "images", 2)
    script = runner("dreambooth", monkeypatch)

    def start(*flags, **further):
        options = {
            "pretrained_model_name_or_path": base,
            "instance_data_dir": tmp_path / "images",
            "instance_prompt": "a sks dog",
            "output_dir": tmp_path / "out",
            "adapter": "lora(rank=2)",
            "targets": "attention",
            "max_train_steps": 2,
            "train_batch_size": 1,
            "mixed_precision": "no",
            "num_threads": 1,
            **MODELS,
            **further,
        }
        return script(*flags, *[part for name, value in options.items() for part in (f"--{name}", value)])

    return start


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"extractor": "/nonexistent/clip"}, "--extractor /nonexistent/clip cannot be loaded"),
        ({"seed": 2**63}, "--seed must be at least -2**63 and below 2**63"),
        ({"output_dir": "/proc/x"}, "--output_dir '/proc/x' cannot be written to"),
        (
            {"logging_dir": "/proc/x/y", "report_to": "tensorboard"},
            "--logging_dir '/proc/x/y' cannot be written to",
        ),
    ],
)
def test_what_would_fail_at_the_end_fails_before_the_first_step(run, tmp_path, capsys, flags, given, message):
    assert run(*flags, **given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_output_folder_is_named(run, tmp_path, capsys):
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    assert run() == 2
    assert "cannot be written to" in capsys.readouterr().err
    assert (tmp_path / "out").read_text(encoding="utf-8") == "a file"


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**63 - 1])
def test_every_seed_that_is_taken_can_be_stored(run, tmp_path, seed):
    assert run(seed=seed, num_validation_images=0, max_train_steps=1) == 0
    path = tmp_path / "out" / "adapter.safetensors"
    assert da.read_metadata(path)["adapter"]["seed"] == seed


@pytest.mark.parametrize("flags", [(), ("--dry_run",)])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"adapter": "difffit", "export_formats": "kohya"}, "--export_formats kohya cannot hold difffit: "),
        ({"adapter": "norms", "export_formats": "kohya,diffusers"}, "--export_formats diffusers cannot hold"),
        ({"adapter": "difffit", "export_formats": "merged"}, "gain a bias"),
        ({"export_formats": ","}, "names no format"),
        ({"export_formats": "kohya,none"}, "none excludes other formats"),
    ],
)
def test_a_format_that_cannot_hold_the_adapter_is_an_error_at_the_start(
    run, tmp_path, capsys, flags, given, message
):
    assert run(*flags, **given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "config.yaml").exists()


def test_a_base_of_classes_is_refused_by_a_script_of_captions(run, tmp_path, capsys):
    assert run(pretrained_model_name_or_path="embedded:digits") == 2
    assert (
        "is conditioned on classes, not captions; use train_scripts/class_conditional.py"
        in capsys.readouterr().err
    )


def test_that_the_default_format_cannot_hold_the_adapter_is_a_notice(run, tmp_path, capsys):
    assert run(adapter="difffit", num_validation_images=0) == 0
    shown = capsys.readouterr().out
    assert "export   no file for other programs (--export_formats kohya): 24 layers" in shown
    assert "no adapter_comfyui.safetensors" in shown
    assert not (tmp_path / "out" / "adapter_comfyui.safetensors").exists()


def test_trying_the_exports_changes_no_bit_of_the_run(run, tmp_path, monkeypatch):
    assert run(num_validation_images=0, lr_scheduler="constant") == 0
    monkeypatch.setattr(Report, "check_exports", lambda report, adapter: None)
    assert run(num_validation_images=0, lr_scheduler="constant", output_dir=tmp_path / "two") == 0
    first, second = (load_file(tmp_path / name / "adapter.safetensors") for name in ("out", "two"))
    assert all((value == second[name]).all() for name, value in first.items())


@pytest.mark.parametrize("method", [*da.METHODS, "lora(rank=2)+difffit", "peft:LORA", "peft:LOHA"])
def test_every_method_can_be_stored_and_read_before_the_first_step(tmp_path, method):
    """The trial of a run's start, on a class-conditional or a caption-conditioned model."""
    if method.startswith("peft:"):
        pytest.importorskip("peft")
    model = tiny_class_unet() if method == "class_embedding" else tiny_unet()
    adapter = da.attach(model, da.make_method(method), "attention", seed=-1)
    train_state = SimpleNamespace(adapter=adapter, options=TrainOptions(), step=0, average=None, metadata={})
    path = save_adapter(train_state, tmp_path)
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    assert da.read_metadata(path)["adapter"]["seed"] == -1
    da.detach(adapter)
    loaded = da.load(model, path)
    assert loaded.num_parameters == adapter.num_parameters
    assert all(bool((value == before[name]).all()) for name, value in loaded.state_dict().items())


def fail(*_, **__):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("place", "name", "what"),
    [
        (SubjectReport, "metrics", "metrics: out of memory"),
        (Report, "_grid", "grid.png: out of memory"),
        (run_module, "write_formats", "export: out of memory"),
    ],
)
def test_a_failure_at_the_end_costs_itself_only(run, tmp_path, monkeypatch, capsys, place, name, what):
    monkeypatch.setattr(place, name, fail)
    assert run(extractor=tiny_clip(tmp_path / "clip")) == 1
    errors = capsys.readouterr().err
    assert what in errors
    assert f"the adapter is saved: {tmp_path / 'out'}/adapter.safetensors" in errors
    assert "--resume_from_checkpoint latest" in errors
    load_file(tmp_path / "out" / "adapter.safetensors")
    for file in ("README.md", "samples/after/subject-00.png", "checkpoint-2/state.json"):
        assert (tmp_path / "out" / file).exists()
    monkeypatch.undo()


def test_results_are_written_before_images_are_generated(run, tmp_path, monkeypatch, capsys):
    take = Report._generate_all

    def interrupted(report, when):
        if when == "after":
            raise KeyboardInterrupt
        take(report, when)

    with monkeypatch.context() as patched:
        patched.setattr(Report, "_generate_all", interrupted)
        assert run() == 130
    out = tmp_path / "out"
    assert f"the adapter is saved: {out}/adapter.safetensors" in capsys.readouterr().err
    for file in ("adapter.safetensors", "adapter_comfyui.safetensors", "run.json", "README.md"):
        assert (out / file).exists()
    assert run(resume_from_checkpoint="latest") == 0  # straight to the end
    assert (out / "grid.png").exists()


def test_ctrl_c_while_the_first_images_are_generated_ends_at_once(run, tmp_path, monkeypatch, capsys):
    def interrupted(report, when):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Report, "_generate_all", interrupted)
        assert run() == 130
    assert "Traceback" not in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))
    assert run() == 0  # the folder holds no results, so the same command begins again


def test_a_failing_validation_does_not_end_the_run(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Report, "validate", fail)
    assert run(validation_steps=1) == 1
    assert "validation at step 1: out of memory" in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "run.json").read_text(encoding="utf-8"))
    assert len(record["failures"]) == 2


def test_figures_that_are_not_finite_are_strict_json(run, tmp_path, monkeypatch):
    monkeypatch.setattr(SubjectReport, "metrics", lambda self: {"x": {"after": float("nan")}})
    assert run(extractor=tiny_clip(tmp_path / "clip")) == 0
    text = (tmp_path / "out" / "run.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=fail)["figures"]["x"]["after"] == "NaN"


def test_a_largest_norm_of_0_scales_nothing():
    free, clipped = (
        small_train_state(max_grad_norm=0, max_train_steps=2),
        small_train_state(max_train_steps=2),
    )
    huge = small_train_state(max_grad_norm=1e9, max_train_steps=2)
    for train_state in (free, clipped, huge):
        list(train(train_state, SmallBatches()))
    assert all((value == bits(huge)[name]).all() for name, value in bits(free).items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"checkpointing_steps": -1}, "--checkpointing_steps must be at least 0, got -1"),
        ({"learning_rate": float("inf")}, "--learning_rate must be a finite number, got inf"),
        ({"guidance_scale": float("nan")}, "--guidance_scale must be at least 0, got nan"),
        ({"guidance_scale": -1.0}, "--guidance_scale must be at least 0, got -1.0"),
        ({"snr_gamma": 0.0}, "--snr_gamma 0 gives every timestep no weight"),
        ({"ema_decay": 1.5}, "--ema_decay is a share between 0 and 1, got 1.5"),
        ({"seed": -(2**63) - 1}, "--seed must be at least"),
    ],
)
def test_values_without_a_sense_are_named(given, message):
    with pytest.raises(ValueError, match=message.replace("*", r"\*")):
        check_ranges(TrainOptions(**given))
