"""Kohya's file: LyCORIS' own loader gives the same weights, and the restated programs say what they say."""

import copy
import hashlib
import json

import pytest
import torch
from helpers.tiny_models import TEXT_LAYERS, open_pipeline, sd_folder, sdxl_folder, trained
from lycoris.kohya import get_module, make_module
from safetensors import safe_open
from safetensors.torch import load_file, save

import diffadapt as da
from diffadapt.adapters.layers import original_class
from diffadapt.formats.export.layer_names import base_architecture, kohya_name

pytestmark = pytest.mark.slow

EVERYWHERE = (
    "lora(rank=2)",
    "lora(rank=2, alpha=5, conv_reshape=loralib)",
    "flora(rank=3, rank_in=2, rank_out=5, scale=2)",
    "flora(rank=3, rank_in=6, rank_out=2)",
    "1lora",
    "1lora(compression=random)",
    "vera(rank=4)",
    "mora(rank=2)",
    "mora(rank=2, type=6)",
    "pissa(rank=2)",
    "loha(rank=2, alpha=1)",
    "lokr(rank=2, scale=1.5)",
    "lokr(rank=1, factor=2)",
    "lokr(rank=9)",
    "liera(rank=2, order=exp)",
    "superlora(rank=2)",
    "superlora(rank=2, projection=nonlinear, rho=0.3)",
    "full",
    "lora(rank=2)+flora(rank=3)",
)
COMFYUI_ALONE = (
    "dora(rank=2, alpha=3)",
    "bitfit",
    "lora(rank=2)+bitfit",
    "1lora+dora(rank=1)",
    "liera(inner=dora)",
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    return {"sd": sd_folder(folder), "sdxl": sdxl_folder(folder)}


@pytest.fixture(scope="module")
def pipe(folders):
    return open_pipeline(folders["sd"])


@pytest.fixture
def exported(pipe, tmp_path):
    """Exports a trained adapter of a method; the adapter is taken off afterwards."""
    made = []

    def export(method, *, layers=None, text=TEXT_LAYERS, **options):
        made.append(trained(pipe, method, layers=layers, text=text))
        path = tmp_path / "file.safetensors"
        return made[-1], da.export(made[-1], path, "kohya", **options), load_file(path)

    yield export
    for adapter in made:
        da.detach(adapter)


def read_by_lycoris(adapter, tensors):
    """(weight, bias) of every layer by its name, from LyCORIS' own loader on plain copies of the layers."""
    read = {}
    for site in adapter.sites:
        layer_state = adapter.layer_states[site.name]
        layer = copy.copy(layer_state.layers[0])
        layer.__class__ = original_class(layer)
        component, _, path = site.name.partition(".")
        name = kohya_name(component, path, base_architecture(adapter))
        kind, values = get_module(tensors, name)
        module = make_module(kind, values, name, layer)
        merged = module.get_merged_weight(shape=layer.weight.shape)
        read[site.name] = [None if value is None else value.detach() for value in merged]
    return read


@pytest.mark.parametrize("method", EVERYWHERE)
@pytest.mark.slow
def test_lycoris_reads_the_weights_of_the_live_adapter(method, exported):
    adapter, report, tensors = exported(method)
    for name, (weight, _) in read_by_lycoris(adapter, tensors).items():
        assert (weight - adapter.adapted_weight(name)).abs().max() < 2e-6, name
    assert {"ComfyUI", "A1111", "LyCORIS"} <= set(report.accepted_by)
    assert report.max_error < 1e-6


@pytest.mark.parametrize("method", COMFYUI_ALONE)
def test_whole_differences_are_right_where_compact_keys_are_not(method, exported):
    adapter, compact, _ = exported(method)
    da.detach(adapter)
    assert compact.verdict("ComfyUI").status == "exact"
    assert not compact.verdict("A1111").accepted
    adapter, dense, tensors = exported(method, dense=True)
    assert {"ComfyUI", "A1111", "LyCORIS"} <= set(dense.accepted_by)
    assert dense.base_only
    for name, (weight, bias) in read_by_lycoris(adapter, tensors).items():
        assert (weight - adapter.adapted_weight(name)).abs().max() < 2e-6, name
        if bias is not None:
            assert (bias - adapter.adapted_bias(name)).abs().max() < 2e-6, name


def test_norms_are_read_by_lycoris(exported):
    adapter, report, tensors = exported("norms", layers="norm", text=None)
    for name, (weight, bias) in read_by_lycoris(adapter, tensors).items():
        assert (weight - adapter.adapted_weight(name)).abs().max() < 1e-6
        assert (bias - adapter.adapted_bias(name)).abs().max() < 1e-6
    assert {"ComfyUI", "LyCORIS"} <= set(report.accepted_by)


def test_lycoris_verdict_is_that_of_its_own_loader_for_dora(exported):
    adapter, report, tensors = exported("dora(rank=2)", text=None)
    read = read_by_lycoris(adapter, tensors)
    error = max((w - adapter.adapted_weight(name)).abs().max().item() for name, (w, _) in read.items())
    assert report.verdict("LyCORIS").status == "wrong"
    assert error == pytest.approx(report.verdict("LyCORIS").max_error, rel=1e-3)


def test_a_bias_the_stock_layer_lacks_is_refused_and_named(exported, tmp_path):
    with pytest.raises(ValueError, match=r"attn1\.to_q.*gain a bias"):
        exported("difffit", text=None)
    assert not list(tmp_path.iterdir())


def test_layers_comfyui_does_not_know_are_refused_unless_forced(exported, tmp_path):
    unknown = {"layers": "conv_in", "text": "encoder.layers.0.layer_norm1+final_layer_norm"}
    with pytest.raises(ValueError, match=r"not written.*ComfyUI.*4 keys ignored"):
        exported("full", **unknown)
    assert not list(tmp_path.iterdir())


def test_force_writes_it_and_the_report_says_who_reads_it(pipe, tmp_path):
    adapter = trained(pipe, "full", layers="conv_in", text="final_layer_norm")
    report = da.export(adapter, tmp_path / "file.safetensors", force=True)
    da.detach(adapter)
    assert not report.good
    assert report.verdict("LyCORIS").status == "exact"
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        assert "ComfyUI" not in file.metadata()["diffadapt.accepted_by"]


def test_alpha_is_always_there_and_equals_the_rank(exported):
    _, _, tensors = exported("lora(rank=3, alpha=7, rank_stabilized=true)")
    names = {key.split(".")[0] for key in tensors}
    assert all(name.startswith(("lora_unet_", "lora_te_text_model_encoder_layers_")) for name in names)
    for name in names:
        assert tensors[f"{name}.alpha"].item() == tensors[f"{name}.lora_down.weight"].shape[0] == 3


def test_the_core_of_flora_is_padded_to_a_square(exported):
    _, _, tensors = exported(
        "flora(rank=3, rank_in=2, rank_out=5)", layers="mid_block.resnets.0.conv1", text=None
    )
    (mid,) = (tensor for key, tensor in tensors.items() if key.endswith("lora_mid.weight"))
    assert mid.shape == (5, 5, 3, 3)
    assert mid[:, 2:].abs().max() == 0


def test_sdxl_names_both_text_encoders(folders, tmp_path):
    pipe = open_pipeline(folders["sdxl"])
    adapter = trained(pipe, "lora(rank=2)", layers="qv")
    report = da.export(adapter, tmp_path / "file.safetensors")
    starts = {key.split("_text_model")[0] for key in load_file(tmp_path / "file.safetensors") if "_te" in key}
    assert starts == {"lora_te1", "lora_te2"}
    assert {"ComfyUI", "A1111", "LyCORIS", "diffusers"} <= set(report.accepted_by)
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"


def test_every_layer_of_sdxl_s_blocks_has_the_name_kohya_gives_it(folders, tmp_path):
    pipe = open_pipeline(folders["sdxl"])
    adapter = trained(pipe, "lora(rank=2)", layers="all")
    report = da.export(adapter, tmp_path / "file.safetensors")
    names = {key.split(".")[0] for key in load_file(tmp_path / "file.safetensors")}
    assert "lora_unet_output_blocks_1_2_conv" in names  # behind the attention of its block
    assert "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q" in names
    assert {"lora_unet_time_embed_0", "lora_unet_label_emb_0_2", "lora_unet_out_2"} <= names
    assert not [name for name in names if "down_blocks" in name or "up_blocks" in name]
    assert {"ComfyUI", "A1111", "LyCORIS"} <= set(report.accepted_by)
    assert report.verdict("sd-scripts").status == "wrong"  # it makes nothing of what is outside the blocks
    da.detach(adapter)
    inside = trained(pipe, "lora(rank=2)", layers="attention+*resnets*conv?+*samplers*conv")
    report = da.export(inside, tmp_path / "inside.safetensors")
    assert {"sd-scripts", "diffusers"} <= set(report.accepted_by)


@pytest.mark.parametrize("base", ["sd", "sdxl"])
def test_diffusers_own_conversion_knows_every_name(base, folders, tmp_path):
    """Also the claim that diffusers opens kohya's file of a plain LoRA."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_non_diffusers_lora_to_diffusers,
        _maybe_map_sgm_blocks_to_diffusers,
    )

    pipe = open_pipeline(folders[base])
    adapter = trained(pipe, "lora(rank=2)", layers="all+!add_embedding.linear_?" if base == "sdxl" else "all")
    da.export(adapter, tmp_path / "file.safetensors")
    tensors = _maybe_map_sgm_blocks_to_diffusers(load_file(tmp_path / "file.safetensors"), pipe.unet.config)
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(dict(tensors))
    assert len(alphas) == len(adapter.sites)
    ends = (".down.weight", ".lora_linear_layer.down.weight", ".lora.down.weight", "_lora.down.weight")
    named = set()
    for key in converted:
        if key.endswith("down.weight"):
            bare = next(key.removesuffix(end) for end in reversed(ends) if key.endswith(end))
            bare = bare.replace(".processor", "").replace("text_model.", "")
            if bare.startswith("text_encoder"):  # attention is renamed back when PEFT's names are made
                bare = bare.replace("self_attn.to_q", "self_attn.q_proj")
            named.add(f"{bare}.0" if bare.endswith("to_out") else bare)
    assert named == {site.name.replace("text_model.", "") for site in adapter.sites}


def test_half_precision_is_told(exported):
    _, report, tensors = exported("lora(rank=2)", dtype="bfloat16")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert report.verdict("ComfyUI").status == "approximate"
    assert 1e-4 < report.verdict("ComfyUI").share < 2e-2


def test_numbers_beyond_half_precision_are_refused(pipe, tmp_path):
    adapter = trained(pipe, "full", layers="conv_in", text=None, size=1e6)
    with pytest.raises(ValueError, match="does not fit into"):
        da.export(adapter, tmp_path / "file.safetensors", dtype="float16")
    da.detach(adapter)
    assert not list(tmp_path.iterdir())


def test_the_header_tells_what_people_s_tools_and_we_need(pipe, tmp_path):
    adapter = trained(pipe, "flora(rank=3)")
    da.export(adapter, tmp_path / "fox.safetensors", base="some/base", metadata={"training": "{}"})
    with safe_open(tmp_path / "fox.safetensors", framework="pt") as file:
        header = file.metadata()
    da.detach(adapter)
    assert json.loads(header["diffadapt.method"]) == [{"name": "flora", "options": {"rank": 3}}]
    assert header["ss_network_module"] == "lycoris.kohya"
    assert header["ss_sd_model_name"] == header["diffadapt.base"] == "some/base"
    assert header["modelspec.title"] == header["ss_output_name"] == "fox"
    assert len(header["sshs_model_hash"]) == 64
    assert "ComfyUI" in header["diffadapt.accepted_by"]
    assert header["training"] == "{}"


def test_the_hashes_are_those_of_kohya_s_scripts(pipe, tmp_path):
    """Restated with safetensors in memory; more than a mebibyte, so that the old hash covers tensors."""
    adapter = trained(pipe, "lora(rank=24)", layers="all")
    da.export(adapter, tmp_path / "file.safetensors")
    da.detach(adapter)
    with safe_open(tmp_path / "file.safetensors", framework="pt") as file:
        header = file.metadata()
    kept = {key: value for key, value in header.items() if key.startswith("ss_")}
    data = save(load_file(tmp_path / "file.safetensors"), kept)
    assert len(data) > 0x110000
    length = int.from_bytes(data[:8], "little")
    assert header["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()
    assert header["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]


def test_a_detached_adapter_and_wrong_words_are_refused(pipe, tmp_path):
    adapter = trained(pipe, "lora(rank=2)")
    with pytest.raises(ValueError, match="did you mean kohya"):
        da.export(adapter, tmp_path / "file.safetensors", to="kohia")
    with pytest.raises(ValueError, match="dtype"):
        da.export(adapter, tmp_path / "file.safetensors", dtype="float8")
    with pytest.raises(ValueError, match="rank is for diffusers"):
        da.export(adapter, tmp_path / "file.safetensors", rank=4)
    da.detach(adapter)
    with pytest.raises(ValueError, match="detached"):
        da.export(adapter, tmp_path / "file.safetensors")


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(
    "method", ["lora(rank=2)", "loha(rank=2)", "lokr(rank=1)", "1lora", "liera(rank=2)", "full"]
)
@pytest.mark.slow
def test_the_added_embedding_of_sdxl_is_found_by_every_program_that_reads_it(
    method, strength, folders, tmp_path
):
    pipe = open_pipeline(folders["sdxl"])
    adapter = trained(pipe, method, layers="add_embedding.linear_?", text=None)
    assert len(adapter.sites) == 2
    adapter.strength = strength
    report = da.export(adapter, tmp_path / "file.safetensors")
    names = {key.split(".")[0] for key in load_file(tmp_path / "file.safetensors")}
    assert names == {"lora_unet_label_emb_0_0", "lora_unet_label_emb_0_2"}
    for program in ("ComfyUI", "A1111", "LyCORIS"):
        verdict = report.verdict(program)
        assert (verdict.status, verdict.share < 1e-5) == ("exact", True), verdict
    for program in ("sd-scripts", "diffusers"):  # they have no place for it
        assert report.verdict(program).status in ("wrong", "refused"), program
    again = open_pipeline(folders["sdxl"])
    opened = da.load(again, tmp_path / "file.safetensors")
    for site in adapter.sites:
        assert torch.allclose(opened.adapted_weight(site.name), adapter.adapted_weight(site.name), atol=1e-5)


def test_norms_of_a_text_encoder_are_refused(pipe, tmp_path):
    adapter = trained(pipe, "norms", layers="conv_norm_out", text="norm")
    try:
        with pytest.raises(ValueError, match="ComfyUI"):
            da.export(adapter, tmp_path / "file.safetensors")
    finally:
        da.detach(adapter)
    assert not list(tmp_path.iterdir())
