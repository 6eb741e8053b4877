"""The cost benchmark: its counts against counts by hand, and the goals that do not depend on the machine."""

import json
import sys

import cost
import cost_models
import cost_page
import cost_rivals
import pytest
import torch
from torch import nn

import diffadapt as da


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 5)

    def forward(self, x):
        return self.layer(x).square().sum()


def test_kept_bytes_and_flops_of_one_linear_layer_equal_a_count_by_hand():
    base, x = OneLayer().requires_grad_(False), torch.randn(7, 6, requires_grad=True)
    bare = cost.count_step(base, base, lambda model: model(x))
    assert bare.kept_bytes == 4 * 7 * 5  # the output, for its square
    assert bare.flops == 2 * 7 * 6 * 5 * 2  # forward, and the input's gradient
    model = cost_rivals.make(base, "diffadapt:lora", "linear", 2)
    adapted = cost.count_step(model, base, lambda model: model(x))
    assert adapted.kept_bytes - bare.kept_bytes == 4 * (7 * 6 + 7 * 2 + 2 * (6 + 5))  # x, x down, factors
    assert adapted.flops - bare.flops == 3 * 2 * 7 * 2 * (6 + 5)  # three products with each factor


def test_the_copy_shares_every_weight_and_the_base_is_not_changed():
    base = OneLayer()
    model = cost_rivals.make(base, "diffadapt:flora", "linear", 2)
    assert model.layer.weight is base.layer.weight
    assert type(base.layer) is nn.Linear
    assert not da.attached(base)


@pytest.fixture(scope="module")
def tiny():
    model = cost_models.build("tiny")
    return model, cost_models.inputs(model, "tiny", 2)


def counts(tiny, variant, targets, rank=4):
    base, inputs = tiny
    return cost.count_step(cost_rivals.make(base, variant, targets, rank), base, inputs.loss)


@pytest.mark.parametrize("targets", ["attention", "conv"])
@pytest.mark.slow
def test_lora_costs_no_more_than_that_of_peft(tiny, targets):
    pytest.importorskip("peft")
    own, other = (counts(tiny, variant, targets) for variant in ("diffadapt:lora", "peft:lora"))
    assert own.flops <= other.flops
    assert own.kept_bytes <= other.kept_bytes
    assert own.launches <= other.launches
    assert own.operators <= other.operators


def test_flora_on_attention_dispatches_no_more_than_lora_of_peft(tiny):
    pytest.importorskip("peft")
    own, other = (counts(tiny, variant, "attention") for variant in ("diffadapt:flora", "peft:lora"))
    assert own.operators <= other.operators
    assert own.launches <= other.launches


def test_what_cannot_be_measured_is_said_on_the_page():
    table = cost.Table("Tiny", "tiny", "attention", ("lora",), rivals=())
    record = cost.measure(table, ["floor", "diffadapt:class_embedding"], 0)
    assert list(record["rows"]) == ["floor"]
    assert "class_embedding`** could not be measured: ValueError: " in "\n".join(
        cost_page._table_lines("tiny", record)
    )


@pytest.mark.parametrize("targets", ["attention", "conv"])
@pytest.mark.slow
def test_1lora_keeps_little_more_than_the_frozen_model(tiny, targets):
    adapted, bare = (counts(tiny, variant, targets) for variant in ("diffadapt:1lora", "floor"))
    assert adapted.kept_bytes < 1.03 * bare.kept_bytes


def test_a_merged_adapter_costs_what_the_bare_model_does(tiny):
    bare, merged = (counts(tiny, variant, "attention") for variant in ("floor", "merged:flora"))
    assert (merged.kept_bytes, merged.flops) == (bare.kept_bytes, bare.flops)
    assert merged.launches <= bare.launches


@pytest.mark.parametrize("name", ["liera", "dora", "loha"])
def test_the_method_in_plain_autograd_gives_the_same_output(tiny, name):
    base, inputs = tiny
    variants = (f"diffadapt:{name}", f"naive:{name}")
    lean, naive = (cost_rivals.make(base, variant, "attention", 2) for variant in variants)
    for first, second in zip(lean.adapter.parameters(), naive.adapter.parameters(), strict=True):
        torch.nn.init.normal_(first, std=0.1)
        second.data.copy_(first)
    torch.testing.assert_close(inputs.loss(naive), inputs.loss(lean), rtol=1e-4, atol=1e-6)


def test_a_ratio_is_the_median_over_rounds():
    rows = {
        name: {"timings": [{"step_seconds": s} for s in seconds]}
        for name, seconds in {"own": (2, 3, 9), "other": (1, 2, 3)}.items()
    }
    assert cost_page.ratio(rows, "own", "other", "step") == 2
    assert cost_page.ratio(rows, "own", "missing", "step") is None


@pytest.mark.slow
def test_the_script_writes_a_page_with_every_row_and_the_goals(tmp_path, monkeypatch):
    table = cost.Table("Tiny", "tiny", "attention", ("lora",), rivals=())
    monkeypatch.setitem(cost.TABLES, "tiny", table)
    page, records = tmp_path / "cost.md", tmp_path / "runs" / "cost.json"
    options = {"tables": "tiny", "repeats": 1, "threads": 1, "records": records, "output": page}
    arguments = [word for option, value in options.items() for word in (f"--{option}", str(value))]
    monkeypatch.setattr(sys, "argv", ["cost.py", *arguments])
    cost.main()
    text = page.read_text(encoding="utf-8")
    for words in ("| **`lora`** |", "| PEFT lora |", "step time / PEFT lora"):
        assert words in text
    rows = json.loads(records.read_text(encoding="utf-8"))["tiny"]["rows"]
    assert set(rows) == {"floor", "peft:lora", "diffadapt:lora", "merged:lora"}
