"""`diffadapt sample` in use, and adapted pipelines under the stock features of diffusers."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline, EulerDiscreteScheduler
from helpers.class_pipelines import dit_pipeline
from helpers.pipelines import tiny_sd_pipeline
from PIL import Image

import diffadapt as da
from diffadapt.cli.main import main
from diffadapt.models.families import load_base
from diffadapt.models.sampling_columns import AdapterFile, make_columns, parse_strengths
from diffadapt.models.sampling_options import read_prompts

pytestmark = pytest.mark.slow


def adapted(base, seed=0, size=0.05):
    pipe = load_base(str(base)).pipe
    adapter = da.attach(pipe, da.make_method("lora", rank=2), targets="attention+conv", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data.add_(size * torch.randn(parameter.shape, generator=generator))
    return pipe, adapter


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    base = tiny_sd_pipeline(folder / "base")
    for seed, name in enumerate(("one", "two")):
        _, adapter = adapted(base, seed)
        da.save(adapter, folder / f"{name}.safetensors", base=str(base))
    return folder


def sample(out, *arguments, prompt=("--prompt", "a dog")):
    fixed = [*prompt, "--num_inference_steps", "2", "--num_images", "1", "--out", str(out)]
    assert main(["sample", *fixed, *map(str, arguments)]) == 0
    record = json.loads((out / "sample.json").read_text(encoding="utf-8"))
    pictures = [np.asarray(Image.open(out / row["file"])).astype(int) for row in record["images"]]
    return record, pictures


def test_a_grid_over_strengths_goes_from_the_base_on(work, tmp_path):
    one = work / "one.safetensors"
    record, pictures = sample(tmp_path / "grid", "--adapter", one, "--strength", "0,0.5,1", "--compare")
    assert [row["look"] for row in record["images"]] == ["base", "one 0", "one 0.5", "one 1"]
    assert (pictures[0] == pictures[1]).all()
    assert 0 < abs(pictures[2] - pictures[0]).mean() < abs(pictures[3] - pictures[0]).mean()
    assert len({row["seed"] for row in record["images"]}) == 1
    _, alone = sample(tmp_path / "alone", "--adapter", one)
    assert (alone[0] == pictures[3]).all()


def test_adapters_side_by_side_are_each_alone(work, tmp_path):
    one, two = work / "one.safetensors", work / "two.safetensors"
    both = ("--adapter", one, "--adapter", f"{two}:0.5")
    record, pictures = sample(tmp_path / "grid", *both, "--grid_adapters")
    assert [row["look"] for row in record["images"]] == ["one 1", "two 0.5"]
    _, first = sample(tmp_path / "1", "--adapter", one)
    _, second = sample(tmp_path / "2", "--adapter", f"{two}:0.5")
    assert (first[0] == pictures[0]).all()
    assert (second[0] == pictures[1]).all()


def test_a_file_written_for_comfyui_draws_the_same_and_names_its_base(work, tmp_path):
    asked = ["export", work / "one.safetensors", tmp_path / "one_comfyui.safetensors", "--to", "kohya"]
    assert main([str(word) for word in asked]) == 0
    _, ours = sample(tmp_path / "ours", "--adapter", work / "one.safetensors")
    record, theirs = sample(tmp_path / "theirs", "--adapter", tmp_path / "one_comfyui.safetensors")
    assert record["base"] == str(work / "base")
    assert np.abs(ours[0] - theirs[0]).max() <= 1


def test_prompts_come_from_a_file(work, tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\n\n# a remark\n a red house \n", encoding="utf-8")
    chosen = ("--prompts_file", tmp_path / "prompts.txt")
    record, _ = sample(tmp_path / "out", "--adapter", work / "one.safetensors", *chosen)
    assert [row["prompt"] for row in record["images"]] == ["a dog", "a cat", "a red house"]


def test_the_record_is_enough_to_make_the_images_again(work, tmp_path):
    record, pictures = sample(tmp_path / "a", "--adapter", f"{work / 'one.safetensors'}:0.7", "--seed", 4)
    sampler = record["sampler"]
    again = ["--base", record["base"], "--guidance_scale", sampler["guidance_scale"]]
    row = record["adapters"][0]
    _, same = sample(
        tmp_path / "b",
        *again,
        *("--adapter", f"{row['path']}:{row['strength']}", "--seed", record["images"][0]["seed"]),
        prompt=("--prompt", record["images"][0]["prompt"]),
    )
    assert (same[0] == pictures[0]).all()
    assert {"torch", "diffusers", "transformers", "diffadapt"} <= set(record["versions"])
    assert record["adapters"][0]["sha256"] == da.read_metadata(work / "one.safetensors")["sha256"]
    assert record["scheduler"]["class"] == "DDIMScheduler"


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    dit_pipeline(folder / "base")
    pipe = DiTPipeline.from_pretrained(folder / "base")
    adapter = da.attach(pipe, da.make_method("lora", rank=2), "attention")
    for parameter in adapter.parameters():
        parameter.data.add_(0.5)
    da.save(adapter, folder / "dit.safetensors", base=str(folder / "base"))
    return folder


def test_a_base_of_classes_draws_the_labels(classes, tmp_path):
    labels = ("--class_labels", "3,7")
    record, pictures = sample(
        tmp_path, "--adapter", classes / "dit.safetensors", "--compare", "--guidance_scale", 2, prompt=labels
    )
    assert [row["label"] for row in record["images"]] == [3, 7, 3, 7]
    assert record["pipeline"] == "DiTPipeline"
    assert abs(pictures[0] - pictures[2]).max() > 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strength", "0,much"], "--strength is a number"),
        (["--class_labels", "3"], "give prompts or --class_labels"),
        (["--prompts_file", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_end_with_one_line(work, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.delenv("DIFFADAPT_DEBUG", raising=False)
    fixed = ["--adapter", str(work / "one.safetensors"), "--prompt", "a", "--out", str(tmp_path)]
    assert main(["sample", *fixed, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_base_of_words_takes_no_labels(work, tmp_path, capsys):
    fixed = ["--adapter", str(work / "one.safetensors"), "--out", str(tmp_path)]
    assert main(["sample", *fixed, "--class_labels", "3", "--num_inference_steps", "1"]) == 2
    assert "takes no class labels" in capsys.readouterr().err


def test_several_strengths_need_an_adapter_without_its_own():
    with pytest.raises(ValueError, match="own :STRENGTH"):
        make_columns([AdapterFile("a", 1.0)], parse_strengths("0,1"), side_by_side=False, with_base=False)


def test_a_single_checkpoint_file_without_its_configuration_says_what_to_do(work, tmp_path, capsys):
    from safetensors.torch import save_file

    checkpoint = tmp_path / "model.safetensors"
    encoder = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    unet = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({unet: torch.zeros(8, 4, 3, 3), encoder: torch.zeros(8)}, checkpoint)
    fixed = ["--adapter", str(work / "one.safetensors"), "--prompt", "a", "--out", str(tmp_path)]
    assert main(["sample", *fixed, "--base", str(checkpoint)]) == 2
    assert "without a network" in capsys.readouterr().err
    assert main(["sample", *fixed, "--base", str(tmp_path / "no.safetensors")]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


# an adapted pipeline keeps every stock feature


@torch.no_grad()
def drawn(pipe, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe("a dog", num_inference_steps=2, generator=generator, output_type="latent", **options).images


def test_save_pretrained_writes_the_bare_base(work, tmp_path):
    pipe, _ = adapted(work / "base")
    pipe.save_pretrained(tmp_path)
    saved, bare = load_base(str(tmp_path)).pipe, load_base(str(work / "base")).pipe
    assert torch.equal(drawn(saved), drawn(bare))
    assert saved.unet.state_dict().keys() == bare.unet.state_dict().keys()


def test_schedulers_can_be_exchanged(work):
    pipe, adapter = adapted(work / "base")
    before = drawn(pipe)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    live = drawn(pipe)
    assert not torch.equal(live, before)
    da.merge(adapter)
    assert torch.allclose(drawn(pipe), live, atol=1e-3)


def test_accelerates_offload_hooks_may_be_attached_after(work):
    from accelerate import cpu_offload, cpu_offload_with_hook
    from accelerate.hooks import remove_hook_from_module

    pipe, _ = adapted(work / "base")
    live = drawn(pipe)
    _, hook = cpu_offload_with_hook(pipe.unet, "cpu")
    assert torch.equal(drawn(pipe), live)
    hook.offload()
    remove_hook_from_module(pipe.unet, recurse=True)
    cpu_offload(pipe.unet, "cpu")
    assert torch.allclose(drawn(pipe), live, atol=1e-5)


def test_a_compiled_denoiser_is_adapted(work):
    pipe, _ = adapted(work / "base")
    live = drawn(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert torch.allclose(drawn(pipe), live, atol=1e-5)


def test_the_pipeline_moves_and_changes_precision_with_its_adapter(work):
    pipe, adapter = adapted(work / "base")
    pipe.unet.to(torch.bfloat16)
    assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())
    sample, states = torch.randn(1, 4, 8, 8).bfloat16(), torch.randn(1, 5, 32).bfloat16()
    with torch.no_grad():
        assert pipe.unet(sample, 3, states).sample.isfinite().all()


def test_slicing_and_tiling_still_work(work):
    pipe, _ = adapted(work / "base")
    live = drawn(pipe)
    pipe.enable_attention_slicing()
    assert torch.allclose(drawn(pipe), live, atol=1e-4)


def test_prompts_in_a_file_are_lines_and_remarks(tmp_path):
    text = "\ufeffa red\u2028square\n# a remark\n\n\\#tag on white\r\n a\x85disc \n"
    (tmp_path / "prompts.txt").write_bytes(text.encode())
    assert read_prompts(tmp_path / "prompts.txt") == ["a red square", "#tag on white", "a disc"]


def test_words_of_a_prompt_that_are_not_read_are_told(work, tmp_path, capsys):
    prompt = "a dog " * 80 + "zebra"
    sample(tmp_path / "long", "--adapter", work / "one.safetensors", prompt=("--prompt", prompt))
    told = capsys.readouterr().out
    assert "too long for the tokenizer, so not read" in told
    assert "zebra' of 'a dog" in told
    sample(tmp_path / "short", "--adapter", work / "one.safetensors")
    assert "not read" not in capsys.readouterr().out
