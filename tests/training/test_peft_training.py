"""A method of PEFT in the training script: it trains, resumes exactly and leaves our file."""

import json

import pytest
import torch
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from helpers.scripts import runner
from safetensors.torch import load_file

import diffadapt as da
from diffadapt.models.families import load_base

pytest.importorskip("peft")


@pytest.mark.slow
def test_the_script_trains_a_method_of_peft_and_resumes_it_exactly(monkeypatch, tmp_path):
    run = runner("dreambooth", monkeypatch)
    base, pictures = tiny_sd_pipeline(tmp_path / "base"), write_pictures(tmp_path / "pictures")
    fixed = (
        *("--pretrained_model_name_or_path", base, "--instance_data_dir", pictures),
        *("--instance_prompt", "a photo of sks dog", "--adapter", "peft:OFT(r=2, oft_block_size=0)"),
        *("--resolution", 32, "--train_batch_size", 1, "--targets", "attention", "--mixed_precision", "no"),
        *("--num_validation_images", 0, "--learning_rate", 1e-2, "--checkpointing_steps", 2),
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(*fixed, "--max_train_steps", 4, "--output_dir", whole) == 0
    assert run(*fixed, "--max_train_steps", 2, "--output_dir", parts) == 0
    assert (
        run(*fixed, "--max_train_steps", 4, "--output_dir", parts, "--resume_from_checkpoint", "latest") == 0
    )
    first, second = (load_file(folder / "adapter.safetensors") for folder in (whole, parts))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    adapter = da.load(load_base(str(base)).pipe, whole / "adapter.safetensors")
    assert any(parameter.abs().max() > 0 for parameter in adapter.parameters())
    assert json.loads((whole / "run.json").read_text(encoding="utf-8"))
