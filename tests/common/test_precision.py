"""One decision on precision: the option, then the launcher, then what is fast on the machine."""

import pytest
import torch
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from helpers.scripts import runner

import diffadapt as da
from diffadapt.cli.main import main as diffadapt
from diffadapt.common import precision
from diffadapt.common.precision import Machine, cpu_has_bf16, resolve_precision, sampling_precision
from diffadapt.models.families import load_base, profiles

OLD_CPU = Machine("cpu", has_bf16=False)
NEW_CPU = Machine("cpu", has_bf16=True)
OLD_GPU = Machine("cuda", has_bf16=False)
NEW_GPU = Machine("cuda", has_bf16=True)
APPLE = Machine("mps", has_bf16=True)


@pytest.mark.parametrize(
    ("machine", "preferred", "name"),
    [
        (OLD_CPU, "bf16", "no"),
        (NEW_CPU, "bf16", "bf16"),
        (OLD_GPU, "bf16", "fp16"),
        (NEW_GPU, "bf16", "bf16"),
        (APPLE, "bf16", "no"),
        (OLD_CPU, "fp16", "no"),
        (NEW_CPU, "fp16", "no"),
        (NEW_GPU, "fp16", "fp16"),
        (NEW_GPU, "no", "no"),
    ],
)
def test_what_is_preferred_is_used_where_it_is_fast(machine, preferred, name):
    for launcher in (None, "no"):  # "no" is what accelerate launch exports where nobody chose
        choice = resolve_precision(machine, None, launcher, preferred=preferred)
        assert choice.name == name
        assert choice.reason
        assert choice.notices == ()


@pytest.mark.parametrize("name", ["no", "fp16", "bf16"])
def test_an_option_is_obeyed(name):
    assert resolve_precision(NEW_GPU, name, None, preferred="no").name == name


def test_the_launcher_counts_where_no_option_is_given():
    assert resolve_precision(NEW_CPU, None, "bf16", preferred="no").name == "bf16"
    assert resolve_precision(NEW_GPU, None, "fp16", preferred="bf16").name == "fp16"
    assert "accelerate launch" in resolve_precision(NEW_CPU, None, "bf16", preferred="no").reason


def test_an_option_against_the_launcher_wins_with_a_notice():
    choice = resolve_precision(NEW_CPU, "no", "bf16", preferred="bf16")
    assert choice.name == "no"
    assert choice.notices == ("--mixed_precision no is used, not the bf16 of accelerate launch",)


@pytest.mark.parametrize(
    ("option", "launcher", "source"),
    [("bf16", None, "--mixed_precision"), (None, "bf16", "accelerate launch --mixed_precision")],
)
def test_bf16_where_it_is_slow_is_obeyed_with_its_factor(option, launcher, source):
    choice = resolve_precision(OLD_CPU, option, launcher, preferred="no")
    assert choice.name == "bf16"
    (notice,) = choice.notices
    assert notice.startswith(f"{source} bf16: ")
    assert "10 times as long" in notice
    (notice,) = resolve_precision(OLD_GPU, option, launcher, preferred="no").notices
    assert "--mixed_precision fp16 is faster" in notice


@pytest.mark.parametrize(("option", "launcher"), [("fp16", None), (None, "fp16")])
def test_fp16_on_a_cpu_is_refused(option, launcher):
    with pytest.raises(ValueError, match="fp16 needs a GPU; on a CPU use bf16 or no"):
        resolve_precision(NEW_CPU, option, launcher, preferred="no")


def test_a_precision_of_the_launcher_that_is_not_supported_is_refused():
    with pytest.raises(ValueError, match="fp8 is not supported; give --mixed_precision"):
        resolve_precision(NEW_GPU, None, "fp8", preferred="no")


@pytest.mark.parametrize(
    ("architecture", "features", "environment", "expected"),
    [
        ("x86_64", {"avx512_bf16": True}, {}, True),
        ("x86_64", {"amx_bf16": True}, {}, True),
        ("x86_64", {"avx512_f": True, "avx2": True}, {}, False),  # emulated
        ("AMD64", {"avx2": True}, {}, False),
        ("x86_64", {"amx_bf16": True}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        ("x86_64", {"amx_bf16": True}, {"DNNL_MAX_CPU_ISA": "avx512_core"}, False),
        ("x86_64", {"avx512_bf16": True}, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, True),
        ("aarch64", {"bf16": True}, {}, True),
        ("arm64", {"neon": True}, {}, False),
    ],
)
def test_native_bf16_of_a_cpu(monkeypatch, architecture, features, environment, expected):
    monkeypatch.setattr(precision.platform, "machine", lambda: architecture)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert cpu_has_bf16(features, environment) is expected


def test_features_of_this_cpu_are_known_under_the_names_that_are_asked_for():
    if not hasattr(torch.cpu, "get_capabilities"):
        pytest.skip("torch tells no features")
    kind = "arm" if precision.platform.machine() in ("arm64", "aarch64") else "x86"
    assert set(precision.BF16_FEATURES[kind]) & torch.cpu.get_capabilities().keys()


def test_sampling_takes_half_precision_on_a_gpu_alone(monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert sampling_precision(None, torch.device("cpu")).name == "no"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert sampling_precision(None, torch.device("cuda")).name == "fp16"


@pytest.mark.parametrize(("machine", "dtype"), [(OLD_CPU, torch.float32), (NEW_CPU, torch.bfloat16)])
def test_pretraining_autocasts_where_bf16_is_native(monkeypatch, machine, dtype):
    monkeypatch.setattr(precision, "_machine", lambda device: machine)
    with precision.fast_autocast(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_every_family_prefers_a_precision():
    assert {profile.defaults["preferred_precision"] for profile in profiles().values()} <= {"no", "bf16"}


def test_the_summary_says_what_was_chosen_and_why(tmp_path, monkeypatch, capsys):
    fixed = [
        *("--pretrained_model_name_or_path", tiny_sd_pipeline(tmp_path / "base")),
        *("--instance_data_dir", write_pictures(tmp_path / "images", 2), "--instance_prompt", "a sks dog"),
        *("--output_dir", tmp_path / "out", "--num_threads", 1, "--dry_run"),
    ]
    run = runner("dreambooth", monkeypatch)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    assert run(*fixed) == 0
    assert "cpu with 1 threads, mixed precision: no (default of this base)" in capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    monkeypatch.setattr(precision, "_machine", lambda device: OLD_CPU)
    assert run(*fixed) == 0
    printed = capsys.readouterr().out
    assert "mixed precision: bf16 (asked for by accelerate launch --mixed_precision)" in printed
    assert "emulates bf16; a step takes about 10 times as long" in printed
    assert "x accumulation 3 x" in printed
    assert run(*fixed, "--mixed_precision", "no", "--gradient_accumulation_steps", 2) == 0
    printed = capsys.readouterr().out
    assert "--mixed_precision no is used, not the bf16 of accelerate launch" in printed
    assert "--gradient_accumulation_steps 2 is used, not the launcher's 3" in printed
    assert "x accumulation 2 x" in printed


def test_sampling_says_that_bf16_is_slow(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(precision, "_machine", lambda device: OLD_CPU)
    command = ["sample", "--base", str(tiny_sd_pipeline(tmp_path / "base")), "--prompt", "a dog"]
    command += ["--num_inference_steps", "1", "--out", str(tmp_path / "out"), "--num_threads", "1"]

    pipe = load_base(str(tmp_path / "base")).pipe
    adapter = da.attach(pipe, da.LoRA(rank=2), "attention")
    da.save(adapter, tmp_path / "a.safetensors", base=str(tmp_path / "base"))
    command += ["--adapter", str(tmp_path / "a.safetensors"), "--num_images", "1"]
    assert diffadapt([*command, "--mixed_precision", "bf16"]) == 0
    assert "10 times as long" in capsys.readouterr().out
