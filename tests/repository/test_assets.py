"""What is shipped opens with stock loaders, offline, and is what its cards say."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from datasets import load_dataset
from diffusers import StableDiffusionPipeline, UNet2DModel
from PIL import Image
from safetensors import safe_open
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffadapt.assets import ROOT, embedded, names
from diffadapt.data.hub_tables import open_table, read_labelled_table
from diffadapt.metrics.digit_classifier import class_agreement, load_digit_classifier
from diffadapt.models.families import load_base
from diffadapt.models.sampling import ImageRequest, SamplingConfig, generate_all
from diffadapt.training.report.held_out import center_pixels

pytestmark = pytest.mark.slow


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


@pytest.mark.slow
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
    paths = list(ROOT.rglob("*.safetensors"))
    assert {path.relative_to(ROOT).parts[0] for path in paths} == {
        "emoji",
        "clip",
        "digits",
        "digit-classifier",
    }
    for path in paths:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, path


def test_sizes_stay_small(clip):
    assert sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()) < 30e6
    assert sum(p.numel() for p in clip.parameters()) < 2e6


def test_configurations_name_no_folder_of_the_build():
    for path in ROOT.rglob("*.json"):
        assert "_name_or_path" not in json.loads(path.read_text(encoding="utf-8")), path


@pytest.mark.parametrize("folder", ["emoji", "clip"])
def test_models_carry_their_licences(folder):
    assert "Apache License" in (ROOT / folder / "LICENSE-noto-emoji.txt").read_text(encoding="utf-8")
    assert "Attribution 4.0 International" in (ROOT / folder / "LICENSE-twemoji.txt").read_text(
        encoding="utf-8"
    )
    assert "Twemoji, Copyright" in (ROOT / folder / "NOTICE.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", ["subjects", "style/fluent3d"])
def test_images_carry_their_licence(folder):
    text = (ROOT / folder / "LICENSE").read_text(encoding="utf-8")
    assert "Copyright (c) Microsoft Corporation" in text
    assert "MIT License" in text


def test_the_card_of_the_base_tells_the_measured_figures():
    card = (embedded("emoji") / "README.md").read_text(encoding="utf-8")
    figures = json.loads((embedded("emoji") / "figures.json").read_text(encoding="utf-8"))
    assert figures["sampling"]["captions"] == 200
    assert f"{100 * figures['sampling']['top5']:.1f} %" in card
    assert f"{figures['unet']['steps']:,} steps" in card
    for name in ("noto", "twemoji", "cat", "monkey"):
        assert f"{figures['vae'][f'psnr_{name}']:.1f} dB" in card


def test_the_card_of_clip_tells_the_measured_figures():
    card = (embedded("clip") / "README.md").read_text(encoding="utf-8")
    figures = json.loads((embedded("clip") / "figures.json").read_text(encoding="utf-8"))
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
        rows[part] = [
            json.loads(line) for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        ]
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
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
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


@pytest.mark.slow
def test_the_digits_base_draws_the_digit_that_is_asked_for():
    base = load_base("embedded:digits")
    assert (base.profile.name, base.resolution, base.num_classes, base.null_class) == ("digits", 16, 10, 10)
    shots = [ImageRequest("", seed, seed % 10) for seed in range(60)]
    drawn = generate_all(
        base.pipe, shots, SamplingConfig(num_inference_steps=10, guidance_scale=2.0, batch_size=60)
    )
    labels = torch.tensor([shot.label for shot in shots])
    assert class_agreement(load_digit_classifier()(drawn)["logits"], labels) > 0.8
    assert (drawn.amax(dim=1) - drawn.amin(dim=1)).mean() > 0.1  # colours, not greys


def test_stock_diffusers_opens_the_unet_of_the_digits_base():
    unet = UNet2DModel.from_pretrained(embedded("digits"), subfolder="unet")
    assert unet.dtype == torch.float32
    assert unet.config.num_class_embeds == 11
    widths = {p.shape for name, p in unet.named_parameters() if name.endswith(("to_q.weight", "to_v.weight"))}
    assert len(widths) > 1  # attention of several sizes


def test_the_classifier_of_digits_reads_handwriting_it_never_saw():
    table = open_table(str(embedded("handwriting")), split="test")
    examples, digits = read_labelled_table(table, name="handwriting")
    assert digits == [str(digit) for digit in range(10)]
    logits = load_digit_classifier()(center_pixels(examples, 16))["logits"]
    agreement = class_agreement(logits, torch.tensor([example.caption for example in examples]))
    figures = json.loads((embedded("digit-classifier") / "figures.json").read_text(encoding="utf-8"))
    assert agreement == pytest.approx(figures["handwriting_held_out"], abs=0.003)
    assert agreement >= 0.97


def test_handwriting_is_scikit_learns_in_two_parts_with_its_licences():
    parts = load_dataset(str(embedded("handwriting")))
    assert {name: len(part) for name, part in parts.items()} == {"train": 1400, "test": 397}
    assert {image.size for image in parts["test"]["image"]} == {(8, 8)}
    assert "Alpaydin" in (embedded("handwriting") / "LICENSE-uci.txt").read_text(encoding="utf-8")
    assert "scikit-learn developers" in (embedded("handwriting") / "LICENSE-scikit-learn.txt").read_text(
        encoding="utf-8"
    )


def test_the_cards_of_the_digits_tell_the_measured_figures():
    card = (embedded("digit-classifier") / "README.md").read_text(encoding="utf-8")
    figures = json.loads((embedded("digit-classifier") / "figures.json").read_text(encoding="utf-8"))
    assert f"{100 * figures['handwriting_held_out']:.2f} %" in card
    assert f"{100 * figures['printed_unseen']:.2f} %" in card
    assert f"{figures['parameters']:,} parameters" in card
    card = (embedded("digits") / "README.md").read_text(encoding="utf-8")
    figures = json.loads((embedded("digits") / "figures.json").read_text(encoding="utf-8"))
    assert f"{figures['unet']['parameters']:,} parameters" in card
    assert f"{figures['unet']['steps']:,} steps" in card
    for guidance in ("1", "2", "4"):
        assert f"{100 * figures[f'guidance_{guidance}']['class_agreement']:.1f} %" in card
        assert f"{figures[f'guidance_{guidance}']['frechet_distance']:.3f}" in card
