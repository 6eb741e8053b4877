"""A base spread over two processes trains as a whole one does, and leaves the same."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from helpers.scripts import FOLDER
from helpers.torchrun import run_torchrun
from PIL import Image
from safetensors.torch import load_file

import diffadapt as da
from diffadapt.models.families import load_base
from diffadapt.training.sharding import check_processes


def test_one_process_has_nothing_to_spread_over():
    with pytest.raises(ValueError, match=r"--num_processes N"):
        check_processes(Accelerator(cpu=True), shard_base=True)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "FSDP"])
def test_what_shards_trained_tensors_is_refused(kind):
    accelerator = SimpleNamespace(distributed_type=DistributedType[kind], num_processes=2)
    with pytest.raises(ValueError, match=f"{kind}.*--shard_base"):
        check_processes(accelerator, shard_base=False)


@pytest.mark.slow
def test_a_sharded_base_trains_as_a_whole_one(tmp_path):
    base = tiny_sd_pipeline(tmp_path / "base", vae="kl")
    pictures = write_pictures(tmp_path / "mine", 5)
    options = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": pictures,
        "instance_prompt": "a sks dog",
        "adapter": "1lora+lora(rank=2)",
        "targets": "attention+conv",
        "optimizer": "SGD",
        "learning_rate": 0.05,
        "max_train_steps": 3,
        "validation_steps": 2,
        "checkpointing_steps": 2,
        "num_validation_images": 2,
        "num_inference_steps": 2,
        "train_batch_size": 2,
        "num_threads": 1,
    }
    told = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    runs = {"whole": (), "sharded": ("--shard_base",), "offloaded": ("--offload_blocks", "2")}
    for name, further in runs.items():
        run_torchrun(FOLDER / "dreambooth.py", *told, "--output_dir", tmp_path / name, *further)
    files = [tmp_path / name / "adapter.safetensors" for name in ("whole", "sharded")]
    whole, sharded = (load_file(file) for file in files)
    assert whole.keys() == sharded.keys()
    for name, value in whole.items():
        assert torch.allclose(value, sharded[name], rtol=1e-5, atol=1e-7), name
    offloaded = load_file(tmp_path / "offloaded" / "adapter.safetensors")
    assert offloaded.keys() == whole.keys()
    assert all(torch.allclose(offloaded[name], whole[name], rtol=1e-5, atol=1e-7) for name in whole)
    assert da.load(load_base(str(base)).pipe, files[1], strict_base=True).num_parameters
    for kept in ("grid.png", "run.json", "validation/step-2/sheet.png", "checkpoint-2/state.json"):
        assert (tmp_path / "sharded" / kept).is_file(), kept
    grids = [Image.open(tmp_path / name / "samples/after/subject-00.png") for name in ("whole", "sharded")]
    assert max(abs(a - b) for a, b in zip(*(g.tobytes() for g in grids), strict=True)) <= 1
    steps = [
        json.loads(line)
        for line in (tmp_path / "sharded" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [step["step"] for step in steps if "loss" in step] == [1, 2, 3]
