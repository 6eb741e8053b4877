"""Style transfer and class-conditional training: two real processes equal one at the same global batch."""

import json

import pytest
import torch
from helpers.class_pipelines import class_pipeline, write_classes
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from helpers.scripts import FOLDER, runner
from helpers.torchrun import run_torchrun
from safetensors.torch import load_file

STEPS = 20


def style(folder):
    """Options of a style run on five captioned pictures: a number that no batch divides."""
    pictures = write_pictures(folder / "pictures", 5)
    for picture in sorted(pictures.iterdir()):
        picture.with_suffix(".txt").write_text(f"a disc, {picture.stem}", encoding="utf-8")
    data = {"train_data_dir": pictures, "caption_dropout": 0.3, "resolution": 32}
    return {"pretrained_model_name_or_path": tiny_sd_pipeline(folder / "base", vae="kl"), **data}


def classes(folder):
    """Options of a class-conditional run on nine pictures of three classes."""
    pictures = write_classes(folder / "pictures", side=8)
    base = class_pipeline(folder / "base")
    return {"pretrained_model_name_or_path": base, "train_data_dir": pictures, "label_dropout": 0.3}


@pytest.mark.parametrize(("name", "make"), [("style_transfer", style), ("class_conditional", classes)])
@pytest.mark.slow
def test_two_processes_equal_one_at_the_same_global_batch(name, make, tmp_path, monkeypatch):
    shared = {
        **make(tmp_path),
        "adapter": "lora(rank=2)",
        "targets": "attention",
        "optimizer": "SGD",
        "learning_rate": 0.05,
        "lr_scheduler": "constant",
        "mixed_precision": "no",
        "max_train_steps": STEPS,
        "num_validation_images": 0,
        "export_formats": "none",
        "num_threads": 1,
    }
    told = [part for option, value in shared.items() for part in (f"--{option}", value)]
    one, two = tmp_path / "one", tmp_path / "two"
    assert runner(name, monkeypatch)(*told, "--train_batch_size", 4, "--output_dir", one) == 0
    run_torchrun(FOLDER / f"{name}.py", *told, "--train_batch_size", 2, "--output_dir", two)
    logs = [
        [json.loads(line) for line in (out / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        for out in (one, two)
    ]
    assert [step["images"] for step in logs[1]] == [4] * STEPS
    losses = [torch.tensor([step["loss"] for step in log]) for log in logs]
    assert torch.allclose(*losses, rtol=1e-5, atol=1e-6)
    weights = [load_file(out / "adapter.safetensors") for out in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    for key, value in weights[0].items():
        assert (value - weights[1][key]).abs().max() <= 1e-6 * value.abs().max().clamp(min=0.1), key
