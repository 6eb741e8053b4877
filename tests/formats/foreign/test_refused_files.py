"""Files of other programs that do not fit or are no adapters: the error names the file, and what it is."""

import json

import pytest
import torch
from helpers.foreign_cases import unet
from helpers.models import denoiser, state
from helpers.pipelines import tiny_sd_pipeline
from helpers.sgm_layout import write_single_file
from safetensors.torch import load_file, save_file

import diffadapt as da
from diffadapt.formats.edit.open_adapters import open_without_base
from diffadapt.formats.foreign.keys import UNSUPPORTED_ENDS, UNSUPPORTED_STARTS

# names of the factors of conv_in (8, 4, 3, 3) in every format
FACTOR_KEYS = {
    "kohya": ("lora_unet_conv_in.lora_down.weight", "lora_unet_conv_in.lora_up.weight"),
    "diffusers": ("unet.conv_in.lora_A.weight", "unet.conv_in.lora_B.weight"),
    "peft": ("base_model.model.conv_in.lora_A.weight", "base_model.model.conv_in.lora_B.weight"),
}
WRONG_SHAPES = {
    "another number of outputs": ((2, 4, 3, 3), (7, 2, 1, 1)),
    "another number of inputs": ((2, 5, 3, 3), (8, 2, 1, 1)),
    "another kernel": ((2, 4, 5, 5), (8, 2, 1, 1)),
    "two ranks": ((3, 4, 3, 3), (8, 2, 1, 1)),
}


def write_lora(folder, file_format, down_shape, up_shape):
    """A LoRA of conv_in. Returns what to open, and the file of tensors."""
    down_key, up_key = FACTOR_KEYS[file_format]
    tensors = {down_key: torch.ones(down_shape), up_key: torch.ones(up_shape)}
    if file_format != "peft":
        save_file(tensors, folder / "lora.safetensors")
        return folder / "lora.safetensors", folder / "lora.safetensors"
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder, folder / "adapter_model.safetensors"


def refusal(path, model=None):
    """The message of the error, which leaves the model as it was."""
    model = model or denoiser()
    before = state(model)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  (callers look at the message)
        da.load(model, path)
    assert state(model) == before
    return str(caught.value)


@pytest.mark.parametrize("file_format", FACTOR_KEYS)
def test_factors_that_fit_are_read(tmp_path, file_format):
    path, _ = write_lora(tmp_path, file_format, (2, 4, 3, 3), (8, 2, 1, 1))
    model = denoiser()
    expected = model.conv_in.weight.detach() + 2
    adapter = da.load(model, path)
    assert torch.equal(adapter.adapted_weight("conv_in"), expected)


@pytest.mark.parametrize("shapes", WRONG_SHAPES)
@pytest.mark.parametrize("file_format", FACTOR_KEYS)
def test_a_wrong_shape_is_named_with_the_file_and_the_layer(tmp_path, file_format, shapes):
    path, file = write_lora(tmp_path, file_format, *WRONG_SHAPES[shapes])
    message = refusal(path)
    assert message.startswith(f"{file}: ")
    assert "conv_in" in message
    assert "shape" in message


@pytest.mark.parametrize("file_format", FACTOR_KEYS)
def test_factors_of_two_ranks_are_named_without_a_base_too(tmp_path, file_format):
    path, file = write_lora(tmp_path, file_format, (3, 4, 3, 3), (8, 2, 1, 1))
    with pytest.raises(ValueError, match=r"conv_in.*shape") as caught:
        open_without_base([(str(path), 1.0)])
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("key", [*(f"x{end}" for end in UNSUPPORTED_ENDS), *UNSUPPORTED_STARTS])
def test_every_kind_that_is_not_supported_is_named(tmp_path, key):
    kind = {**{f"x{end}": kind for end, kind in UNSUPPORTED_ENDS.items()}, **UNSUPPORTED_STARTS}[key]
    save_file({key: torch.ones(1)}, tmp_path / "other.safetensors")
    message = refusal(tmp_path / "other.safetensors")
    assert message.startswith(f"{tmp_path / 'other.safetensors'} holds {kind} (keys such as {key}")
    assert "not supported" in message


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [("diag-oft", "OFT or BOFT"), ("boft", "OFT or BOFT"), ("glora", "GLoRA"), ("ia3", "IA3")],
)
def test_what_lycoris_writes_of_other_algorithms_is_not_supported(tmp_path, algorithm, kind):
    lycoris = pytest.importorskip("lycoris")
    model = unet()
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Attention"], "target_name": []})
    network = lycoris.create_lycoris(model, 1.0, linear_dim=2, linear_alpha=1.0, algo=algorithm)
    network.apply_to()
    network.save_weights(str(tmp_path / "other.safetensors"), torch.float32, {})
    message = refusal(tmp_path / "other.safetensors", unet())
    assert f"holds {kind} (keys such as " in message
    assert "not supported" in message


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_sd_pipeline(tmp_path_factory.mktemp("base"), vae="kl")


@pytest.mark.parametrize("with_positions", [False, True])
def test_a_whole_checkpoint_is_told_from_a_lora(tmp_path, base, with_positions):
    file = write_single_file(base, tmp_path / "model.safetensors")
    tensors = load_file(file)
    if with_positions:  # as the file of Stable Diffusion 1.5 has them
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(24)
    save_file(tensors, file)
    message = refusal(file)
    assert f"{file} holds a whole checkpoint (keys such as " in message
    assert "diffadapt extract" in message


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_the_weights_of_a_model_are_told_from_a_lora(tmp_path, base, component):
    (file,) = (base / component).glob("*.safetensors")
    message = refusal(file)
    assert f"{file} is not a diffadapt file, and holds the weights of a model, not an adapter" in message
    assert "diffadapt extract" in message


def test_a_parameter_of_another_name_does_not_hide_that_a_file_is_a_model(tmp_path, base):
    (file,) = (base / "text_encoder").glob("*.safetensors")
    tensors = load_file(file)
    tensors["logit_scale"] = torch.ones(())
    save_file(tensors, tmp_path / "clip.safetensors")
    assert "holds the weights of a model, not an adapter" in refusal(tmp_path / "clip.safetensors")
