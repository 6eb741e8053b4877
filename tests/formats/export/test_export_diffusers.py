"""Stock diffusers loads the exported file and draws what diffadapt draws.

Both compute in float64, so that they differ by the rounding of the file's float32 alone.
"""

import pytest
import torch
from diffusers import DiTPipeline
from helpers.class_pipelines import dit_pipeline
from helpers.tiny_models import latents, open_pipeline, sd_folder, sdxl_folder, trained
from torch import Tensor

import diffadapt as da

EXACT = (
    "lora(rank=2)",
    "lora(rank=3, alpha=5, conv_reshape=loralib)",
    "flora(rank=3, rank_in=2, rank_out=5, scale=2)",
    "1lora",
    "vera(rank=4)",
    "mora(rank=2)",
    "pissa(rank=2)",
    "loha(rank=2, alpha=1)",
    "lokr(rank=2, scale=1.5)",
    "lokr(rank=9)",
    "superlora(rank=2, reshape=False)",
    "dora(rank=2, alpha=3)",
    "bitfit",
    "lora(rank=2)+bitfit",
    "lora(rank=2)+1lora",
    "difffit(norms=False, gamma=False)",
)
ON_SDXL = ("lora(rank=2)", "flora(rank=3, rank_in=2, rank_out=5, scale=2)", "dora(rank=2, alpha=3)", "bitfit")
WITH_RANK = ("liera(rank=2)", "liera(inner=dora)", "superlora(rank=2, projection=shuffle)", "full", "gamma")
REFUSED = {"norms": "norms", "difffit": "norms", "liera(rank=2, order=exp)": "--rank", "full": "--rank"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {"sd": sd_folder(folder), "sdxl": sdxl_folder(folder)}


@pytest.fixture(scope="module")
def pipes(folders):
    """For each base, one to adapt with diffadapt and one that stays stock."""
    return {name: two_pipelines(path) for name, path in folders.items()}


def two_pipelines(folder):
    return open_pipeline(folder, torch.float64), open_pipeline(folder, torch.float64)


def drawn_by_both(pipes, method, tmp_path, **options):
    """Latents of the bare model, of diffadapt and of stock diffusers with the exported file; the report."""
    ours, stock = pipes
    text = None if method == "norms" else "encoder.layers.0.self_attn.q_proj+encoder.layers.1.mlp.fc1"
    bare, adapter = latents(stock), trained(ours, method, text=text)
    try:
        report = da.export(adapter, tmp_path / "file.safetensors", to="diffusers", **options)
        expected = latents(ours)
    finally:
        da.detach(adapter)
    stock.load_lora_weights(tmp_path / "file.safetensors")
    try:
        return bare, expected, latents(stock), report
    finally:
        stock.unload_lora_weights()


def largest_difference(drawn: Tensor, expected: Tensor) -> float:
    """The largest difference of two latents, relative to the largest value."""
    assert drawn.dtype == expected.dtype == torch.float64
    return float((drawn - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    ("base", "method"),
    [*(("sd", method) for method in EXACT), *(("sdxl", method) for method in ON_SDXL)],  # there: its names
)
@pytest.mark.slow
def test_stock_diffusers_draws_the_same_latents(base, method, pipes, tmp_path):
    bare, expected, drawn, report = drawn_by_both(pipes[base], method, tmp_path)
    assert (expected - bare).abs().max() > 1e-2, "the adapter changes nothing that could be compared"
    assert largest_difference(drawn, expected) < 1e-6
    assert report.verdict("diffusers").status == "exact"


@pytest.mark.parametrize("method", WITH_RANK)
@pytest.mark.slow
def test_a_change_without_thin_factors_goes_through_at_a_rank_that_suffices(method, pipes, tmp_path):
    _, expected, drawn, report = drawn_by_both(pipes["sd"], method, tmp_path, rank=10_000)
    assert largest_difference(drawn, expected) < 1e-6
    assert report.rank_error == 0


def test_the_error_of_a_cut_is_told(pipes, tmp_path):
    bare, expected, drawn, report = drawn_by_both(pipes["sd"], "liera(rank=2)", tmp_path, rank=3)
    assert 0.05 < report.rank_error < 1
    assert (drawn - expected).abs().max() < (bare - expected).abs().max()
    assert f"{report.rank_error:.1%}" in str(report)
    assert report.verdict("diffusers").status == "approximate"


@pytest.mark.parametrize("method", REFUSED)
def test_what_diffusers_cannot_hold_is_refused_with_the_reason(method, pipes, tmp_path):
    ours, _ = pipes["sd"]
    layers = "mid_block.attentions.0.norm" if method == "norms" else "qv"
    adapter = trained(ours, method, text=None, layers=layers)
    try:
        with pytest.raises(ValueError, match=REFUSED[method]):
            da.export(adapter, tmp_path / "file.safetensors", to="diffusers")
    finally:
        da.detach(adapter)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("geometry", "reason"),
    [({"dilation": 2}, "dilation"), ({"padding_mode": "reflect"}, "padding mode"), ({"groups": 2}, "groups")],
)
def test_convolutions_that_peft_computes_otherwise_are_refused(geometry, reason, folders, tmp_path):
    pipe = open_pipeline(folders["sd"])
    pipe.unet.conv_in = torch.nn.Conv2d(4, 32, 3, padding=1, **geometry)
    adapter = trained(pipe, "lora(rank=2)", layers="conv_in", text=None)
    with pytest.raises(ValueError, match=reason):
        da.export(adapter, tmp_path / "file.safetensors", to="diffusers")


def test_a_pipeline_without_a_loader_is_refused(tmp_path):
    dit_pipeline(tmp_path / "base")
    pipe = DiTPipeline.from_pretrained(tmp_path / "base")
    adapter = trained(pipe, "lora(rank=2)", layers="attention", text=None)
    with pytest.raises(ValueError, match="diffusers has no load_lora_weights for DiTPipeline"):
        da.export(adapter, tmp_path / "file.safetensors", to="diffusers")
    assert not (tmp_path / "file.safetensors").exists()


def test_strength_is_folded_into_the_file(pipes, tmp_path):
    ours, stock = pipes["sd"]
    for method in ("flora(rank=3)", "dora(rank=2)"):
        adapter = trained(ours, method)
        adapter.strength = 0.4
        da.export(adapter, tmp_path / "file.safetensors", to="diffusers")
        expected = latents(ours)
        da.detach(adapter)
        stock.load_lora_weights(tmp_path / "file.safetensors")
        drawn = latents(stock)
        stock.unload_lora_weights()
        assert largest_difference(drawn, expected) < 1e-6


@pytest.mark.parametrize("method", ["flora(rank=4)", "dora(rank=4)", "1lora", "loha(rank=2)"])
@pytest.mark.slow
def test_the_embedded_base_draws_the_same_through_stock_diffusers(method, tmp_path):
    ours, stock = two_pipelines(da.embedded("emoji"))
    bare = latents(stock, height=64, width=64)
    adapter = trained(ours, method, layers="attention+conv", text=None, size=0.02)
    report = da.export(adapter, tmp_path / "file.safetensors", to="diffusers")
    stock.load_lora_weights(tmp_path / "file.safetensors")
    expected, drawn = (latents(pipe, height=64, width=64) for pipe in (ours, stock))
    assert (expected - bare).abs().max() > 1e-2
    assert largest_difference(drawn, expected) < 1e-6
    assert report.verdict("diffusers").status == "exact"
