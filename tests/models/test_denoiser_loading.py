"""A denoiser that is quantised while it is loaded, or comes from a file of its own."""

from pathlib import Path

import pytest
import torch
from helpers.family_pipelines import tiny_folder, tiny_pipeline
from helpers.pipelines import tiny_sd_pipeline
from helpers.quantised_kinds import QUANTISED, needs
from safetensors.torch import save_file
from torch import nn

import diffadapt as da
from diffadapt.adapters.quantised_layers import quantised_layer, stored_bytes
from diffadapt.models import denoiser_loading
from diffadapt.models.denoiser_loading import plain_layers
from diffadapt.models.families import load_base
from diffadapt.models.from_config import denoiser_from_config
from diffadapt.models.open_pipeline import open_pipeline

torchao = needs(QUANTISED["torchao-int8"])
PRECISIONS = {"int8": "torchao int8", "fp8": "torchao float8"}


@pytest.fixture
def flux(tmp_path_factory):
    return str(tiny_folder("flux", tmp_path_factory))


def quantised_names(model):
    """Names of the quantised layers, and how they are stored."""
    names = {}
    for name, layer in model.named_modules():
        quantised = quantised_layer(layer)
        if quantised is not None:
            names[name] = quantised.kind.name
    return names


@torchao
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_linear_layers_in_blocks_are_quantised_and_no_others(flux, precision):
    plain = open_pipeline(flux, dtype=torch.bfloat16)
    pipe = open_pipeline(flux, dtype=torch.bfloat16, base_precision=precision)
    names = quantised_names(pipe.transformer)
    assert set(names.values()) == {PRECISIONS[precision]}
    linear = {name for name, layer in pipe.transformer.named_modules() if isinstance(layer, nn.Linear)}
    kept = linear - names.keys()
    assert {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"} <= kept
    assert {"transformer_blocks.0.norm1.linear", "single_transformer_blocks.0.norm.linear"} <= kept
    assert {"transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2"} <= names.keys()
    assert "single_transformer_blocks.1.proj_out" in names  # although the model's own proj_out is kept
    for name, parameter in plain.transformer.named_parameters():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(pipe.transformer.get_parameter(name), parameter)
    for component in ("text_encoder", "text_encoder_2", "vae"):
        assert quantised_names(getattr(pipe, component)) == {}
    weights = {name: plain.transformer.get_submodule(name).weight for name in names}
    for name, weight in weights.items():
        layer = pipe.transformer.get_submodule(name)
        error = quantised_layer(layer).dequantise() - weight.float()
        assert error.norm() < 0.05 * weight.float().norm()
        assert stored_bytes(layer.weight) < 0.9 * stored_bytes(weight)


@torchao
@pytest.mark.parametrize(
    "family", ["sd3", "qwen_image", "z_image", "krea2", "chroma", "pixart_sigma", "flux2_klein"]
)
def test_every_transformer_family_is_loaded_quantised(family, tmp_path_factory):
    pipe = open_pipeline(
        str(tiny_folder(family, tmp_path_factory)), dtype=torch.bfloat16, base_precision="fp8"
    )
    names = quantised_names(pipe.transformer)
    assert len(names) >= 12
    assert not [name for name in names if "norm" in name or "mod" in name.split(".")[-1] or "embed" in name]
    assert pipe.transformer.dtype == torch.bfloat16


@torchao
def test_a_denoiser_that_is_loaded_later_is_quantised_then(flux):
    base = load_base(flux, dtype=torch.bfloat16, base_precision="int8", is_staged=True)
    assert {parameter.device.type for parameter in base.denoiser.parameters()} == {"meta"}
    base.placement.load_denoiser()
    assert "transformer_blocks.0.attn.to_q" in quantised_names(base.denoiser)
    assert not any(parameter.requires_grad for parameter in base.denoiser.parameters())


@torchao
def test_a_unet_is_loaded_quantised_and_trained(tmp_path):
    folder = tiny_sd_pipeline(tmp_path / "sd")
    base = load_base(str(folder), dtype=torch.bfloat16, base_precision="int8")
    names = quantised_names(base.denoiser)
    assert "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q" in names
    assert not [name for name in names if "time_emb" in name]
    assert not any(parameter.requires_grad for parameter in base.denoiser.parameters())
    adapter = da.attach(base.pipe, da.LoRA(rank=2), "attention")
    states = torch.randn(1, 5, 32).bfloat16()
    noisy = torch.randn(1, 4, 8, 8).bfloat16()
    base.denoiser(noisy, 3, encoder_hidden_states=states, return_dict=False)[
        0
    ].float().square().sum().backward()
    ups = [parameter for name, parameter in adapter.named_parameters() if name.endswith("up")]
    assert ups
    assert all(parameter.grad.any() for parameter in ups)


def write_gguf(path: Path, tensors: dict[str, torch.Tensor], names) -> None:
    """A GGUF file with the weights of some layers in Q8_0 and all else in float32."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    writer = GGUFWriter(path, "flux")
    for key, tensor in tensors.items():
        values = tensor.float().numpy()
        if key.removesuffix(".weight") in names:
            quantised = quants.quantize(values, GGMLQuantizationType.Q8_0)
            writer.add_tensor(key, quantised, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@needs(QUANTISED["gguf-q8"])
def test_the_denoiser_of_a_gguf_file_takes_the_place_of_the_base_s_own(tmp_path):
    pipe = tiny_pipeline("flux")
    plain = type(pipe.transformer).from_config(
        pipe.transformer.config, attention_head_dim=32, num_attention_heads=1, axes_dims_rope=(8, 12, 12)
    )
    pipe.register_modules(transformer=plain)
    pipe.save_pretrained(tmp_path / "flux")
    names = {"transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"}
    tensors = {key: value + 0.01 for key, value in plain.state_dict().items()}
    write_gguf(tmp_path / "flux.gguf", tensors, names)
    base = load_base(str(tmp_path / "flux"), transformer=str(tmp_path / "flux.gguf"))
    stored_as = quantised_names(base.denoiser)
    assert {name: stored_as[name] for name in names} == dict.fromkeys(names, "gguf q8_0")
    for name in names:
        dense = quantised_layer(base.denoiser.get_submodule(name)).dequantise()
        assert (dense - tensors[f"{name}.weight"]).abs().max() < 0.01 * dense.abs().max()
    adapter = da.attach(base.pipe, da.LoRA(rank=2), "attention")
    assert any(site.name.endswith("transformer_blocks.0.attn.to_q") for site in adapter.sites)


def test_the_denoiser_of_a_safetensors_file_takes_the_place_of_the_base_s_own(flux, tmp_path):
    plain = open_pipeline(flux).transformer
    tensors = {key: value + 0.01 for key, value in plain.state_dict().items()}
    save_file(tensors, tmp_path / "flux.safetensors")
    pipe = open_pipeline(flux, transformer=str(tmp_path / "flux.safetensors"))
    for key, value in pipe.transformer.state_dict().items():
        assert torch.equal(value, tensors[key])


def test_four_bits_without_a_gpu_are_refused_before_anything_is_loaded(flux):
    if torch.cuda.is_available() or needs(QUANTISED["bnb-nf4"]).args[0]:
        pytest.skip("needs bitsandbytes and no GPU")
    with pytest.raises(ValueError, match=r"nf4 needs a GPU, .*int8 and fp8 work on a CPU"):
        load_base(flux, base_precision="nf4")


@needs(QUANTISED["bnb-nf4"])
@pytest.mark.parametrize("family", ["flux", "flux2_klein"])
def test_four_bits_are_for_the_same_layers(family, tmp_path_factory):
    """diffusers loads four bits on a GPU alone, but replaces the layers anywhere."""
    from diffusers.quantizers.bitsandbytes.utils import replace_with_bnb_linear

    _, denoiser = denoiser_from_config(str(tiny_folder(family, tmp_path_factory)))
    linear = {name for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear)}
    plain = set(plain_layers(denoiser))
    config = denoiser_loading._quantization_config("nf4", denoiser, torch.bfloat16)
    assert (config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype) == ("nf4", torch.bfloat16)
    replace_with_bnb_linear(denoiser, config.llm_int8_skip_modules, quantization_config=config)
    replaced = {name for name, layer in denoiser.named_modules() if type(layer).__name__ == "Linear4bit"}
    same_end = {"proj_out"} if family == "flux" else set()  # of single_transformer_blocks.*.proj_out
    assert replaced == linear - plain | same_end
    assert {"proj_out", "x_embedder"} <= plain


@pytest.mark.parametrize("precision", ["int8", "fp8", "nf4"])
def test_a_missing_quantiser_is_named_with_the_remedy(flux, precision, monkeypatch):
    monkeypatch.setattr(denoiser_loading, "find_spec", lambda package: None)
    with pytest.raises(ImportError, match=rf"{precision} needs .*pip install 'diffadapt\[quant\]'"):
        load_base(flux, base_precision=precision)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("absent.gguf", FileNotFoundError, "there is no such file"),
        ("weights.ckpt", ValueError, r"give a \.gguf or \.safetensors file"),
    ],
)
def test_a_file_that_holds_no_denoiser_is_refused_by_its_name(flux, tmp_path, name, error, message):
    with pytest.raises(error, match=message):
        load_base(flux, transformer=str(tmp_path / name))


def test_a_file_is_not_quantised_again(flux, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"used as it is stored: leave out --base_precision int8"):
        load_base(flux, transformer=str(tmp_path / "a.safetensors"), base_precision="int8")


def test_a_denoiser_without_single_files_is_named(tmp_path, tmp_path_factory):
    folder = str(tiny_folder("pixart_sigma", tmp_path_factory))
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="diffusers has no single files of PixArtTransformer2DModel"):
        load_base(folder, transformer=str(tmp_path / "a.safetensors"))


def test_a_checkpoint_in_one_file_is_not_quantised(tmp_path, monkeypatch):
    monkeypatch.setattr("diffadapt.models.open_pipeline.pipeline_class", lambda *_, **__: "FluxPipeline")
    message = "is a single file, whose denoiser is neither quantised nor replaced; give the folder"
    with pytest.raises(ValueError, match=message):
        open_pipeline(str(tmp_path / "base.safetensors"), base_precision="int8")


def test_layers_that_keep_their_precision_are_found_by_place_and_name():
    model = nn.ModuleDict(
        {
            "embed": nn.Linear(2, 2),
            "blocks": nn.ModuleList([nn.ModuleDict({"norm": nn.Linear(2, 2), "ff": nn.Linear(2, 2)})]),
        }
    )
    assert plain_layers(model) == ["embed", "blocks.0.norm"]
