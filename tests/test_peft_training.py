"""A method of PEFT in the training script: it trains, resumes exactly and leaves our file."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from pipelines import tiny_sd_pipeline, write_pictures
from safetensors.torch import load_file

import diffadapt as da
from diffadapt.models.families import load_base

pytest.importorskip("peft")
SCRIPT = Path(__file__).parents[1] / "train_scripts" / "dreambooth.py"


@pytest.fixture
def run(monkeypatch):
    """Runs the script in this process. Returns its exit code."""
    spec = importlib.util.spec_from_file_location("dreambooth", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "dreambooth", module)
    spec.loader.exec_module(module)

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["dreambooth.py", *map(str, arguments)])
        return module.main()

    return start


def test_the_script_trains_a_method_of_peft_and_resumes_it_exactly(run, tmp_path):
    base, pictures = tiny_sd_pipeline(tmp_path / "base"), write_pictures(tmp_path / "pictures")
    fixed = (
        *("--pretrained_model_name_or_path", base, "--instance_data_dir", pictures),
        *("--instance_prompt", "a photo of sks dog", "--adapter", "peft:OFT(r=2, oft_block_size=0)"),
        *("--resolution", 32, "--train_batch_size", 1, "--targets", "attention", "--mixed_precision", "no"),
        *("--num_validation_images", 0, "--learning_rate", 1e-2, "--checkpointing_steps", 2),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*fixed, "--max_train_steps", 4, "--output_dir", whole) in (0, None)
    assert run(*fixed, "--max_train_steps", 2, "--output_dir", parts) in (0, None)
    assert run(
        *fixed, "--max_train_steps", 4, "--output_dir", parts, "--resume_from_checkpoint", "latest"
    ) in (0, None)
    first, second = (load_file(folder / "adapter.safetensors") for folder in (whole, parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    adapter = da.load(load_base(str(base)).pipe, whole / "adapter.safetensors")
    assert any(parameter.abs().max() > 0 for parameter in adapter.parameters())
    assert json.loads((whole / "run.json").read_text())
