"""Prompts longer than a text encoder reads are told."""

from diffadapt.evaluation.features.extractors import load_extractor
from diffadapt.evaluation.features.prompt_lengths import long_prompts_warning


def test_prompts_that_are_cut_are_counted_and_named_with_their_tokens():
    clip = load_extractor("embedded:clip")
    long = "a cat " * clip.text_length
    (warning,) = long_prompts_warning("a", ["a cat", long, long, "a dog"], clip)
    (tokens,) = clip.count_tokens([long])
    assert tokens > clip.text_length
    assert (
        f"a: 1 of 3 prompts are longer than the {clip.text_length} tokens that embedded:clip reads" in warning
    )
    assert f"({tokens} tokens)" in warning
    assert "'a cat a cat" in warning


def test_a_prompt_that_just_fits_is_not_told():
    clip = load_extractor("embedded:clip")
    words = "cat"
    while clip.count_tokens([f"{words} cat"])[0] <= clip.text_length:
        words += " cat"
    assert clip.count_tokens([words]) == [clip.text_length]
    assert long_prompts_warning("a", [words], clip) == []
    assert len(long_prompts_warning("a", [f"{words} cat"], clip)) == 1


def test_an_extractor_without_texts_cuts_none():
    assert long_prompts_warning("a", ["a cat " * 500], load_extractor("embedded:digits")) == []
