"""What a family says about its layers reaches the choice of layers, and names in files of other programs."""

import pytest
from torch import nn

import diffadapt as da
from diffadapt.adapters import architectures
from diffadapt.adapters.architectures import UNKNOWN, Architecture, PublishedNames, architecture_of
from diffadapt.adapters.attach import choose_sites
from diffadapt.formats.export.layer_names import kohya_name
from diffadapt.models.families import load_base


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_qkv_mlp = nn.Linear(4, 4)
        self.to_q = nn.Linear(4, 4)


class Toy(nn.Module):
    """A denoiser whose last block's query nothing reads."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.proj = nn.Linear(4, 4)


TOY = Architecture(
    "toy",
    "transformer",
    target_presets={"attention": ("*.to_qkv_mlp", "*.to_q"), "outputs": ("proj",)},
    unread_layers={"transformer": ("blocks.1.to_q",)},
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(architectures, "_DESCRIPTIONS", list(architectures._DESCRIPTIONS))
    architectures.register_architecture(lambda model, _: TOY if isinstance(model, Toy) else None)


def chosen(model, targets):
    return [choice.site.name for choice in choose_sites(model, da.LoRA(rank=1), targets)[1]]


def test_a_familys_presets_take_the_place_of_the_general_rule():
    attention = ["blocks.0.to_qkv_mlp", "blocks.0.to_q", "blocks.1.to_qkv_mlp"]
    assert chosen(Toy(), "attention") == attention
    assert chosen(Toy(), "attention+outputs") == [*attention, "proj"]
    assert len(chosen(Toy(), "linear")) == 4


def test_layers_that_nothing_reads_are_left_out():
    with pytest.raises(ValueError, match="chooses only layers that no output of the model depends on"):
        chosen(Toy(), "blocks.1.to_q")


def test_other_models_follow_the_general_rules():
    model = nn.Sequential(nn.Linear(4, 4))
    assert architecture_of(model) is UNKNOWN
    with pytest.raises(ValueError, match="'outputs' matches no layer"):
        chosen(model, "outputs")


def test_names_in_kohyas_files_follow_the_published_names():
    names = PublishedNames("toy", "toy_v1", 64, original_path={"a.b": "x.y"}.get, numbers_first_encoder=True)
    base = Architecture("toy", "unet", published_names=names)
    assert kohya_name("unet", "a.b", base) == "lora_unet_x_y"
    assert kohya_name("unet", "a.c", base) == "lora_unet_a_c"
    assert kohya_name("text_encoder", "layers.0", base) == "lora_te1_text_model_layers_0"
    assert kohya_name("text_encoder_4", "layers.0", base) == "lora_te4_text_model_layers_0"
    with pytest.raises(ValueError, match="no name for layers of image_encoder"):
        kohya_name("image_encoder", "layers.0", base)


def test_the_embedded_base_is_a_stable_diffusion_of_other_sizes():
    architecture = architecture_of(load_base("embedded:emoji").denoiser)
    assert (architecture.name, architecture.component) == ("sd1", "unet")
    assert not architecture.published_names.has_published_sizes
