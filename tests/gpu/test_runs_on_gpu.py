"""Training, resuming, offloading and scoring on a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.pipelines import write_pictures
from safetensors.torch import load_file

import diffadapt as da
from diffadapt.evaluation.features.extractors import load_extractor

ROOT = Path(__file__).parents[2]
DETERMINISTIC = (
    sys.executable,
    "-c",
    "import runpy, sys, torch; torch.use_deterministic_algorithms(True, warn_only=True); del sys.argv[0]; "
    "runpy.run_path(sys.argv[0], run_name='__main__')",
)
BASE = ("--pretrained_model_name_or_path", "embedded:emoji")


def run(command, *, device="cuda"):
    """Run a command on the GPU, or with all GPUs hidden; its output is the message when it fails."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [str(part) for part in command]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]


def train(output, *options, steps=30, launcher=(sys.executable,), device="cuda"):
    """A DreamBooth run in a process of its own. Returns the lines of its log."""
    fixed = ["--instance_data_dir", da.embedded("subjects/cat"), "--instance_prompt", "a sks cat face emoji"]
    fixed += ["--max_train_steps", steps, "--output_dir", output, "--export_formats", "none"]
    run([*launcher, ROOT / "train_scripts" / "dreambooth.py", *BASE, *fixed, *options], device=device)
    return [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(log):
    return [line["loss"] for line in log if "loss" in line]


def test_fp16_with_a_scaler_learns_and_draws(tmp_path):
    log = train(
        tmp_path / "out", "--mixed_precision", "fp16", "--adapter", "flora", "--num_validation_images", 2
    )
    values = losses(log)
    assert len(values) == 30
    assert sum(values[-5:]) < sum(values[:5])
    assert (tmp_path / "out" / "grid.png").is_file()
    weights = load_file(tmp_path / "out" / "adapter.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


@pytest.mark.parametrize("precision", ["no", "fp16", "bf16"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, precision):
    fixed = (
        "--mixed_precision",
        precision,
        "--adapter",
        "lora(rank=4, dropout=0.1)",
        "--num_validation_images",
        0,
    )
    train(tmp_path / "straight", *fixed, steps=12, launcher=DETERMINISTIC)
    stopped = ("--checkpointing_steps", 5, *fixed)
    train(tmp_path / "stopped", *stopped, steps=12, launcher=DETERMINISTIC)
    checkpoint = tmp_path / "stopped" / "checkpoint-5"
    again = ("--resume_from_checkpoint", checkpoint, *stopped)
    train(tmp_path / "resumed", *again, steps=12, launcher=DETERMINISTIC)
    expected = load_file(tmp_path / "straight" / "adapter.safetensors")
    for name in ("stopped", "resumed"):
        actual = load_file(tmp_path / name / "adapter.safetensors")
        assert actual.keys() == expected.keys()
        assert [key for key in expected if not torch.equal(actual[key], expected[key])] == []


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="pip install bitsandbytes")
def test_eight_bit_adamw_learns_like_adamw(tmp_path):
    fixed = ("--adapter", "lora", "--num_validation_images", 0, "--mixed_precision", "no")
    plain = losses(train(tmp_path / "plain", *fixed))
    eight_bit = losses(train(tmp_path / "eight", "--optimizer", "adamw8bit", *fixed))
    assert sum(eight_bit[-10:]) == pytest.approx(sum(plain[-10:]), rel=0.1)


def test_first_losses_are_the_cpus(tmp_path):
    fixed = ("--adapter", "flora", "--num_validation_images", 0, "--mixed_precision", "no")
    on_gpu = losses(train(tmp_path / "gpu", *fixed, steps=5))
    on_cpu = losses(train(tmp_path / "cpu", *fixed, steps=5, device="cpu"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)


def test_encoders_leave_the_gpu_while_training(tmp_path):
    """The text encoder and the autoencoder are in the machine's memory during steps."""
    from diffadapt.models.families import load_base
    from diffadapt.training.encoder_offload import offloaded, onloaded

    model = load_base("embedded:emoji", device=torch.device("cuda"), dtype=torch.float32)
    parts = [model.pipe.text_encoder, model.pipe.vae]
    size = sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    before = torch.cuda.memory_allocated()
    with offloaded(parts, torch.device("cuda")):
        assert before - torch.cuda.memory_allocated() >= 0.95 * size
        assert {p.device.type for part in parts for p in part.parameters()} == {"cpu"}
        with onloaded(parts, torch.device("cuda")):
            assert {p.device.type for part in parts for p in part.parameters()} == {"cuda"}
    assert {p.device.type for part in parts for p in part.parameters()} == {"cuda"}


def test_features_are_the_cpus(tmp_path):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 64, 64), generator=generator, dtype=torch.uint8)
    for name in ("embedded:clip", "embedded:digits"):
        on_cpu = load_extractor(name, device="cpu")(images)
        on_gpu = load_extractor(name, device="cuda")(images)
        for layer, expected in on_cpu.items():
            actual = on_gpu[layer].cpu()
            assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max(), (name, layer)


def test_scores_are_the_cpus(tmp_path):
    write_pictures(tmp_path / "generated", 12, size=(64, 64))
    scores = {}
    for device in ("cpu", "cuda"):
        output = tmp_path / f"{device}.json"
        command = [sys.executable, ROOT / "eval" / "image_quality.py", "--allow_small", "--no_intervals"]
        command += ["--generated", tmp_path / "generated", "--reference", "embedded:style/fluent3d/held_out"]
        run([*command, "--extractor", "embedded:clip", "--output", output], device=device)
        scores[device] = values(json.loads(output.read_text(encoding="utf-8")))
    assert scores["cpu"].keys() == scores["cuda"].keys()
    assert scores["cpu"]
    for name, expected in scores["cpu"].items():
        assert scores["cuda"][name] == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def values(record):
    """Name of a score -> its value."""
    return {score["name"]: score["value"] for score in record["scores"]}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_train_like_one(tmp_path):
    fixed = ("--adapter", "lora", "--num_validation_images", 0, "--mixed_precision", "no")
    single = losses(train(tmp_path / "one", "--train_batch_size", 4, *fixed, steps=10))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    double = losses(train(tmp_path / "two", "--train_batch_size", 2, *fixed, steps=10, launcher=launcher))
    assert double == pytest.approx(single, rel=1e-3)
