"""A merged pipeline opens in stock diffusers and draws what the live adapter draws."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers.tiny_models import TEXT_LAYERS, latents, open_pipeline, sd_folder, sdxl_folder, trained

import diffadapt as da


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {"sd": sd_folder(folder), "sdxl": sdxl_folder(folder)}


@pytest.mark.parametrize(
    ("base", "method", "layers"),
    [
        ("sd", "liera(rank=2, order=exp)", None),
        ("sd", "dora(rank=2)+bitfit", None),
        ("sd", "norms", "norm"),
        ("sdxl", "flora(rank=3)", None),
    ],
)
@pytest.mark.slow
def test_the_merged_pipeline_draws_the_same_latents(base, method, layers, folders, tmp_path):
    pipe = open_pipeline(folders[base])
    bare = latents(pipe)
    adapter = trained(pipe, method, layers=layers, text="norm" if method == "norms" else TEXT_LAYERS)
    expected = latents(pipe)
    report = da.export(adapter, tmp_path / base, to="merged")
    assert torch.equal(latents(pipe), expected), "exporting must not change the live pipeline"
    drawn = latents(open_pipeline(tmp_path / base))
    assert (expected - bare).abs().max() > 1e-3
    assert (drawn - expected).abs().max() < 1e-4
    assert report.verdict("diffusers").status == "exact"
    assert report.lost_in_rounding == 0
    assert json.loads((tmp_path / base / "diffadapt.json").read_text(encoding="utf-8"))["diffadapt.method"]


def test_half_precision_tells_the_share_lost_to_rounding(folders, tmp_path):
    pipe = open_pipeline(folders["sd"])
    adapter = trained(pipe, "lora(rank=2)", size=0.02)
    report = da.export(adapter, tmp_path / "half", to="merged", dtype="bfloat16")
    weight = adapter.adapted_weight("unet.conv_in")
    assert 0 < report.lost_in_rounding < 1
    assert f"{report.lost_in_rounding:.2%} of the change is lost to rounding" in str(report)
    opened = UNet2DConditionModel.from_pretrained(tmp_path / "half" / "unet", dtype=torch.bfloat16)
    assert torch.equal(opened.conv_in.weight, weight.bfloat16())


def test_a_bare_model_is_written_alone(folders, tmp_path):
    unet = UNet2DConditionModel.from_pretrained(folders["sd"] / "unet")
    adapter = trained(unet, "lora(rank=2)", text=None)
    da.export(adapter, tmp_path / "unet", to="merged")
    opened = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    assert torch.equal(opened.conv_in.weight, adapter.adapted_weight("conv_in"))


def test_a_bias_the_stock_layers_lack_is_refused(folders, tmp_path):
    adapter = trained(open_pipeline(folders["sd"]), "difffit", text=None)
    with pytest.raises(ValueError, match="gain a bias"):
        da.export(adapter, tmp_path / "merged", to="merged")
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_things_is_left_alone(folders, tmp_path):
    pipe = open_pipeline(folders["sd"])
    adapter = trained(pipe, "lora(rank=2)", layers="qv", text=None)
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="already exists"):
        da.export(adapter, tmp_path, to="merged")
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"
    da.export(adapter, tmp_path, to="merged", force=True)
    assert (tmp_path / "model_index.json").is_file()
    assert not (tmp_path / "notes.txt").exists()
