"""Batches are functions of the position: order, noise and crops do not depend on what came before."""

import numpy as np
import pytest
import torch
from helpers.pipelines import tiny_sd_pipeline, write_pictures
from PIL import Image

from diffadapt.common.images import list_images, open_image, to_pixels
from diffadapt.data.batches import Batches
from diffadapt.data.buckets import Buckets
from diffadapt.data.class_images import RECORD, ClassRecipe, class_examples, planned_class_examples
from diffadapt.data.encoding import Crop
from diffadapt.data.examples import Example, ShuffledOrder, folder_examples
from diffadapt.data.trigger_words import add_trigger_word, contains_word
from diffadapt.models.families import load_base
from diffadapt.models.sampling import SamplingConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_base(str(tiny_sd_pipeline(tmp_path_factory.mktemp("base"), vae="kl")))


def same(first, second):
    return (
        torch.equal(first.latents, second.latents)
        and torch.equal(first.noise, second.noise)
        and torch.equal(first.timesteps, second.timesteps)
        and all(torch.equal(v, second.conditions[k]) for k, v in first.conditions.items())
    )


def test_every_epoch_uses_every_picture_once_in_its_own_order():
    order = ShuffledOrder(instances=9, classes=0, seed=0)
    epochs = [[d.index for d in order.sample_indices(range(9 * e, 9 * e + 9))] for e in range(3)]
    assert all(sorted(epoch) == list(range(9)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_no_two_draws_of_a_run_share_their_randomness():
    order = ShuffledOrder(instances=3, classes=7, seed=0)
    draws = order.sample_indices(range(21))
    assert len({(d.role, d.epoch, d.sample) for d in draws}) == len(draws) == 42
    assert {d.index for d in draws if d.role == "class"} == set(range(7))


def test_a_batch_does_not_depend_on_what_was_drawn_before(tmp_path, model):
    examples = folder_examples(write_pictures(tmp_path, 3, size=(48, 40)), "a dog")
    make = lambda: Batches(model, examples, resolution=32, center_crop=False, seed=1)  # noqa: E731
    first, second = make(), make()
    for start in range(0, 8, 2):
        first.batch(range(start, start + 2))
    assert same(first.batch(range(8, 12)), second.batch(range(8, 12)))
    assert not same(first.batch(range(8, 12)), first.batch(range(12, 16)))


def test_the_seed_changes_order_noise_and_timesteps(tmp_path, model):
    examples = folder_examples(write_pictures(tmp_path, 3), "a dog")
    one, two = (
        Batches(model, examples, resolution=32, center_crop=True, seed=s).batch(range(4)) for s in (0, 1)
    )
    assert not torch.equal(one.noise, two.noise)
    assert not torch.equal(one.timesteps, two.timesteps)


def test_latents_follow_the_posterior_and_the_scale_of_the_autoencoder(tmp_path, model):
    examples = folder_examples(write_pictures(tmp_path, 1), "a dog")
    batches = Batches(model, examples, resolution=32, center_crop=True, seed=0)
    drawn = batches.batch(range(200)).latents  # 200 posterior samples of one picture
    encoded, _ = batches.encoded_images.get(examples[0].source, Crop((32, 32)))
    mean, log_variance = encoded.chunk(2)
    scale = model.pipe.vae.config.scaling_factor
    assert torch.allclose(drawn.mean(0), mean * scale, atol=0.4 * scale)
    assert drawn.std(0).mean() == pytest.approx(float((0.5 * log_variance).exp().mean() * scale), rel=0.05)


def test_missing_class_pictures_are_drawn_and_present_ones_kept(tmp_path, model):
    write_pictures(tmp_path, 2)
    recipe = ClassRecipe("a dog", "a base", SamplingConfig(num_inference_steps=2, batch_size=2))
    examples = class_examples(model, tmp_path, recipe, count=5, seed=0)
    assert [e.source.name for e in examples][:3] == ["class-00000.png", "class-00001.png", "class-00002.png"]
    assert len(examples) == 5
    before = examples[0].source.stat().st_mtime_ns
    assert len(class_examples(model, tmp_path, recipe, count=6, seed=0)) == 6
    assert examples[0].source.stat().st_mtime_ns == before


def captioned(tmp_path, count=6, size=(40, 40)):
    pictures = list_images(write_pictures(tmp_path, count, size=size))
    return [Example(path, f"disc {index}") for index, path in enumerate(pictures)]


def make(model, examples, **given):
    return Batches(model, examples, **{"resolution": 32, "center_crop": True, "seed": 0, **given})


def told(model, batch):
    """The caption of each sample, known from its text states."""
    captions = ["", *(f"disc {i}" for i in range(6)), *(f"sks disc {i}" for i in range(6))]
    states = {caption: model.encode_captions([caption])["encoder_hidden_states"][0] for caption in captions}
    return [
        next(c for c, s in states.items() if torch.equal(s, row))
        for row in batch.conditions["encoder_hidden_states"]
    ]


def test_links_folders_and_other_files_among_class_images_are_told(tmp_path, model, capsys):
    folder = write_pictures(tmp_path / "class", 1)
    write_pictures(folder / "1_dog", 3)
    (folder / "._picture-0.png").write_bytes(b"written by macOS")
    (folder / "a.psd").write_bytes(b"")
    elsewhere = write_pictures(tmp_path / "elsewhere", 1)
    (folder / "b.png").symlink_to(elsewhere / "picture-0.png")
    recipe = ClassRecipe("a dog", "a base", SamplingConfig(num_inference_steps=1, batch_size=2))
    with pytest.raises(ValueError, match="--follow_links"):
        class_examples(model, folder, recipe, count=3, seed=0)
    planned = planned_class_examples(folder, recipe, count=3, side=32, follow_links=True)
    assert [str(e.source).rpartition("/")[2] for e in planned[:2]] == ["b.png", "picture-0.png"]
    capsys.readouterr()
    examples = class_examples(model, folder, recipe, count=3, seed=0, follow_links=True)
    assert [e.source.name for e in examples] == ["b.png", "class-00000.png", "picture-0.png"]
    assert "1 .psd, 1 folder in it (1_dog)" in capsys.readouterr().out


def test_a_file_as_the_folder_of_class_images_is_refused(tmp_path, model):
    file = write_pictures(tmp_path, 1) / "picture-0.png"
    recipe = ClassRecipe("a dog", "a base", SamplingConfig(num_inference_steps=1, batch_size=2))
    with pytest.raises(ValueError, match=r"picture-0\.png' is a file; give a folder"):
        class_examples(model, file, recipe, count=1, seed=0)
    with pytest.raises(ValueError, match=r"picture-0\.png' is a file; give a folder"):
        planned_class_examples(file, recipe, count=1, side=32)


@pytest.mark.parametrize("word", ["", "  "])
def test_a_blank_trigger_word_is_refused(tmp_path, model, word):
    with pytest.raises(ValueError, match="--trigger_word is blank"):
        make(model, captioned(tmp_path, 1), trigger_word=word)


def test_a_class_picture_is_whole_or_not_there(tmp_path, model, monkeypatch):
    save = Image.Image.save

    def killed(picture, path, **options):
        save(picture, path, **options)
        path.write_bytes(path.read_bytes()[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", killed)
    recipe = ClassRecipe("a dog", "a base", SamplingConfig(num_inference_steps=1, batch_size=1))
    with pytest.raises(KeyboardInterrupt):
        class_examples(model, tmp_path / "class", recipe, count=1, seed=0)
    assert [path.name for path in (tmp_path / "class").iterdir()] == [RECORD]


def test_captions_are_dropped_at_the_rate_asked_for_and_the_same_after_a_resume(tmp_path, model):
    examples = captioned(tmp_path)
    words = told(model, make(model, examples, caption_dropout=0.25).batch(range(200)))
    assert 30 <= words.count("") <= 70
    assert told(model, make(model, examples, caption_dropout=0.25).batch(range(150, 160))) == words[150:160]
    assert set(told(model, make(model, examples, caption_dropout=1.0).batch(range(4)))) == {""}
    with pytest.raises(ValueError, match="share between 0 and 1"):
        make(model, examples, caption_dropout=1.5)


def test_a_trigger_word_stands_before_every_caption_once(tmp_path, model):
    words = told(model, make(model, captioned(tmp_path), trigger_word="sks").batch(range(6)))
    assert sorted(words) == [f"sks disc {i}" for i in range(6)]
    assert add_trigger_word("sks disc", "sks") == "sks disc"
    assert add_trigger_word(3, "sks") == 3
    assert add_trigger_word("disc", None) == "disc"


def test_half_of_the_pictures_are_mirrored_and_encoded_as_such(tmp_path, model):
    examples = captioned(tmp_path, count=1, size=(64, 40))
    batches = make(model, examples, random_flip=True, cache_latents="memory")
    expected = [
        model.encode_images(to_pixels(open_image(examples[0].source), 32, flip=flip)[None])[0]
        for flip in (False, True)
    ]
    found = [batches._load(draw)[1] for draw in batches.order.sample_indices(range(60))]
    mirrored = [torch.equal(encoded, expected[1]) for encoded in found]
    assert all(m or torch.equal(e, expected[0]) for m, e in zip(mirrored, found, strict=True))
    assert 18 <= sum(mirrored) <= 42


def test_buckets_keep_shapes_and_fill_batches_with_one_size(tmp_path, model):
    examples = captioned(tmp_path / "wide", 3, (80, 40)) + captioned(tmp_path / "tall", 5, (40, 70))
    buckets = Buckets(((32, 32), (16, 32), (32, 16)), group=2)
    batches = make(model, examples, buckets=buckets)
    shapes = {tuple(batches.batch(range(p, p + 2)).latents.shape[-2:]) for p in range(0, 16, 2)}
    assert shapes == {(4, 8), (8, 4)}
    assert "3 of 16 x 32, 5 of 32 x 16" in batches.description
    with pytest.raises(ValueError, match="buckets and --streaming do not go together"):
        make(model, examples, buckets=buckets, is_streaming=True)


def test_noise_offset_moves_whole_channels(tmp_path, model):
    examples = captioned(tmp_path, 2)
    plain, moved = (make(model, examples, noise_offset=o).batch(range(3)).noise for o in (0.0, 0.1))
    change = moved - plain
    assert torch.allclose(change, change[..., :1, :1].expand_as(change), atol=1e-6)
    assert 0.01 < change[..., 0, 0].abs().mean() < 0.3


def test_streaming_reads_late_and_leaves_out_what_cannot_be_used(tmp_path, model, capsys):
    examples = captioned(tmp_path)
    whole = make(model, examples, cache_latents="none")
    late = make(model, examples, is_streaming=True)
    assert same(whole.batch(range(4)), late.batch(range(4)))
    examples[2].source.write_bytes(b"no picture")
    examples[4] = Example(examples[4].source, "")
    late = make(model, examples, is_streaming=True)
    assert examples[2] not in late.examples(range(6))
    words = told(model, late.batch(range(6)))
    assert set(words) == {f"disc {i}" for i in (0, 1, 3, 5)}
    shown = capsys.readouterr().out
    assert f"left out: {examples[2].source} cannot be read" in shown
    assert f"left out: {examples[4].source} has no caption" in shown
    for example in examples:
        example.source.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="in a row cannot be read"):
        late.batch(range(1))


def test_latents_that_are_no_numbers_are_named_before_the_first_step_or_left_to_the_loss(
    tmp_path, model, monkeypatch
):
    examples = captioned(tmp_path / "a", 3)
    spoiled, encode = to_pixels(open_image(examples[1].source), 32)[None], model.encode_images
    monkeypatch.setattr(
        model, "encode_images", lambda x: encode(x) * (float("nan") if torch.equal(x, spoiled) else 1)
    )
    with pytest.raises(ValueError, match=r"non-finite latents for .*picture-1"):
        make(model, examples)
    kept = {"cache_latents": "disk", "cache_dir": str(tmp_path / "cache"), "is_streaming": True}
    for options in ({"cache_latents": "none"}, kept):
        batches = make(model, examples, **options)
        finite = batches.batch(range(3)).latents.isfinite().flatten(1).all(1)
        assert finite.tolist() == ["picture-1" not in name for name in batches.names(range(3))]
    monkeypatch.undo()
    assert make(model, examples, **kept).batch(range(3)).latents.isfinite().all()  # it was not kept


def test_streaming_may_keep_encodings_on_disk_only(tmp_path, model):
    examples = captioned(tmp_path / "a", 3)
    kept = {"cache_latents": "disk", "cache_dir": str(tmp_path / "cache"), "is_streaming": True}
    first, again = (make(model, examples, **kept).batch(range(3)) for _ in range(2))
    assert same(first, again)
    with pytest.raises(ValueError, match="larger than memory"):
        make(model, examples, cache_latents="memory", is_streaming=True)


def test_no_pictures_are_an_error(model):
    for is_streaming in (False, True):
        with pytest.raises(ValueError, match="no images to train on"):
            make(model, [], is_streaming=is_streaming)


def test_encodings_of_random_cuts_are_not_kept(tmp_path, model):
    examples = captioned(tmp_path, 2, (64, 40))
    with pytest.raises(ValueError, match="add --center_crop"):
        make(model, examples, center_crop=False, cache_latents="memory")
    assert (
        "cropped at random and encoded in every step" in make(model, examples, center_crop=False).description
    )


def test_missing_and_cut_captions_are_told_before_the_first_step(tmp_path, model):
    examples = captioned(tmp_path, 2)
    long = [Example(examples[0].source, "a picture of a very long disc"), examples[1]]
    description = make(model, long).description
    assert "too long for the tokenizer, so not read" in description
    assert "of 'a picture of a very long disc'" in description
    with pytest.raises(ValueError, match=r"1 of 2 images have no caption(.|\n)*picture-0"):
        make(model, [Example(examples[0].source, ""), examples[1]])


def test_streaming_tells_the_first_caption_that_is_cut(tmp_path, model, capsys):
    examples = captioned(tmp_path, 3)
    long = [
        Example(example.source, f"a picture of a very long disc {i}") for i, example in enumerate(examples)
    ]
    batches = make(model, long, is_streaming=True)
    assert "too long" not in batches.description
    for positions in (range(1), range(1, 3)):
        batches.batch(positions)
    said = capsys.readouterr().out
    assert said.count("too long for the tokenizer") == 1
    assert f"of {batches.examples(range(1))[0].caption!r}" in said
    make(model, examples, is_streaming=True).batch(range(3))
    assert "too long" not in capsys.readouterr().out


def test_the_files_of_samples_can_be_named(tmp_path, model):
    batches = make(model, captioned(tmp_path, 3))
    assert sorted(batches.names(range(3))) == sorted(str(p) for p in list_images(tmp_path))


def test_images_that_are_blown_up_or_cropped_away_are_told_with_the_worst(model, tmp_path):
    for name, size in {"dot": (1, 1), "small": (10, 10), "long": (270, 10), "wide": (90, 40)}.items():
        Image.new("RGB", size).save(tmp_path / f"{name}.png")
    description = make(model, folder_examples(tmp_path, "a disc")).description
    assert (
        f"3 images are enlarged more than twice, most {tmp_path}/dot.png (1 x 1 pixels): 32 times"
        in description
    )
    assert (
        f"2 images lose more than half of their area to the crop, most {tmp_path}/long.png "
        "(270 x 10 pixels): 96%" in description
    )


def test_a_repeated_image_is_counted_once_in_notes(model, tmp_path):
    Image.new("RGB", (10, 10)).save(tmp_path / "a.png")
    examples = folder_examples(tmp_path, "a disc")
    assert "1 images are enlarged more than twice" in make(model, examples * 3).description


def test_images_near_the_training_size_have_no_notes(model, tmp_path):
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    batches = make(model, folder_examples(tmp_path, "a disc"))
    assert batches.size_notes == []


def test_random_crops_of_photos_are_the_same_from_memory_ahead_and_after_a_resume(model, tmp_path):
    for index in range(3):
        values = np.random.default_rng(index).integers(0, 256, (60, 80, 3), np.uint8)
        Image.fromarray(values).resize((800, 600)).save(tmp_path / f"{index}.jpg")

    def batches():
        return make(model, folder_examples(tmp_path, "a disc"), center_crop=False)

    steps = [range(2 * step, 2 * step + 2) for step in range(6)]
    plain, ahead = batches(), batches()
    expected = [plain.batch(positions).latents for positions in steps]
    for positions, latents in zip(steps, expected, strict=True):
        ahead.read_ahead(positions)
        assert ahead.batch(positions).latents.equal(latents)
    for positions, latents in zip(steps, expected, strict=True):
        assert batches().batch(positions).latents.equal(latents)


@pytest.mark.parametrize(
    ("text", "word", "is_held"),
    [
        ("he asks a question", "sks", False),
        ("masks and desks", "sks", False),
        ("art in a cart", "art", True),
        ("a cart", "art", False),
        ("SKS dog", "sks", True),
        ("(sks), a dog", "sks", True),
        ("a sks-dog", "sks", True),
        ("a sks2 dog", "sks", False),
        ("in the style of  ink wash, a cat", "ink wash", True),
        ("pink wash", "ink wash", False),
        ("a <sks> dog", "<sks>", True),
        ("a cafe\u0301", "caf\u00e9", True),
        ("a caf\u00e9s", "caf\u00e9", False),
        ("\u5728\u9ed1\u732b\u8fb9", "\u732b", True),
        ("\u8fd9\u662fsks\u72d7", "sks", True),
        ("\u043a\u043e\u0442\u044b", "\u043a\u043e\u0442", False),
    ],
)
def test_the_trigger_word_counts_only_as_a_word(text, word, is_held):
    assert contains_word(text, word) is is_held
    assert add_trigger_word(text, word) == (text if is_held else f"{word} {text}")


def test_class_images_of_another_prompt_or_base_are_refused(tmp_path, model, capsys):
    sampler = SamplingConfig(num_inference_steps=1, batch_size=2)
    recipe = ClassRecipe("a dog", "a base", sampler)
    class_examples(model, tmp_path, recipe, count=2, seed=0)
    for other, message in (
        (ClassRecipe("a teapot", "a base", sampler), "--class_prompt 'a dog', this run has 'a teapot'"),
        (ClassRecipe("a dog", "another", sampler), "--pretrained_model_name_or_path 'a base'"),
    ):
        with pytest.raises(ValueError, match=message):
            class_examples(model, tmp_path, other, count=2, seed=0)
        with pytest.raises(ValueError, match=message):
            planned_class_examples(tmp_path, other, count=2, side=32)
    settings = ClassRecipe("a dog", "a base", SamplingConfig(num_inference_steps=2))
    assert len(class_examples(model, tmp_path, settings, count=2, seed=0)) == 2
    assert "with other settings" in capsys.readouterr().out
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert len(class_examples(model, tmp_path, ClassRecipe("a teapot", "b", sampler), count=1, seed=0)) == 1


def test_a_repeated_image_is_drawn_more_often_and_read_once(tmp_path, model):
    examples = captioned(tmp_path, count=2)
    batches = make(model, [examples[0], examples[0], examples[0], examples[1]])
    names = batches.names(range(4))
    assert sorted(names.count(str(e.source)) for e in examples) == [1, 3]
    assert "2 images (4 with repeats)" in batches.description
