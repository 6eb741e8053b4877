"""`diffadapt export` and the formats training leaves beside an adapter."""

import pytest
import torch
from helpers.tiny_models import latents, open_pipeline, sd_folder, trained
from safetensors import safe_open

import diffadapt as da
from diffadapt.cli.main import main
from diffadapt.formats.export import parse_formats, write_formats

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sd_folder(tmp_path_factory.mktemp("pipelines"))


@pytest.fixture
def saved(folder, tmp_path):
    """An adapter file that names its base, and the latents it gives."""
    pipe = open_pipeline(folder)
    adapter = trained(pipe, "flora(rank=3)")
    da.save(adapter, tmp_path / "fox.safetensors", base=str(folder), metadata={"training": '{"steps": 3}'})
    return tmp_path / "fox.safetensors", latents(pipe)


def test_the_command_prints_who_reads_the_file_and_keeps_the_training_summary(saved, tmp_path, capsys):
    file, _ = saved
    assert main(["export", str(file), str(tmp_path / "fox_comfyui.safetensors"), "--to", "kohya"]) == 0
    printed = capsys.readouterr().out
    assert "ComfyUI 0.3.77: exact" in printed
    assert "accepted by ComfyUI, A1111, LyCORIS" in printed
    with safe_open(tmp_path / "fox_comfyui.safetensors", framework="pt") as opened:
        assert opened.metadata()["training"] == '{"steps": 3}'


def test_the_command_folds_the_strength_into_a_file_stock_diffusers_loads(saved, folder, tmp_path):
    file, _ = saved
    out = tmp_path / "fox_diffusers.safetensors"
    assert main(["export", str(file), str(out), "--to", "diffusers", "--strength", "0.5"]) == 0
    ours, stock = open_pipeline(folder), open_pipeline(folder)
    da.load(ours, file, strength=0.5)
    stock.load_lora_weights(out)
    assert (latents(stock) - latents(ours)).abs().max() < 1e-4


def test_the_command_writes_a_merged_pipeline(saved, tmp_path):
    file, expected = saved
    assert main(["export", str(file), str(tmp_path / "merged"), "--to", "merged"]) == 0
    assert (latents(open_pipeline(tmp_path / "merged")) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("method", ["flora(rank=3)", "dora(rank=2)", "loha(rank=2)", "lokr(rank=2)"])
@pytest.mark.slow
def test_files_of_other_tools_go_from_one_format_to_another(method, folder, tmp_path):
    pipe = open_pipeline(folder)
    adapter = trained(pipe, method)
    expected = latents(pipe)
    da.export(adapter, tmp_path / "kohya.safetensors", "kohya", dense="dora" in method)
    command = ["export", str(tmp_path / "kohya.safetensors"), str(tmp_path / "new.safetensors")]
    rank = ["--rank", "1000"] if "dora" in method else []
    assert main([*command, "--to", "diffusers", "--base", str(folder), *rank]) == 0
    stock = open_pipeline(folder)
    stock.load_lora_weights(tmp_path / "new.safetensors")
    assert (latents(stock) - expected).abs().max() < 1e-4


def test_mistakes_end_in_exit_code_2_without_a_file(saved, tmp_path, capsys):
    file, _ = saved
    assert main(["export", str(file), str(tmp_path / "fox.ckpt"), "--to", "kohya"]) == 2
    assert ".safetensors" in capsys.readouterr().err
    assert not (tmp_path / "fox.ckpt").exists()


def test_what_comfyui_passes_by_is_written_when_forced(folder, tmp_path, capsys):
    pipe = open_pipeline(folder)
    da.save(trained(pipe, "full", layers="conv_in", text="final_layer_norm"), tmp_path / "in.safetensors")
    command = ["export", str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors"), "--to", "kohya"]
    assert main([*command, "--base", str(folder)]) == 2
    assert "--force" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
    assert main([*command, "--base", str(folder), "--force"]) == 0
    assert "ComfyUI" not in capsys.readouterr().out.partition("accepted by")[2].splitlines()[0]
    assert (tmp_path / "out.safetensors").is_file()


def test_formats_are_written_beside_the_adapter_and_impossible_ones_are_explained(folder, tmp_path):
    pipe = open_pipeline(folder)
    adapter = trained(pipe, "liera(rank=2)")
    da.save(adapter, tmp_path / "fox.safetensors", base=str(folder), metadata={"steps": "3"})
    kohya, diffusers = write_formats(adapter, tmp_path / "fox.safetensors", "kohya,diffusers")
    assert "right in ComfyUI, A1111, LyCORIS" in kohya
    assert diffusers.startswith("no fox_diffusers.safetensors: ")
    assert {path.name for path in tmp_path.iterdir()} == {"fox.safetensors", "fox_comfyui.safetensors"}
    assert write_formats(adapter, tmp_path / "fox.safetensors", "none") == []
    with safe_open(tmp_path / "fox_comfyui.safetensors", framework="pt") as opened:
        assert opened.metadata()["steps"] == "3"
        assert opened.metadata()["diffadapt.base"] == str(folder)


def test_unknown_formats_are_named():
    assert parse_formats("kohya, merged") == ["kohya", "merged"]
    with pytest.raises(ValueError, match="did you mean kohya"):
        parse_formats("kohia")


def test_other_models_are_told_to_merge(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    adapter = da.attach(model, da.LoRA(rank=1), "linear")
    with pytest.raises(ValueError, match="use --to merged"):
        da.export(adapter, tmp_path / "file.safetensors")
