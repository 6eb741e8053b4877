"""One file of a transformer's adapter serves ComfyUI and diffusers: both compute what diffadapt computes."""

import copy
import json

import pytest
import torch
from helpers.family_pipelines import tiny_pipeline
from helpers.method_cases import train
from helpers.transformer_layout import original_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import diffadapt as da
from diffadapt.adapters.architectures import architecture_of
from diffadapt.common.pipeline_components import is_text_encoder
from diffadapt.formats.edit.open_adapters import open_without_base
from diffadapt.formats.edit.resize_combine import resized
from diffadapt.formats.emulators import Layer
from diffadapt.formats.emulators.comfyui_transformers import comfyui_program, place_of
from diffadapt.formats.export import write_formats
from diffadapt.formats.export.rehearsal import obstacle

pytestmark = pytest.mark.slow

WITH_LOADER = (
    "sd3",
    "sd35_medium",
    "flux",
    "flux2_klein",
    "flux2_dev",
    "qwen_image",
    "z_image",
    "krea2",
    "chroma",
)
FAMILIES = (*WITH_LOADER, "pixart_sigma")
# Beside what ComfyUI has no names for: where it swaps halves, it reads no compact DoRA.
SWAPPED = "!norm_out.linear+!transformer_blocks.1.norm1_context.linear"
EXCLUDED = {
    "sd3": SWAPPED,
    "sd35_medium": SWAPPED,
    "flux": "!norm_out.linear",
    "flux2_klein": "!norm_out.linear+!*modulation*+!time_guidance_embed.*",
    "flux2_dev": "!norm_out.linear+!*modulation*+!time_guidance_embed.*",
    "chroma": "!distilled_guidance_layer.*",
}
THIN = (
    "lora(rank=2, alpha=3)",
    "flora(rank=3, rank_in=2, rank_out=4)",
    "1lora",
    "vera(rank=4)",
    "pissa(rank=2)",
    "dora(rank=2, alpha=3)",
)
COMPACT = ("loha(rank=2, alpha=1)", "lokr(rank=2, scale=1.5)", "mora(rank=2)", "liera(rank=2)")
ARGUMENTS = {
    "qwen_image": {"true_cfg_scale": 2.0, "negative_prompt": " "},
    "pixart_sigma": {"guidance_scale": 2.0, "negative_prompt": "", "use_resolution_binning": False},
}


def layers_of(family: str) -> str:
    """Every Linear layer that all programs have a name for."""
    return "+".join(["linear", *EXCLUDED.get(family, "").split("+")]).rstrip("+")


@pytest.fixture(scope="module")
def pipes():
    """Pipelines by family, made when they are first asked for: one to adapt, one that stays stock."""
    made = {}

    def of_family(family):
        if family not in made:
            made[family] = (tiny_pipeline(family), tiny_pipeline(family))
        return made[family]

    return of_family


@pytest.fixture
def adapted(pipes):
    """Attaches a trained adapter of a method to a family's pipeline; it is taken off afterwards."""
    made = []

    def attach(family, method, layers=None, text=None):
        pipe, _ = pipes(family)
        layers = layers or layers_of(family)
        made.append(da.attach(pipe, da.make_method(method), layers, text_encoder_targets=text))
        train(made[-1], 0.1)
        return made[-1]

    yield attach
    for adapter in made:
        da.detach(adapter)


@torch.no_grad()
def latents(pipe, family) -> Tensor:
    """What the pipeline generates for one prompt and seed, before decoding."""
    arguments = ARGUMENTS.get(family, {"guidance_scale": 2.0})
    generator = torch.Generator().manual_seed(1)
    output = pipe(
        prompt="a fox",
        height=64,
        width=64,
        num_inference_steps=2,
        generator=generator,
        output_type="latent",
        **arguments,
    )
    return output.images


def read_by_comfyui(adapter, path, base):
    """ComfyUI's own weights, in its layout, with a file applied; and those of the merged adapter."""
    transformer = adapter.roots[""]
    program = comfyui_program(base)
    plain = {}
    merged = {}
    modules = dict(transformer.named_modules())
    changed = {site.name for site in adapter.sites}
    for key, value in transformer.state_dict().items():
        layer_path, _, kind = key.rpartition(".")
        if base.published_names.original_layer(layer_path) is None:
            continue
        plain[key] = value.double().clone()
        merged[key] = plain[key]
        if layer_path in changed and kind == "weight":
            merged[key] = adapter.adapted_weight(layer_path)
        elif layer_path in changed and kind == "bias":
            merged[key] = adapter.adapted_bias(layer_path)
    weights = original_checkpoint(plain, base.published_names)
    tensors = load_file(path)
    for layer_path in changed:
        name = f"transformer.{layer_path}"
        place = place_of(name, base)
        weight = weights[f"{place.path}.weight"]
        bias = weights.get(f"{place.path}.bias")
        rows = slice(place.first_row, place.first_row + (place.num_rows or len(weight)))
        keys = {}
        for key, tensor in tensors.items():
            if key.startswith(f"{name}."):
                keys[key.removeprefix(f"{name}.")] = tensor.double()
        layer = Layer(name, "linear", weight[rows], None if bias is None else bias[rows], modules[layer_path])
        result = program.apply(layer, keys)
        weight[rows] = result.weight
        if bias is not None:
            bias[rows] = result.bias
    return weights, original_checkpoint(merged, base.published_names)


@pytest.mark.parametrize(
    "method", [THIN[0], *(pytest.param(name, marks=pytest.mark.slow) for name in (*THIN[1:], *COMPACT))]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_comfyui_has_the_merged_weights_in_its_own_layout(family, method, pipes, tmp_path):
    pipe, _ = pipes(family)
    transformer = copy.deepcopy(pipe.transformer).double()  # so that the file's float32 alone rounds
    adapter = da.attach(transformer, da.make_method(method), layers_of(family))
    train(adapter, 0.05)
    report = da.export(adapter, tmp_path / "file.safetensors")
    base = architecture_of(transformer)
    weights, merged = read_by_comfyui(adapter, tmp_path / "file.safetensors", base)
    fused = [key for key in weights if "qkv" in key or "linear1" in key or "kv_linear" in key]
    assert fused or family in ("qwen_image", "krea2")  # whose original code has no such weights
    for key, weight in weights.items():
        error = (weight - merged[key]).abs().max() / merged[key].abs().max()
        assert error < 1e-7, key
    assert report.verdict("ComfyUI").status == "exact"


@pytest.mark.parametrize("method", THIN)
@pytest.mark.parametrize("family", WITH_LOADER)
@pytest.mark.slow
def test_stock_diffusers_generates_the_same_from_the_file_for_comfyui(
    family, method, adapted, pipes, tmp_path
):
    ours, stock = pipes(family)
    bare = latents(stock, family)
    adapter = adapted(family, method)
    report = da.export(adapter, tmp_path / "file.safetensors")
    check_stock_latents(stock, family, tmp_path, latents(ours, family), bare)
    assert report.verdict("diffusers").status == "exact"
    assert report.accepted_by == ("ComfyUI", "diffusers")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora(rank=2)", {}),
        ("dora(rank=2)", {}),
        ("loha(rank=2)", {}),
        ("lokr(rank=2)", {}),
        ("mora(rank=2)", {"rank": 10_000}),
        ("liera(rank=2)", {"rank": 10_000}),
        ("gamma", {"rank": 10_000}),
        ("difffit(norms=False, gamma=False)", {}),
    ],
)
@pytest.mark.parametrize("family", WITH_LOADER)
@pytest.mark.slow
def test_stock_diffusers_generates_the_same_from_its_own_file(
    family, method, options, adapted, pipes, tmp_path
):
    ours, stock = pipes(family)
    bare = latents(stock, family)
    adapter = adapted(family, method)
    report = da.export(adapter, tmp_path / "file.safetensors", to="diffusers", **options)
    check_stock_latents(stock, family, tmp_path, latents(ours, family), bare)
    assert report.verdict("diffusers").status == "exact"


def check_stock_latents(stock, family, folder, expected, bare):
    """That a stock pipeline with the file generates the expected latents, unlike the bare ones."""
    stock.load_lora_weights(folder / "file.safetensors")
    try:
        generated = latents(stock, family)
    finally:
        stock.unload_lora_weights()
    size = expected.abs().max()
    assert (expected - bare).abs().max() / size > 1e-3, "the adapter changes nothing that could be compared"
    assert (generated - expected).abs().max() / size < 1e-4


@pytest.mark.parametrize(("family", "text_encoders"), [("sd3", 2), ("flux", 1)])
@pytest.mark.slow
def test_text_encoders_are_in_the_same_file(family, text_encoders, adapted, pipes, tmp_path):
    ours, stock = pipes(family)
    bare = latents(stock, family)
    layers = "encoder.layers.0.self_attn.q_proj+encoder.layers.0.mlp.fc1"
    adapter = adapted(family, "lora(rank=2)", "transformer_blocks.0.attn.to_q", text=layers)
    report = da.export(adapter, tmp_path / "file.safetensors")
    components = {key.partition(".")[0] for key in load_file(tmp_path / "file.safetensors")}
    assert len([name for name in components if is_text_encoder(name)]) == text_encoders
    assert report.accepted_by == ("ComfyUI", "diffusers")
    check_stock_latents(stock, family, tmp_path, latents(ours, family), bare)


@pytest.mark.parametrize("method", ["lokr(rank=2)", "loha(rank=2)"])
@pytest.mark.parametrize("family", WITH_LOADER)
def test_the_verdict_on_compact_keys_is_that_of_the_real_loader(family, method, adapted, pipes, tmp_path):
    ours, stock = pipes(family)
    bare = latents(stock, family)
    adapter = adapted(family, method)
    verdict = da.export(adapter, tmp_path / "file.safetensors").verdict("diffusers")
    if method == "lokr(rank=2)" and family in ("flux2_klein", "flux2_dev", "z_image"):
        check_stock_latents(stock, family, tmp_path, latents(ours, family), bare)
        assert verdict.status == "exact"
    else:
        with pytest.raises(ValueError, match=r"Invalid .* checkpoint"):
            stock.load_lora_weights(tmp_path / "file.safetensors")
        assert verdict.status == "refused"


def test_flux_passes_over_keys_that_are_not_of_lora(adapted, pipes, tmp_path):
    _, stock = pipes("flux")
    adapter = adapted("flux", "lora(rank=2)+bitfit", "*attn.to_out.0")
    report = da.export(adapter, tmp_path / "file.safetensors")
    assert report.verdict("ComfyUI").status == "exact"
    assert report.verdict("diffusers").status == "wrong"
    assert "diff_b" in report.verdict("diffusers").reason
    stock.load_lora_weights(tmp_path / "file.safetensors")  # without an error
    stock.unload_lora_weights()


@pytest.mark.parametrize(
    ("family", "method", "layers", "reason"),
    [
        (
            "flux",
            "bitfit",
            "*transformer_blocks.0.attn.to_q",
            "changes no bias of .* part of a larger weight",
        ),
        ("flux", "bitfit", "norm_out.linear", "changes no bias of .* or swapped"),
        ("flux", "dora(rank=2)", "norm_out.linear", "result differs"),
        (
            "flux2_klein",
            "lora(rank=2)",
            "*modulation*linear",
            "no layer of the name .*without it",
        ),
        ("chroma", "lora(rank=2)", "distilled_guidance_layer.in_proj", "no layer of the name"),
        ("krea2", "norms", "*norm_q", "no layer of the name"),
    ],
)
def test_what_comfyui_does_not_read_is_refused_with_the_reason(
    family, method, layers, reason, adapted, tmp_path
):
    adapter = adapted(family, method, layers)
    with pytest.raises(ValueError, match=f"ComfyUI.*{reason}"):
        da.export(adapter, tmp_path / "file.safetensors")
    assert not list(tmp_path.iterdir())


def test_whole_differences_pass_the_swapped_layer(adapted, tmp_path):
    adapter = adapted("flux", "dora(rank=2)", "norm_out.linear")
    report = da.export(adapter, tmp_path / "file.safetensors", dense=True)
    assert report.verdict("ComfyUI").status == "exact"


def test_changes_of_norms_that_comfyui_knows_are_read(adapted, tmp_path):
    adapter = adapted("flux", "norms", "*norm_q")
    report = da.export(adapter, tmp_path / "file.safetensors")
    assert report.verdict("ComfyUI").status == "exact"
    assert {key.rpartition(".")[2] for key in load_file(tmp_path / "file.safetensors")} == {"w_norm"}


def test_pixart_has_no_loader_in_diffusers(adapted, tmp_path):
    adapter = adapted("pixart_sigma", "lora(rank=2)")
    report = da.export(adapter, tmp_path / "file.safetensors")
    assert report.verdict("diffusers").status == "refused"
    assert "no load_lora_weights for PixArtSigmaPipeline" in report.verdict("diffusers").reason
    with pytest.raises(ValueError, match="no load_lora_weights for PixArtSigmaPipeline"):
        da.export(adapter, tmp_path / "other.safetensors", to="diffusers")


def test_there_is_no_alpha_and_the_header_says_what_the_file_is_for(adapted, tmp_path):
    adapter = adapted("qwen_image", "lora(rank=2, alpha=5)")
    da.export(adapter, tmp_path / "fox.safetensors")
    keys = list(load_file(tmp_path / "fox.safetensors"))
    assert all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)
    assert all(key.startswith("transformer.transformer_blocks.") for key in keys if "blocks" in key)
    with safe_open(tmp_path / "fox.safetensors", framework="pt") as file:
        header = file.metadata()
    assert header["modelspec.architecture"] == "Qwen-Image-like/lora"  # the tiny one has other sizes
    assert header["ss_base_model_version"] == "qwen_image"
    assert header["diffadapt.accepted_by"] == "ComfyUI, diffusers"
    assert json.loads(header["lora_adapter_metadata"])["transformer.lora_alpha"] == 2


def test_training_writes_one_file_that_both_open(adapted, tmp_path):
    adapter = adapted("z_image", "lora(rank=2)")
    da.save(adapter, tmp_path / "adapter.safetensors")
    lines = write_formats(adapter, tmp_path / "adapter.safetensors", None)
    assert len(lines) == 1
    assert "adapter_comfyui.safetensors: right in ComfyUI, diffusers" in lines[0]


@pytest.mark.parametrize("method", [*THIN, *COMPACT, "dora(rank=2)+loha(rank=2)"])
@pytest.mark.parametrize("family", ["flux", "flux2_klein", "z_image"])
def test_the_file_is_read_back_as_the_adapter_that_it_was_made_of(family, method, adapted, pipes, tmp_path):
    adapter = adapted(family, method)
    da.export(adapter, tmp_path / "file.safetensors")
    transformer = copy.deepcopy(pipes(family)[1].transformer)
    again = da.load(transformer, tmp_path / "file.safetensors")
    for site in again.sites:
        expected = adapter.adapted_weight(f"transformer.{site.name}")
        assert (again.adapted_weight(site.name) - expected).abs().max() < 2e-6, site.name


def test_a_file_is_resized_under_its_own_names(adapted, tmp_path):
    adapter = adapted("flux2_klein", "lora(rank=4)", "attention")
    da.export(adapter, tmp_path / "file.safetensors")
    opened = open_without_base([(str(tmp_path / "file.safetensors"), 1.0)])
    changes, _ = resized(opened.layers(), rank=4)
    opened.write(changes, tmp_path / "resized.safetensors", {})
    resized_keys = load_file(tmp_path / "resized.safetensors").keys()
    assert resized_keys == load_file(tmp_path / "file.safetensors").keys()


def test_training_is_told_beforehand_what_comfyui_will_not_read(adapted):
    biases = adapted("flux", "bitfit", "*transformer_blocks.0.attn.to_out.0+*transformer_blocks.1.attn.to_q")
    assert "changes no bias of transformer.transformer_blocks.1.attn.to_q" in obstacle(biases, "kohya")
    da.detach(biases)
    assert obstacle(adapted("flux", "dora(rank=2)"), "kohya") is None


@pytest.mark.parametrize("common", ["proj_out", "single_transformer_blocks.0.proj_out"])
def test_ranks_of_layers_whose_names_end_alike_are_told_apart(common, pipes, tmp_path):
    ours, stock = pipes("flux")
    bare = latents(stock, "flux")
    layers = "proj_out+transformer_blocks.0.attn.to_q"  # also the proj_out of every single block
    ranks = {f"transformer.{common}": 3}
    adapter = da.attach(ours, da.make_method("lora(rank=2)"), layers, rank_patterns=ranks)
    train(adapter, 0.3)
    da.export(adapter, tmp_path / "file.safetensors")
    expected = latents(ours, "flux")
    da.detach(adapter)
    check_stock_latents(stock, "flux", tmp_path, expected, bare)
    again = da.load(ours, tmp_path / "file.safetensors")
    assert (latents(ours, "flux") - expected).abs().max() < 1e-5
    da.detach(again)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_bare_transformer_is_exported_under_the_same_names(family, pipes, tmp_path):
    pipe, _ = pipes(family)
    adapter = da.attach(pipe.transformer, da.make_method("lora(rank=2)"), layers_of(family))
    train(adapter, 0.1)
    report = da.export(adapter, tmp_path / "file.safetensors")
    da.detach(adapter)
    assert all(key.startswith("transformer.") for key in load_file(tmp_path / "file.safetensors"))
    assert report.verdict("ComfyUI").status == "exact"
    assert report.verdict("diffusers").accepted == (family in WITH_LOADER)
