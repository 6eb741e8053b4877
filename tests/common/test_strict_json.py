"""Numbers that JSON lacks: written as strings, read back as numbers."""

import json
import math

import pytest

from diffadapt.common.strict_json import parse_number, to_json


def refuse(name):
    raise AssertionError(f"{name} is no JSON")


def test_numbers_that_are_not_finite_become_strings_and_come_back():
    content = {"a": [1.5, math.nan], "b": {"c": (math.inf, -math.inf)}, "d": None, "e": 2, "f": True}
    stored = json.loads(to_json(content), parse_constant=refuse)
    assert stored == {"a": [1.5, "NaN"], "b": {"c": ["Infinity", "-Infinity"]}, "d": None, "e": 2, "f": True}
    assert math.isnan(parse_number(stored["a"][1]))
    assert [parse_number(value) for value in stored["b"]["c"]] == [math.inf, -math.inf]
    assert parse_number(None) is None


@pytest.mark.parametrize("value", ["nan", "1.0", "", [], True])
def test_only_those_strings_are_numbers(value):
    with pytest.raises(ValueError, match="expected a number"):
        parse_number(value)
