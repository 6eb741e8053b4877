"""Names of bases: which family they belong to, what is cut from captions, what replaces an autoencoder."""

import json

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from helpers.pipelines import tiny_sd_pipeline, tiny_sdxl_pipeline, write_pictures

from diffadapt.common.images import list_images, open_image, to_pixels
from diffadapt.models import base_names
from diffadapt.models.caption_limits import TruncatedCaption
from diffadapt.models.families import load_base, profile_of, profiles, sampling_defaults


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("bases")
    tiny_sd_pipeline(place / "sd")
    tiny_sdxl_pipeline(place / "sdxl")
    tiny_sd_pipeline(place / "kl", vae="kl", seed=1)
    return place


def test_what_was_tuned_on_an_embedded_base_is_for_it_alone(place):
    assert profile_of("embedded:emoji").name == "emoji"
    assert profile_of(base_names.resolve("embedded:emoji")).name == "sd"  # a copy under another name
    assert profile_of(str(place / "sd")).name == "sd"
    assert profile_of(str(place / "sdxl")).name == "sdxl"
    assert profiles()["sd"].tuned_methods == profiles()["sdxl"].tuned_methods == {}


def test_every_family_of_words_has_prompts_to_show_a_subject_with():
    for family in ("emoji", "sd", "sdxl"):
        assert len(profiles()[family].context_prompts) == 10
        assert len(profiles()[family].unrelated_prompts) == 12


def test_a_hub_name_is_known_by_its_index_alone(tmp_path, monkeypatch):
    index, asked = tmp_path / "model_index.json", []

    def download(repository, file, *, revision):
        asked.append((repository, file, revision))
        return str(index)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    index.write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}), encoding="utf-8")
    assert profile_of("somebody/base", revision="v2").name == "sdxl"
    assert asked == [("somebody/base", "model_index.json", "v2")]
    index.write_text(json.dumps({"_class_name": "HunyuanDiTPipeline"}), encoding="utf-8")
    with pytest.raises(ValueError, match="is a HunyuanDiTPipeline; the known kinds are StableDiffusion"):
        load_base("somebody/base")
    assert sampling_defaults("somebody/base") == profiles()["sd"].defaults


def test_a_variant_chooses_the_files_and_a_revision_goes_to_the_hub(tmp_path, place, monkeypatch):
    pipe = load_base(str(place / "sd")).pipe
    pipe.save_pretrained(tmp_path / "both")
    for model in (pipe.unet, pipe.vae, pipe.text_encoder):
        for parameter in model.parameters():
            parameter.data.mul_(2)
    pipe.save_pretrained(tmp_path / "both", variant="fp16")
    plain, doubled = (load_base(str(tmp_path / "both"), variant=name).pipe for name in (None, "fp16"))
    assert torch.equal(doubled.unet.conv_in.weight, 2 * plain.unet.conv_in.weight)
    asked = []

    def open_from(place, **options):
        asked.append((place, options["revision"], options["variant"]))
        return pipe

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", open_from)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *_, **__: str(place / "sd" / "model_index.json")
    )
    load_base("somebody/base", revision="v2", variant="fp16")
    assert asked == [("somebody/base", "v2", "fp16")]


def test_names_that_lead_nowhere_are_errors_with_a_remedy(tmp_path):
    for name in (str(tmp_path / "gone"), "./gone", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"no base model at '{name}'; give a diffusers folder"):
            load_base(name)
    with pytest.raises(OSError, match=r"no folder 'somebody/gone' here, and the hub does not give"):
        load_base("somebody/gone")
    with pytest.raises(ValueError, match=r"has no model_index.json"):
        profile_of("embedded:clip")
    (tmp_path / "model_index.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="is not the index of a diffusers pipeline"):
        load_base(str(tmp_path))


def test_a_base_without_a_text_encoder_is_named_with_what_it_lacks(place, tmp_path):
    pipe = load_base(str(place / "sdxl")).pipe
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no text_encoder, tokenizer; give the folder of a whole pipe"):
        load_base(str(tmp_path))


def test_revision_and_variant_reach_the_loader(place, tmp_path):
    pipe = load_base(str(place / "sd")).pipe
    pipe.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(OSError, match=r"diffusion_pytorch_model|variant"):
        load_base(str(tmp_path))
    assert load_base(str(tmp_path), variant="fp16").family == "sd"


@pytest.mark.parametrize("source", ["autoencoder's folder", "pipeline's folder"])
@pytest.mark.slow
def test_another_autoencoder_replaces_the_bases_own(place, tmp_path, source):
    other = place / "kl" / "vae" if source == "autoencoder's folder" else place / "kl"
    model, plain = load_base(str(place / "sdxl"), vae=str(other)), load_base(str(place / "kl"))
    assert model.is_stochastic
    assert not load_base(str(place / "sdxl")).is_stochastic
    pixels = to_pixels(open_image(list_images(write_pictures(tmp_path, 1))[0]), 32)[None]
    assert torch.equal(model.encode_images(pixels), plain.encode_images(pixels))
    assert not any(parameter.requires_grad for parameter in model.pipe.vae.parameters())


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_wrong_prediction_type_can_be_put_right_for_training_and_drawing(place, family):
    model = load_base(str(place / family), prediction_type="v_prediction")
    assert model.training_schedule().config.prediction_type == "v_prediction"
    assert model.pipe.scheduler.config.prediction_type == "v_prediction"
    assert load_base(str(place / family)).training_schedule().config.prediction_type == "epsilon"


def test_a_wrong_autoencoder_is_an_error(place, tmp_path):
    with pytest.raises(FileNotFoundError, match="no autoencoder at"):
        load_base(str(place / "sd"), vae=str(tmp_path / "gone"))
    with pytest.raises(ValueError, match="is a UNet2DConditionModel; an autoencoder is one of"):
        load_base(str(place / "sd"), vae=str(place / "sd" / "unet"))
    small = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(ValueError, match=r"4 channels, 2 times smaller .* works with 4 channels, 4 times"):
        load_base(str(place / "sd"), vae=str(tmp_path / "small"))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_captions_that_are_too_long_are_named_with_what_is_lost(place, family):
    model = load_base(str(place / family))  # 24 tokens, of which start and end take two; one per letter
    fits, long = "abcdefghijklmnopqrstuv", "abcdefghijk lmnopqrstuvwxyz"
    assert model.truncated_captions([fits, "a dog"]) == []
    cut = TruncatedCaption(long, length=26, limit=22, lost="wxyz")
    assert model.truncated_captions([long, fits, long]) == [cut]
    ids = model.tokens([long])["input_ids"]
    assert torch.equal(ids, model.tokens([long.replace("wxyz", "abc")])["input_ids"])  # really lost


def test_each_tokenizer_of_sdxl_has_its_own_limit(place):
    model = load_base(str(place / "sdxl"))
    model.pipe.tokenizer_2.model_max_length = 12
    assert [cut.limit for cut in model.truncated_captions(["abcdefghijklmnop"])] == [10]
