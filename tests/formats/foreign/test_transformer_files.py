"""Files of other trainers for transformers, in the names of diffusers and of the original code."""

import copy

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import lora_conversion_utils
from helpers.family_pipelines import tiny_pipeline
from helpers.transformer_layout import original_checkpoint
from safetensors.torch import save_file
from torch import Tensor

import diffadapt as da
from diffadapt.adapters.architectures import architecture_of
from diffadapt.formats.foreign.attach import locate
from diffadapt.formats.foreign.open import open_foreign

pytestmark = pytest.mark.slow

FAMILIES = ("sd3", "sd35_medium", "flux", "flux2_klein", "z_image", "krea2", "chroma", "pixart_sigma")
RANK = 3
ALPHA = 1.5


@pytest.fixture(scope="module")
def pipes():
    """Pipelines by family, made when they are first asked for."""
    made = {}

    def of_family(family):
        if family not in made:
            made[family] = tiny_pipeline(family)
        return made[family]

    return of_family


def original_weights(transformer) -> dict[str, Tensor]:
    """The weights of a transformer's Linear layers, of an adapted one as they are merged, in its original
    layout; float64."""
    names = architecture_of(transformer).published_names
    parameters = {}
    for path, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and names.original_layer(path) is not None:
            parameters[f"{path}.weight"] = module.weight.detach().double().clone()
    return original_checkpoint(parameters, names)


def merged_original_weights(transformer, path) -> dict[str, Tensor]:
    """`original_weights` with a file loaded and merged."""
    adapter = da.load(transformer, path)
    da.merge(adapter)
    try:
        return original_weights(transformer)
    finally:
        da.unmerge(adapter)
        da.detach(adapter)


def factors(shape, seed=0, block_diagonal=1) -> tuple[Tensor, Tensor]:
    """Random `down (r, in)` and `up (out, r)`; an up of so many diagonal blocks."""
    generator = torch.Generator().manual_seed(seed)
    out, width = shape
    rank = RANK * block_diagonal
    down = torch.randn(rank, width, generator=generator) / 4
    up = torch.randn(out, rank, generator=generator) / 4
    if block_diagonal > 1:
        mask = torch.block_diag(*[torch.ones(out // block_diagonal, RANK)] * block_diagonal)
        up = up * mask
    return down, up


SPELLINGS = {
    "kohya": lambda path: ("lora_unet_" + path.replace(".", "_"), "lora_down", "lora_up"),
    "lycoris": lambda path: ("lycoris_" + path.replace(".", "_"), "lora_down", "lora_up"),
    "ai-toolkit": lambda path: (f"diffusion_model.{path}", "lora_A", "lora_B"),
    "bare": lambda path: (path, "lora_down", "lora_up"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_of_every_original_weight_comes_back_merged(family, spelling, pipes, tmp_path):
    transformer = pipes(family).transformer
    before = original_weights(transformer)
    tensors = {}
    expected = {}
    for number, (key, weight) in enumerate(before.items()):
        name, down_key, up_key = SPELLINGS[spelling](key.removesuffix(".weight"))
        down, up = factors(weight.shape, seed=number)
        tensors[f"{name}.{down_key}.weight"] = down
        tensors[f"{name}.{up_key}.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
        expected[key] = weight + ALPHA / RANK * (up.double() @ down.double())
    save_file(tensors, tmp_path / "file.safetensors")
    merged = merged_original_weights(transformer, tmp_path / "file.safetensors")
    for key, weight in expected.items():
        assert (merged[key] - weight).abs().max() < 1e-6, key
    assert all(torch.equal(before[key], weight) for key, weight in original_weights(transformer).items())


FUSED = {  # family -> an original weight that holds several layers, in kohya's spelling, and their number
    "sd3": ("lora_unet_joint_blocks_1_x_block_attn_qkv", 3),
    "flux": ("lora_unet_double_blocks_0_img_attn_qkv", 3),
    "flux2_klein": ("lora_unet_double_blocks_1_txt_attn_qkv", 3),
    "z_image": ("lora_unet_layers_0_attention_qkv", 3),
    "chroma": ("lora_unet_double_blocks_0_txt_attn_qkv", 3),
    "pixart_sigma": ("lora_unet_blocks_0_cross_attn_kv_linear", 2),
}


def original_key(name: str, weights: dict[str, Tensor]) -> str:
    """The key of an original weight from its name in kohya's spelling."""
    flat = {key.removesuffix(".weight").replace(".", "_"): key for key in weights}
    return flat[name.removeprefix("lora_unet_")]


@pytest.mark.parametrize("family", FUSED)
def test_each_layer_of_a_block_diagonal_file_has_the_rank_of_its_block(family, pipes, tmp_path):
    transformer = pipes(family).transformer
    name, count = FUSED[family]
    before = original_weights(transformer)
    key = original_key(name, before)
    down, up = factors(before[key].shape, block_diagonal=count)
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "file.safetensors")
    adapter = da.load(transformer, tmp_path / "file.safetensors")
    shapes = [tuple(tensor.shape) for tensor in adapter.parameters() if tensor.shape[0] == RANK]
    da.detach(adapter)
    assert len(shapes) == count
    merged = merged_original_weights(transformer, tmp_path / "file.safetensors")
    assert (merged[key] - before[key] - up.double() @ down.double()).abs().max() < 1e-6


def loha(shape, count):
    down_1, up_1 = factors(shape, 1)
    down_2, up_2 = factors(shape, 2)
    keys = {"hada_w1_a": up_1, "hada_w1_b": down_1, "hada_w2_a": up_2, "hada_w2_b": down_2}
    return keys, (up_1 @ down_1) * (up_2 @ down_2)


def lokr(shape, count):
    """Of whole rows of the left factor for each of the layers, so that it can be split."""
    generator = torch.Generator().manual_seed(1)
    left = torch.randn(2 * count, 4, generator=generator) / 4
    right = torch.randn(shape[0] // (2 * count), shape[1] // 4, generator=generator) / 4
    return {"lokr_w1": left, "lokr_w2": right}, torch.kron(left, right)


def whole(shape, count):
    difference = torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 4
    return {"diff": difference}, difference


@pytest.mark.parametrize("form", [loha, lokr, whole])
@pytest.mark.parametrize("family", FUSED)
def test_other_forms_are_split_by_rows_too(family, form, pipes, tmp_path):
    transformer = pipes(family).transformer
    name, count = FUSED[family]
    before = original_weights(transformer)
    key = original_key(name, before)
    tensors, change = form(before[key].shape, count)
    save_file({f"{name}.{end}": tensor for end, tensor in tensors.items()}, tmp_path / "file.safetensors")
    merged = merged_original_weights(transformer, tmp_path / "file.safetensors")
    assert (merged[key] - before[key] - change.double()).abs().max() < 1e-6
    for other, weight in merged.items():
        assert other == key or torch.equal(weight, before[other]), other


@pytest.mark.parametrize("family", ["flux", "flux2_klein", "krea2", "qwen_image"])
def test_projections_that_diffusers_fuses_are_split(family, pipes, tmp_path):
    transformer = pipes(family).transformer
    attention = transformer.transformer_blocks[0].attn
    names = ("to_q", "to_k", "to_v")
    before = [getattr(attention, name).weight.detach().clone() for name in names]
    down, up = factors(torch.cat(before).shape)
    name = "lycoris_transformer_blocks_0_attn_to_qkv"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, tmp_path / "file.safetensors")
    adapter = da.load(transformer, tmp_path / "file.safetensors")
    merged = [adapter.adapted_weight(f"transformer_blocks.0.attn.{name}") for name in names]
    da.detach(adapter)
    assert torch.allclose(torch.cat(merged), torch.cat(before) + up @ down, atol=1e-6)


def test_biases_and_magnitudes_of_outputs_are_split(pipes, tmp_path):
    transformer = pipes("flux").transformer
    name, _ = FUSED["flux"]
    before = original_weights(transformer)["double_blocks.0.img_attn.qkv.weight"]
    down, up = factors(before.shape)
    magnitude = torch.rand(len(before), 1) + 0.5
    bias = torch.randn(len(before))
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": magnitude, "diff_b": bias}
    save_file({f"{name}.{end}": tensor for end, tensor in tensors.items()}, tmp_path / "file.safetensors")
    merged = merged_original_weights(transformer, tmp_path / "file.safetensors")
    changed = before + up.double() @ down.double()
    expected = magnitude * changed / changed.norm(dim=1, keepdim=True)
    assert (merged["double_blocks.0.img_attn.qkv.weight"] - expected).abs().max() < 1e-6
    adapter = da.load(transformer, tmp_path / "file.safetensors")
    key = "transformer_blocks.0.attn.to_k"
    start = transformer.get_submodule(key).bias
    assert torch.allclose(adapter.adapted_bias(key) - start, bias[16:32], atol=1e-6)
    da.detach(adapter)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ({"lokr_w1": (4, 4), "lokr_w2": (12, 4)}, "LoKr of 4 x 12 outputs .*cannot be split; merge it"),
        ({"lora_down.weight": (2, 16), "lora_up.weight": (47, 2)}, "has 47 outputs, where this model has 48"),
        ({"lokr_w1": (), "lokr_w2": (12, 4)}, "has 0 outputs"),
        ({"diff": ()}, "has 0 outputs"),
        (
            {"hada_w1_a": (48, 2), "hada_w1_b": (2, 16), "hada_w2_a": (47, 2), "hada_w2_b": (2, 16)},
            "has 47 outputs",
        ),
        ({"lora_down.weight": (2, 16), "lora_up.weight": (48, 2), "diff_b": (16,)}, "has 16 outputs"),
        (
            {"lora_down.weight": (2, 16), "lora_up.weight": (48, 2), "dora_scale": (1, 16)},
            "norms over all the layers .*cannot be split; merge it",
        ),
    ],
)
def test_what_cannot_be_split_is_named(tensors, reason, pipes, tmp_path):
    name = FUSED["flux"][0]
    path = tmp_path / "file.safetensors"
    save_file({f"{name}.{end}": torch.ones(shape) for end, shape in tensors.items()}, path)
    with pytest.raises(ValueError, match=rf"file\.safetensors: {name} .*{reason}"):
        da.load(pipes("flux").transformer, path)


def test_a_file_of_another_family_says_so(pipes, tmp_path):
    down, up = factors((48, 16))
    name = FUSED["flux"][0]
    path = tmp_path / "file.safetensors"
    save_file({f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}, path)
    with pytest.raises(ValueError, match=r"does not have.*original code of FLUX.*a base of the family"):
        da.load(pipes("qwen_image").transformer, path)


DIFFUSERS_NAMES = {  # as trainers write the names of diffusers
    "transformer.": ("lora_A", "lora_B"),
    "diffusion_model.": ("lora_A", "lora_B"),
    "base_model.model.": ("lora_A", "lora_B"),
    "": ("lora_A.default", "lora_B.default"),
    "lora_unet_": ("lora_down", "lora_up"),
    "lora_transformer_": ("lora_down", "lora_up"),
    "lycoris_": ("lora_down", "lora_up"),
}


@pytest.mark.parametrize("prefix", DIFFUSERS_NAMES)
@pytest.mark.parametrize("family", ["flux2_klein", "qwen_image", "z_image"])
def test_names_of_diffusers_are_read_with_every_prefix(family, prefix, pipes, tmp_path):
    transformer = pipes(family).transformer
    down_key, up_key = DIFFUSERS_NAMES[prefix]
    tensors = {}
    expected = {}
    for number, (path, module) in enumerate(transformer.named_modules()):
        if isinstance(module, torch.nn.Linear):
            name = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
            down, up = factors(module.weight.shape, seed=number)
            tensors[f"{name}.{down_key}.weight"] = down
            tensors[f"{name}.{up_key}.weight"] = up
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
            expected[path] = module.weight.detach() + ALPHA / RANK * up @ down
    save_file(tensors, tmp_path / "file.safetensors")
    adapter = da.load(transformer, tmp_path / "file.safetensors")
    assert {site.name for site in adapter.sites} == expected.keys()
    for path, weight in expected.items():
        assert torch.allclose(adapter.adapted_weight(path), weight, atol=1e-6), path
    da.detach(adapter)


@pytest.mark.parametrize(("family", "count"), [("sd3", 2), ("flux", 1)])
def test_kohyas_files_hold_text_encoders_too(family, count, pipes, tmp_path):
    pipe = pipes(family)
    tensors = {}
    for number in range(1, count + 1):
        down, up = factors((32, 16), seed=number)
        name = f"lora_te{number}_text_model_encoder_layers_0_mlp_fc1"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    save_file(tensors, tmp_path / "file.safetensors")
    adapter = da.load(pipe, tmp_path / "file.safetensors")
    components = [site.name.partition(".")[0] for site in adapter.sites]
    da.detach(adapter)
    assert components == ["text_encoder", "text_encoder_2"][:count]


# Diffusers' own conversions as an oracle

CONVERTED = [  # family, spelling of its files, diffusers' conversion
    ("flux2_klein", "ai-toolkit", "_convert_non_diffusers_flux2_lora_to_diffusers"),
    ("flux2_klein", "kohya", "_convert_kohya_flux2_lora_to_diffusers"),
    ("krea2", "ai-toolkit", "_convert_non_diffusers_krea2_lora_to_diffusers"),
    ("z_image", "kohya", "_convert_non_diffusers_z_image_lora_to_diffusers"),
    ("qwen_image", "ai-toolkit", "_convert_non_diffusers_qwen_lora_to_diffusers"),
    ("qwen_image", "kohya", "_convert_non_diffusers_qwen_lora_to_diffusers"),
]


@pytest.mark.parametrize(("family", "spelling", "convert"), CONVERTED)
def test_the_changes_are_those_of_diffusers_conversion(family, spelling, convert, pipes, tmp_path):
    transformer = pipes(family).transformer
    tensors = {}
    for number, (key, weight) in enumerate(original_weights(transformer).items()):
        path = key.removesuffix(".weight")
        if "blocks" not in path and "layers" not in path and "refiner" not in path:
            continue  # not every conversion knows them, and FLUX.2's forgets to swap the halves of one
        name, down_key, up_key = SPELLINGS[spelling](path)
        down, up = factors(weight.shape, seed=number)
        tensors[f"{name}.{down_key}.weight"] = down
        tensors[f"{name}.{up_key}.weight"] = up
    save_file(tensors, tmp_path / "file.safetensors")
    converted = getattr(lora_conversion_utils, convert)(copy.copy(tensors))
    check_same_changes(transformer, tmp_path / "file.safetensors", converted)


def test_the_changes_of_kohyas_flux_files_are_those_of_diffusers_conversion(tmp_path):
    """In the published width, which diffusers' conversion counts on; the model has no memory for weights."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    names = architecture_of(transformer).published_names
    sizes: dict[str, int] = {}
    widths = {}
    for path, module in transformer.named_modules():
        place = names.original_layer(path)
        if not isinstance(module, torch.nn.Linear) or "blocks" not in place.path:
            continue
        sizes[place.path] = max(sizes.get(place.path, 0), place.first_row + module.out_features)
        widths[place.path] = module.in_features
    tensors = {}
    for number, path in enumerate(sizes):
        name, down_key, up_key = SPELLINGS["kohya"](path)
        blocks = 3 if path.endswith("img_attn.qkv") else 1
        down, up = factors((sizes[path], widths[path]), seed=number, block_diagonal=blocks)
        tensors[f"{name}.{down_key}.weight"] = down
        tensors[f"{name}.{up_key}.weight"] = up
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA)
    save_file(tensors, tmp_path / "file.safetensors")
    converted = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(dict(tensors))
    check_same_changes(transformer, tmp_path / "file.safetensors", converted)


def check_same_changes(transformer, path, converted):
    """That a file changes the layers that diffusers' conversion names, by the same products."""
    changes = locate(open_foreign(path), {"transformer": transformer})
    assert {f"transformer.{layer}.lora_A.weight" for _, layer in changes} == {
        key for key in converted if key.endswith("lora_A.weight")
    }
    for (_, layer), change in changes.items():
        down, up = (converted[f"transformer.{layer}.lora_{factor}.weight"].double() for factor in "AB")
        x = torch.randn(down.shape[1], 2, dtype=torch.float64)
        ours = change.multiplier * change.tensors["up"].double() @ (change.tensors["down"].double() @ x)
        assert torch.allclose(ours, up @ (down @ x), rtol=1e-5, atol=1e-5), layer
