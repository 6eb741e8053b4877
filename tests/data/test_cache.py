"""The cache on disk: the same encodings, none of another base or picture, damaged ones made anew."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from helpers.family_pipelines import FAMILIES, tiny_folder
from helpers.pipelines import clip_tokenizer, tiny_sd_pipeline, tiny_sdxl_pipeline, write_pictures
from tokenizers import Tokenizer

from diffadapt.common.images import list_images
from diffadapt.data.batches import Batches
from diffadapt.data.cache import DiskCache, cache_key, fingerprint, open_cache
from diffadapt.data.encoding import EncodedCaptions
from diffadapt.data.examples import Example, folder_examples
from diffadapt.models.families import load_base

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Two bases of one architecture with other weights."""
    folder = tmp_path_factory.mktemp("bases")
    return [load_base(str(tiny_sd_pipeline(folder / str(seed), vae="kl", seed=seed))) for seed in (0, 1)]


def make(model, examples, **given):
    return Batches(model, examples, **{"resolution": 32, "center_crop": True, "seed": 0, **given})


def disk(tmp_path):
    return {"cache_latents": "disk", "cache_dir": str(tmp_path / "cache")}


def same(first, second):
    pairs = [
        (first.latents, second.latents),
        *((v, second.conditions[k]) for k, v in first.conditions.items()),
    ]
    return all(torch.equal(one, two) for one, two in pairs)


def counted(monkeypatch, model):
    """How often the base encodes pictures and captions from now on."""
    calls = []
    for name in ("encode_images", "encode_captions"):
        whole = getattr(type(model), name)
        monkeypatch.setattr(type(model), name, lambda self, x, n=name, f=whole: calls.append(n) or f(self, x))
    return calls


def test_a_second_run_encodes_nothing_and_sees_the_same_batches(tmp_path, bases, monkeypatch):
    examples = [Example(p, f"disc {i}") for i, p in enumerate(list_images(write_pictures(tmp_path / "a", 3)))]
    plain = make(bases[0], examples, random_flip=True).batch(range(6))
    first = make(bases[0], examples, random_flip=True, **disk(tmp_path)).batch(range(6))
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 3 * 2 + 3  # mirrored ones, captions
    calls = counted(monkeypatch, bases[0])
    second = make(bases[0], examples, random_flip=True, **disk(tmp_path)).batch(range(6))
    assert calls == []
    assert same(plain, first)
    assert same(plain, second)


def test_another_base_another_size_and_an_edited_picture_never_hit(tmp_path, bases, monkeypatch):
    folder = write_pictures(tmp_path / "a", 1)
    examples = folder_examples(folder, "a disc")
    make(bases[0], examples, **disk(tmp_path))
    calls = counted(monkeypatch, bases[0])
    make(bases[1], examples, **disk(tmp_path))
    assert calls == ["encode_captions", "encode_images"]
    make(bases[0], examples, resolution=16, **disk(tmp_path))
    assert calls[2:] == ["encode_images"]
    write_pictures(tmp_path / "b", 2)
    (tmp_path / "b" / "picture-1.png").replace(folder / "picture-0.png")
    make(bases[0], examples, **disk(tmp_path))
    assert calls[3:] == ["encode_images"]


CHANGES = {
    "none": lambda pipe: None,
    "an empty caption is encoded": lambda pipe: pipe.register_to_config(force_zeros_for_empty_prompt=False),
    "other padding": lambda pipe: setattr(pipe.tokenizer, "pad_token", "!"),
    "the other side is padded": lambda pipe: setattr(pipe.tokenizer_2, "padding_side", "left"),
    "other weights": lambda pipe: pipe.text_encoder_2.text_projection.weight.data.mul_(2),
}


def test_whatever_changes_text_states_never_finds_old_ones(tmp_path):
    examples = folder_examples(write_pictures(tmp_path / "a", 1), "a disc")
    model, seen = load_base(str(tiny_sdxl_pipeline(tmp_path / "base"))), []
    for name, change in CHANGES.items():
        change(model.pipe)  # one after the other
        kept, fresh = (make(model, examples, caption_dropout=0.5, **place) for place in (disk(tmp_path), {}))
        kept_rows = [kept.encoded_captions.row(caption) for caption in ("a disc", "")]
        fresh_rows = [fresh.encoded_captions.row(caption) for caption in ("a disc", "")]
        for one, two in zip(kept_rows, fresh_rows, strict=True):
            assert all(torch.equal(value, two[key]) for key, value in one.items()), name
        seen.append(torch.cat([value.flatten() for row in kept_rows for value in row.values()]))
    assert not any(torch.equal(one, two) for one, two in pairwise(seen))  # every change had an effect


def without_thinking(pipe):
    pipe.tokenizer.chat_template = pipe.tokenizer.chat_template.replace("<think>", "<thought>")


def fewer_layers(pipe):
    object.__setattr__(pipe, "text_encoder_select_layers", (0, 1))  # pipelines take models alone


@pytest.mark.parametrize(
    ("family", "change"),
    [
        ("flux2_klein", without_thinking),
        ("krea2", fewer_layers),
        ("sd3", lambda pipe: pipe.text_encoder_3.shared.weight.data.mul_(2)),
        ("chroma", lambda pipe: setattr(pipe.tokenizer, "pad_token", "a")),
    ],
)
def test_states_of_other_settings_of_a_transformer_family_are_not_found(
    tmp_path, tmp_path_factory, family, change
):
    model = load_base(str(tiny_folder(family, tmp_path_factory)))
    examples = folder_examples(write_pictures(tmp_path / "a", 1), "a disc")
    settings = {"resolution": 64, **disk(tmp_path)}
    first = make(model, examples, **settings).batch([0])
    change(model.pipe)
    second = make(model, examples, **settings).batch([0])
    assert torch.equal(first.latents, second.latents)
    assert not same(first, second)
    assert same(second, make(model, examples, resolution=64).batch([0]))


@pytest.mark.parametrize("family", [family for family in FAMILIES if "_t5" not in family])
def test_a_second_run_of_a_transformer_family_encodes_nothing(
    tmp_path, tmp_path_factory, family, monkeypatch
):
    model = load_base(str(tiny_folder(family, tmp_path_factory)))
    captions = ["a disc", "a disc of many colours"]
    paths = list_images(write_pictures(tmp_path / "a", 2))
    examples = [Example(path, caption) for path, caption in zip(paths, captions, strict=True)]
    settings = {"resolution": 64, "caption_dropout": 0.5}
    plain = make(model, examples, **settings).batch(range(6))
    first = make(model, examples, **settings, **disk(tmp_path)).batch(range(6))
    calls = counted(monkeypatch, model)
    second = make(model, examples, **settings, **disk(tmp_path)).batch(range(6))
    assert calls == []
    assert same(plain, first)
    assert same(plain, second)


def test_a_tokenizer_is_known_by_its_rules_not_by_who_used_it_last(tmp_path):
    words = clip_tokenizer(tmp_path)
    first = fingerprint(words)
    words(["a"], padding="max_length", truncation=True, max_length=7)
    assert fingerprint(words) == first
    rules = json.loads(words.backend_tokenizer.to_str())
    rules["normalizer"] = None
    words._tokenizer = Tokenizer.from_str(json.dumps(rules))
    second = fingerprint(words)
    words.model_max_length = 20
    assert len({first, second, fingerprint(words)}) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "swap"])
def test_a_damaged_entry_is_made_again_with_a_notice(tmp_path, bases, capsys, damage):
    examples = folder_examples(write_pictures(tmp_path / "a", 2), "a disc")
    expected = make(bases[0], examples, **disk(tmp_path)).batch(range(4))
    entries = sorted((tmp_path / "cache").glob("*/*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(entries[0].read_bytes())
    if damage == "flip":
        data[-1] ^= 1
    entries[0].write_bytes({"flip": data, "cut": data[:50], "swap": entries[1].read_bytes()}[damage])
    capsys.readouterr()
    assert same(make(bases[0], examples, **disk(tmp_path)).batch(range(4)), expected)
    assert "it is encoded again" in capsys.readouterr().out
    make(bases[0], examples, **disk(tmp_path))
    assert "encoded again" not in capsys.readouterr().out


def test_entries_are_whole_or_not_there(tmp_path, monkeypatch):
    cache = DiskCache(tmp_path)

    def fails(entry, path, metadata):
        path.write_bytes(b"half an entry")
        raise OSError("full")

    monkeypatch.setattr("diffadapt.data.cache.save_file", fails)
    with pytest.raises(OSError, match="full"):
        cache.put(cache_key(a=1), {"encoded": torch.zeros(2)})
    assert cache.get(cache_key(a=1)) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_fingerprints_tell_weights_settings_and_words_apart(bases):
    first, second = (base.pipe for base in bases)
    assert fingerprint(first.vae) == fingerprint(first.vae)
    assert fingerprint(first.vae) != fingerprint(second.vae)
    assert fingerprint(first.text_encoder) != fingerprint(first.text_encoder, first.tokenizer)
    assert cache_key(a=1, b=2) == cache_key(b=2, a=1) != cache_key(a=1, b=3)


def test_kinds_of_caches_and_what_they_need(tmp_path):
    assert open_cache("none") is None
    with pytest.raises(ValueError, match="belong together"):
        open_cache("disk")
    with pytest.raises(ValueError, match="belong together"):
        open_cache("memory", tmp_path)
    with pytest.raises(ValueError, match="one of memory, disk, none"):
        open_cache("gpu")


def test_states_keep_the_precision_of_the_text_encoders_on_disk(tmp_path, tmp_path_factory):
    folder = str(tiny_folder("sd3", tmp_path_factory))
    half = load_base(folder, dtype=torch.bfloat16)
    whole = load_base(folder)
    for model, dtype in ((half, torch.bfloat16), (whole, torch.float32)):
        expected = EncodedCaptions(model, None, recent=None).row("a dog")
        for _ in range(2):  # encoded, then read
            row = EncodedCaptions(model, DiskCache(tmp_path), recent=None).row("a dog")
            assert row.keys() == expected.keys()
            for name, value in row.items():
                assert value.dtype == dtype
                assert torch.equal(value, expected[name])
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 2


def test_a_processor_and_a_third_text_encoder_are_part_of_the_key(tmp_path_factory, tmp_path):
    model = load_base(str(tiny_folder("sd3", tmp_path_factory)))
    keys = [EncodedCaptions(model, DiskCache(tmp_path), recent=None)._text_encoders]
    model.pipe.text_encoder_3.shared.weight.data.mul_(2)
    keys.append(EncodedCaptions(model, DiskCache(tmp_path), recent=None)._text_encoders)
    tokenizer = clip_tokenizer(tmp_path / "words")
    model.pipe.processor = SimpleNamespace(tokenizer=tokenizer)
    keys.append(EncodedCaptions(model, DiskCache(tmp_path), recent=None)._text_encoders)
    tokenizer.chat_template = "{{ messages }}"
    keys.append(EncodedCaptions(model, DiskCache(tmp_path), recent=None)._text_encoders)
    assert len(set(keys)) == 4
