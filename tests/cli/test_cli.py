"""The command line: every subcommand, and what it says when something is wrong."""

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.pipelines import tiny_sd_pipeline
from PIL import Image

import diffadapt as da
from diffadapt.cli.main import COMMANDS, EPILOG, main
from diffadapt.models.families import load_base
from diffadapt.models.sampling_columns import AdapterFile, parse_adapter_spec


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A base and two adapters that change it visibly."""
    folder = tmp_path_factory.mktemp("work")
    base = tiny_sd_pipeline(folder / "base")
    for seed, name in enumerate(("one", "two")):
        pipe = load_base(str(base)).pipe
        adapter = da.attach(pipe, da.make_method("lora", rank=2), targets="attention+conv", seed=seed)
        torch.manual_seed(seed)
        for parameter in adapter.parameters():
            parameter.data.add_(0.05 * torch.randn_like(parameter))
        da.save(adapter, folder / f"{name}.safetensors", base=str(base), metadata={"steps": "3"})
    return folder


def sample(work, out, *arguments):
    fixed = ["--prompt", "a dog", "--num_inference_steps", "3", "--out", str(out)]
    assert main(["sample", *fixed, *map(str, arguments)]) == 0
    return [np.asarray(Image.open(path)).astype(int) for path in sorted(out.glob("0*.png"))]


def test_sample_writes_images_a_sheet_and_how_to_make_them_again(work, tmp_path, capsys):
    images = sample(work, tmp_path, "--adapter", work / "one.safetensors", "--num_images", 3, "--seed", 5)
    record = json.loads((tmp_path / "sample.json").read_text(encoding="utf-8"))
    assert len(images) == 3
    assert [image["seed"] for image in record["images"]] == [5, 6, 7]
    assert record["base"] == str(work / "base")
    assert Image.open(tmp_path / "sheet.png").width > 500
    assert "3 images" in capsys.readouterr().out


def test_batch_size_changes_no_image(work, tmp_path):
    adapter = ("--adapter", work / "one.safetensors", "--num_images", 3)
    one = sample(work, tmp_path / "1", *adapter, "--batch_size", 1)
    three = sample(work, tmp_path / "3", *adapter, "--batch_size", 3)
    assert max(abs(a - b).max() for a, b in zip(one, three, strict=True)) <= 2


@pytest.mark.slow
def test_adapters_stack_and_strength_weakens(work, tmp_path):
    one, two = work / "one.safetensors", work / "two.safetensors"

    def first(name, *arguments):
        return sample(work, tmp_path / name, "--num_images", 1, *arguments)[0]

    only_one = first("a", "--adapter", one)
    both = first("b", "--adapter", one, "--adapter", two)
    one_and_nothing = first("c", "--adapter", one, "--adapter", f"{two}:0")
    none = first("d", "--adapter", one, "--strength", 0)
    weak = first("e", "--adapter", f"{one}:0.3")
    assert (only_one == one_and_nothing).all()
    assert abs(only_one - both).max() > 2
    assert 0 < abs(weak - none).mean() < abs(only_one - none).mean()


def test_a_strength_is_read_off_the_end_of_a_file_name(tmp_path):
    odd = tmp_path / "a:1"
    odd.touch()
    assert parse_adapter_spec("a.safetensors:0.5", strength=1) == AdapterFile("a.safetensors", 0.5)
    assert parse_adapter_spec("a.safetensors", strength=0.7) == AdapterFile("a.safetensors", 0.7)
    assert parse_adapter_spec(str(odd), strength=1) == AdapterFile(str(odd), 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "nowhere.safetensors"], "no adapter file at nowhere.safetensors"),
        (["--adapter", "{work}/one.safetensors", "--base", "./nowhere"], "no base model at './nowhere'"),
        (["--adapter", "{work}/one.safetensors", "--scheduler", "eular"], "unknown scheduler 'eular'"),
        (
            ["--adapter", "{work}/one.safetensors", "--num_images", "0"],
            "--num_images must be at least 1, got 0",
        ),
        (["--seed", str(2**63)], "--seed must be at least -2**63 and below 2**63, got 9223372036854775808"),
        (["--num_inference_steps", "0"], "--num_inference_steps must be at least 1, got 0"),
        (["--batch_size", "0"], "--batch_size must be at least 1, got 0"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(work, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.delenv("DIFFADAPT_DEBUG", raising=False)
    arguments = [argument.format(work=work) for argument in arguments]
    fixed = ["--prompt", "a", "--out", str(tmp_path)]
    if "--adapter" not in arguments:
        fixed += ["--adapter", f"{work}/one.safetensors"]
    assert main(["sample", *fixed, *arguments]) == 2
    errors = capsys.readouterr().err
    assert f"error: {message}" in errors
    assert "Traceback" not in errors


def test_methods_lists_every_method_with_its_options(capsys):
    assert main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in da.METHODS)
    assert "kernel_rank=2" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_ends_with_an_example_that_it_accepts(capsys, monkeypatch, command):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"example:\n  {COMMANDS[command].example}" in capsys.readouterr().out
    accepted = []
    monkeypatch.setitem(COMMANDS, command, replace(COMMANDS[command], run=accepted.append))
    examples = [COMMANDS[command].example]
    examples += [line.strip() for line in EPILOG.splitlines() if line.startswith(f"  diffadapt {command} ")]
    for example in examples:
        main(shlex.split(example)[1:])
    assert len(accepted) == len(examples)


def test_info_shows_what_a_file_holds(work, capsys):
    assert main(["info", str(work / "one.safetensors")]) == 0
    shown = capsys.readouterr().out
    assert "lora" in shown
    assert str(work / "base") in shown
    assert main(["info", "--json", str(work / "one.safetensors")]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 3


@pytest.mark.slow
def test_importing_the_package_is_light_and_large_tensors_then_come_in_large_pages():
    program = """
import sys, diffadapt.cli
print({'diffusers', 'transformers', 'accelerate', 'datasets'} & set(sys.modules))
import torch
kept = torch.ones(1 << 24)  # 64 MB
print(next(line for line in open('/proc/self/smaps_rollup') if 'AnonHugePages' in line).split()[1])
"""
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8", check=True
    )
    loaded, huge = told.stdout.split()
    assert loaded == "set()"
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if setting.exists() and "[never]" not in setting.read_text(encoding="utf-8"):
        assert int(huge) > 60_000  # kB
