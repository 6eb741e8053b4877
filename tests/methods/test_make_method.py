"""Methods by name: options, combinations, and what is said about mistakes."""

import dataclasses
import json
import re

import pytest

import diffadapt as da
from diffadapt.methods.parse_method import read_method

every = pytest.mark.parametrize("name", da.METHODS)


@every
def test_every_method_is_made_by_its_name_with_its_defaults(name):
    method = da.make_method(name)
    assert type(method) is da.METHODS[name]
    assert method.name == name
    assert method.config == {}
    assert method.learning_rate > 0


@every
def test_every_method_is_frozen_and_hashable(name):
    method = da.make_method(name)
    assert hash(method) == hash(da.make_method(name))
    for field in dataclasses.fields(method)[:1]:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field.name, 1)


@every
def test_every_method_says_where_it_comes_from_and_what_it_counts(name):
    assert "Parameters" in da.METHODS[name].__doc__ or "tensors" in da.METHODS[name].__doc__


@pytest.mark.parametrize(
    ("spec", "options", "expected"),
    [
        ("lora", {"rank": 8}, da.LoRA(rank=8)),
        ("lora(rank=8)", {}, da.LoRA(rank=8)),
        ("flora(rank=8, init=gaussian, scale=4)", {}, da.FLoRA(rank=8, init="gaussian", scale=4)),
        ("lora(rank_stabilized=true)", {}, da.LoRA(rank_stabilized=True)),
        ("flora(rank_in=none)", {}, da.FLoRA()),
        (" lora ( rank = 2 , alpha = 0.5 ) ", {}, da.LoRA(rank=2, alpha=0.5)),
        ("lora()", {"rank": 3}, da.LoRA(rank=3)),
        ("lora(rank=2)", {"rank": 8, "alpha": 1.0}, da.LoRA(rank=2, alpha=1.0)),
    ],
)
def test_a_description_becomes_a_method(spec, options, expected):
    assert da.make_method(spec, **options) == expected


def test_options_reach_every_part_that_has_them_and_does_not_set_them():
    method = da.make_method("flora+lora(rank=4)", rank=8, kernel_rank=1)
    assert method.members == (da.FLoRA(rank=8, kernel_rank=1), da.LoRA(rank=4))


def test_a_combination_learns_at_the_smallest_rate_of_its_parts():
    method = da.make_method("flora+lora")
    assert method.learning_rate == min(da.FLoRA.learning_rate, da.LoRA.learning_rate)


@pytest.mark.parametrize("spec", [*da.METHODS, "lora(rank=3, scale=2.5)", "flora(init=gaussian)+lora"])
def test_a_method_survives_its_own_description_and_its_json(spec):
    method = da.make_method(spec)
    assert da.make_method(str(method)) == method
    parts = [{"name": part.name, "options": part.config} for part in method.members]
    assert read_method(json.loads(json.dumps(parts))) == method


def test_the_configuration_holds_what_differs_from_the_defaults():
    assert da.FLoRA(rank=8, init="gaussian", dropout=0.0).config == {"rank": 8, "init": "gaussian"}


MISTAKES = [
    ("lorra", {}, "unknown method 'lorra'; did you mean lora"),
    ("FLoRA", {}, "unknown method 'FLoRA'"),
    ("", {}, "unknown method ''"),
    ("lora+", {}, "unknown method ''"),
    ("lora", {"rnak": 3}, "lora has no option 'rnak'; did you mean rank"),
    ("lora(rnak=3)", {}, "lora has no option 'rnak'; did you mean rank"),
    ("lora(rank)", {}, "lora has no option 'rank'"),
    ("lora(rank=4", {}, "lacks its closing parenthesis; write e.g. lora(rank=4)"),
    ("lora(rank=0)", {}, "rank must be a whole number >= 1, got 0"),
    ("lora", {"rank": True}, "rank must be"),
    ("lora", {"rank": "4"}, "rank must be int, got '4'"),
    ("lora(rank=four)", {}, "rank must be int, got 'four'"),
    ("lora", {"alpha": "much"}, "alpha must be float | None, got 'much'"),
    ("lora", {"alpha": float("nan")}, "alpha must be"),
    ("lora", {"scale": float("inf")}, "scale must be"),
    ("lora", {"alpha": 1.0, "scale": 2.0}, "give alpha=1.0 or scale=2.0, not both"),
    ("lora", {"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
    ("lora", {"dropout": -0.1}, "dropout must be in [0, 1), got -0.1"),
    ("lora", {"rank_stabilized": 1}, "rank_stabilized must be bool, got 1"),
    ("lora(rank=__import__('os'))", {}, "rank must be int"),
    ("lora+lora(alpha=1)", {"kernel_rank": 2}, "has no option 'kernel_rank'"),
]


@pytest.mark.parametrize(("spec", "options", "said"), MISTAKES, ids=[f"{s}{o}" for s, o, _ in MISTAKES])
def test_a_mistake_is_named(spec, options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        da.make_method(spec, **options)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("liera(inner=pissa, conv_reshape=loralib)", "conv_reshape=loralib would have no effect"),
        ("liera(inner=flora, conv_reshape=loralib)", "conv_reshape=loralib would have no effect"),
        ("superlora(tensor_order=1, alpha=2.0)", "tensor_order=1 has none; give scale"),
    ],
)
def test_an_option_without_effect_is_refused(text, said):
    with pytest.raises(ValueError, match=said):
        da.make_method(text)
