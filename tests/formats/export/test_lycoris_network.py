"""LyCORIS' loader of whole networks on a stock pipeline: kohya's file draws what the live adapter draws."""

import pytest
import torch
from helpers.tiny_models import latents, open_pipeline, sd_folder, trained
from lycoris.kohya import LycorisNetworkKohya, create_network_from_weights
from torch import nn

import diffadapt as da


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sd_folder(tmp_path_factory.mktemp("pipelines"))


@pytest.mark.parametrize(
    "method", ["flora(rank=3, scale=2)", "loha(rank=2)", "lokr(rank=2)", "liera(rank=2)"]
)
@pytest.mark.slow
def test_the_network_draws_the_same_pictures(method, folder, tmp_path, monkeypatch):
    # its own choice of layers, made and thrown away before the file's, names some twice in this UNet
    monkeypatch.setattr(LycorisNetworkKohya, "UNET_TARGET_REPLACE_NAME", [])
    ours, stock = open_pipeline(folder), open_pipeline(folder)
    bare = latents(stock)
    adapter = trained(ours, method)
    da.export(adapter, tmp_path / "file.safetensors", "kohya")
    encoder = nn.ModuleDict({"text_model": stock.text_encoder})  # as transformers named it before version 5
    network, _ = create_network_from_weights(
        1.0, str(tmp_path / "file.safetensors"), None, encoder, stock.unet
    )
    assert len(network.unet_loras) + len(network.text_encoder_loras) == len(adapter.sites)
    network.apply_to(encoder, stock.unet, apply_text_encoder=True, apply_unet=True)
    with torch.no_grad():
        drawn = latents(stock)
    assert (drawn - bare).abs().max() > 1e-2
    assert (drawn - latents(ours)).abs().max() < 1e-4
