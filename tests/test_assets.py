"""What is shipped opens with stock loaders, offline, and is what its cards say."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffadapt.assets import ROOT, embedded, names


@pytest.fixture(scope="module")
def pipe():
    pipe = StableDiffusionPipeline.from_pretrained(embedded("emoji"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def clip():
    return CLIPModel.from_pretrained(embedded("clip")).eval()


def draw(pipe, text, **options):
    options = {"num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "pt"} | options
    return pipe(text, generator=torch.Generator().manual_seed(0), **options).images


def pixels(image):
    return CLIPImageProcessor.from_pretrained(embedded("clip"))(
        images=image, return_tensors="pt"
    ).pixel_values


def test_stock_pipeline_draws_64_pixel_images_by_default(pipe):
    image = draw(pipe, "a pizza emoji")
    assert image.shape == (1, 3, 64, 64)
    assert torch.isfinite(image).all()
    assert image.std() > 0.05
    assert pipe.unet.dtype == pipe.text_encoder.dtype == pipe.vae.dtype == torch.float32


def test_the_words_decide_what_is_drawn(pipe, clip):
    wanted = ["a green apple emoji", "a blue heart emoji", "a pizza emoji"]
    images = [
        pipe.image_processor.pt_to_numpy(draw(pipe, text, num_inference_steps=15))[0] for text in wanted
    ]
    images = [Image.fromarray((image * 255).round().astype("uint8")) for image in images]
    tokens = CLIPTokenizer.from_pretrained(embedded("clip"))(
        wanted, padding=True, return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        logits = clip(input_ids=tokens, pixel_values=pixels(images)).logits_per_image
    assert logits.argmax(1).tolist() == [0, 1, 2]


def test_latents_need_no_scaling_factor_and_decode_an_unseen_subject(pipe):
    assert pipe.vae.config.scaling_factor == 1
    images = [Image.open(path).resize((64, 64)) for path in sorted(embedded("subjects/cat").glob("*.png"))]
    real = pipe.image_processor.preprocess(images)
    with torch.no_grad():
        latents = pipe.vae.encode(real).latents
        made = pipe.vae.decode(latents).sample.clamp(-1, 1)
    assert latents.shape == (9, 16, 8, 8)
    assert 0.7 < latents.std() < 1.3
    assert -10 * ((made - real).square().mean() / 4).log10() > 20  # dB


def test_weights_are_half_precision():
    for path in [*embedded("emoji").rglob("*.safetensors"), *embedded("clip").glob("*.safetensors")]:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, path


def test_sizes_stay_small(clip):
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) < 30e6
    assert sum(p.numel() for p in clip.parameters()) < 2e6


def test_configurations_name_no_folder_of_the_build():
    for path in ROOT.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text()), path


@pytest.mark.parametrize("folder", ["emoji", "clip"])
def test_models_carry_their_licences(folder):
    assert "Apache License" in (ROOT / folder / "LICENSE-noto-emoji.txt").read_text()
    assert "Attribution 4.0 International" in (ROOT / folder / "LICENSE-twemoji.txt").read_text()
    assert "Twemoji, Copyright" in (ROOT / folder / "NOTICE.txt").read_text()


@pytest.mark.parametrize("folder", ["subjects", "style/fluent3d"])
def test_images_carry_their_licence(folder):
    text = (ROOT / folder / "LICENSE").read_text()
    assert "Copyright (c) Microsoft Corporation" in text
    assert "MIT License" in text


def test_the_card_of_the_base_tells_the_measured_figures():
    card = (embedded("emoji") / "README.md").read_text()
    figures = json.loads((embedded("emoji") / "figures.json").read_text())
    assert figures["sampling"]["captions"] == 200
    assert f"{100 * figures['sampling']['top5']:.1f} %" in card
    assert f"{figures['unet']['steps']:,} steps" in card
    for name in ("noto", "twemoji", "cat", "monkey"):
        assert f"{figures['vae'][f'psnr_{name}']:.1f} dB" in card


def test_the_card_of_clip_tells_the_measured_figures():
    card = (embedded("clip") / "README.md").read_text()
    figures = json.loads((embedded("clip") / "figures.json").read_text())
    for name in ("in_batch_accuracy", "name_top5", "image_top5"):
        assert f"{100 * figures[name]:.1f} %" in card


def test_subjects_are_nine_cats_and_three_monkeys():
    for name, count in (("subjects/cat", 9), ("subjects/monkey", 3)):
        files = list(embedded(name).iterdir())
        assert len(files) == count
        assert {Image.open(file).size for file in files} == {(128, 128)}


def test_style_images_and_captions_match_and_the_parts_share_nothing():
    rows = {}
    for part, count in (("train", 300), ("held_out", 200)):
        folder = embedded(f"style/fluent3d/{part}")
        rows[part] = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
        assert len(rows[part]) == count
        assert {row["file_name"] for row in rows[part]} == {path.name for path in folder.glob("*.webp")}
        assert all(row["text"].startswith(("a ", "an ")) for row in rows[part])
    seen = {part: {row["file_name"] for row in rows[part]} for part in rows}
    assert not seen["train"] & seen["held_out"]
    subjects = [f"{code:x}.png" for code in (*range(0x1F638, 0x1F641), *range(0x1F648, 0x1F64B))]
    assert not (seen["train"] | seen["held_out"]) & set(subjects)


def test_tokenizer_round_trips_and_reads_prompt_words_whole():
    for folder in (embedded("emoji") / "tokenizer", embedded("clip")):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        assert len(tokenizer) == 2000
        text = "a sks cat face emoji"
        assert tokenizer.tokenize(text) == ["a</w>", "sks</w>", "cat</w>", "face</w>", "emoji</w>"]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
        unknown = tokenizer("zwx é 猫").input_ids
        assert unknown.count(tokenizer.eos_token_id) == 1  # no unknown piece


def test_a_copied_vocabulary_reads_the_same_without_tokenizer_json():
    folder = embedded("clip")
    vocab = json.loads((folder / "vocab.json").read_text())
    lines = (folder / "merges.txt").read_text().splitlines()[1:]
    slow = CLIPTokenizer(vocab=vocab, merges=[tuple(line.split()) for line in lines])
    text = "a kissing monkey next to a pizza"
    assert slow(text).input_ids == CLIPTokenizer.from_pretrained(folder)(text).input_ids


def test_embedded_names_what_is_shipped():
    assert {"emoji", "clip", "subjects/cat", "subjects/monkey", "style/fluent3d"} <= set(names())
    for name in names():
        assert embedded(name).is_dir()


@pytest.mark.parametrize("name", ["emojy", "cat", "../assets", "", "/"])
def test_an_unknown_name_is_an_error_that_lists_what_exists(name):
    with pytest.raises(ValueError, match="subjects/cat, subjects/monkey"):
        embedded(name)


def test_a_misspelt_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean emoji"):
        embedded("emojy")
