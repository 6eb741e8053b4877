"""Budgets: the rank that fits, tables of parameters, and amounts as people write them."""

from dataclasses import fields

import pytest
import torch
from helpers.models import denoiser, pipeline

import diffadapt as da
from diffadapt.adapters.budget import count_parameters, fit_budget, parse_budget, size_notices

pytestmark = pytest.mark.slow

RANKED = sorted(name for name, method in da.METHODS.items() if "rank" in {f.name for f in fields(method)})
TARGETS = "attention+conv"


def total(method, targets=TARGETS):
    return count_parameters(denoiser(), method, targets).total


def too_large(method, budget, spent):
    """Whether a method does not fit, is refused for its rank, or has no parameter more (LoKr, once dense)."""
    try:
        return total(method) > budget or total(method) == spent
    except ValueError as error:
        return "rank must be below" in str(error)


def test_every_method_with_a_rank_is_tried_here():
    assert {"lora", "dora", "vera", "mora", "pissa", "loha", "lokr", "flora", "liera"} <= set(RANKED)


@pytest.mark.parametrize("name", RANKED)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_rank_is_the_largest_that_fits(name, share):
    least, more = total(da.make_method(name, rank=1)), total(da.make_method(name, rank=3))
    budget = round(least + share * (more - least))
    method = fit_budget(denoiser(), name, TARGETS, budget=budget)
    assert total(method) <= budget
    for rank in range(method.rank + 1, method.rank + 4):
        assert too_large(da.make_method(name, rank=rank), budget, total(method))


@pytest.mark.parametrize("name", RANKED)
def test_a_budget_below_rank_one_is_refused_with_the_least_amount(name):
    least = total(da.make_method(name, rank=1))
    with pytest.raises(ValueError, match=f"needs {least:,} parameters at rank 1, more than the budget of"):
        fit_budget(denoiser(), name, TARGETS, budget=least - 1)


@pytest.mark.parametrize("name", ["lora", "flora", "mora", "superlora"])
def test_a_budget_for_a_large_model_is_nearly_spent(name):
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(640, 640) for _ in range(4)))
    method = fit_budget(model, name, "linear", budget=100_000)
    spent = count_parameters(model, method, "linear").total
    assert 90_000 < spent <= 100_000


def test_a_method_that_stops_growing_gets_the_least_rank_that_has_all():
    layer = torch.nn.Linear(64, 64)
    method = fit_budget(torch.nn.Sequential(layer), "lokr", "linear", budget=10**9)
    assert method.rank == 4  # 64 = 8 * 8: dense from half of 8 on
    assert count_parameters(torch.nn.Sequential(layer), method, "linear").total == 64 + 64


@pytest.mark.parametrize("method", ["lokr", "lokr(factor=2)", "lora+lokr", "lokr+bitfit"])
def test_no_larger_rank_fits_where_parameters_do_not_grow_with_the_rank(method):
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        sides = torch.randint(3, 42, (3, 2), generator=generator).tolist()
        model = torch.nn.Sequential(*(torch.nn.Linear(*pair) for pair in sides))
        model.append(torch.nn.Conv2d(sides[0][0], sides[0][1], 3))
        counts = [
            count_parameters(model, da.make_method(method, rank=rank), "linear+conv").total
            for rank in range(1, 43)
        ]
        for budget in sorted({count + change for count in counts for change in (0, 1)})[::3]:
            chosen = fit_budget(model, method, "linear+conv", budget=budget)
            rank = next(part.rank for part in chosen.members if hasattr(part, "rank"))
            largest = max(rank for rank in range(1, 43) if counts[rank - 1] <= budget)
            if largest < 42:
                assert rank == largest
            else:  # the first rank of those that have all
                assert counts[min(rank, 42) - 1] <= budget
                assert rank > 42 or set(counts[rank - 1 :]) == {counts[-1]}


def test_the_rank_of_a_kronecker_factor_ends_at_its_sides():
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    method = fit_budget(model, "superlora", "linear", budget=700, kron_factors=3, groups=1)
    assert method.rank == 2  # 128 x 128 divided by 8 * 8
    with pytest.raises(ValueError, match="rank must be at most 2, the shortest side of the last Kronecker"):
        da.attach(model, da.SuperLoRA(rank=3, kron_factors=3, groups=1), "linear")


def test_options_and_parts_keep_their_place():
    method = fit_budget(denoiser(), "1lora+flora(kernel_rank=1)", "conv", budget=1000, scale=4.0)
    one, flora = method.members
    assert (one.name, flora.kernel_rank, flora.scale) == ("1lora", 1, 4.0)
    assert 1 < flora.rank < 20
    assert total(method, "conv") <= 1000


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("1lora", "1lora has no rank to choose"),
        ("lora(rank=4)", "at every rank; leave out the budget or its own rank"),
        ("lroa", "did you mean lora"),
    ],
)
def test_a_method_whose_rank_is_not_free_is_refused(name, said):
    with pytest.raises(ValueError, match=said):
        fit_budget(denoiser(), name, TARGETS, budget=10**6)


def test_text_encoders_take_part_in_a_budget():
    only = fit_budget(pipeline(), "lora", "attention", budget=2000)
    both = fit_budget(pipeline(), "lora", "attention", budget=2000, text_encoder_targets="attention")
    assert both.rank < only.rank


@pytest.mark.parametrize("name", da.METHODS)
def test_a_table_says_what_attaching_trains(name):
    method = da.make_method(name, rank=2) if name in RANKED else da.make_method(name)
    targets = "embedding" if name == "class_embedding" else TARGETS
    model = denoiser()
    table = count_parameters(model, method, targets)
    assert table.total == sum(count for _, _, count in table.blocks)
    assert table.bytes == 4 * table.total
    assert table.base == sum(p.numel() for p in model.parameters())
    assert table.percent == pytest.approx(100 * table.total / table.base)
    adapter = da.attach(model, method, targets)
    assert adapter.num_parameters == table.total
    if len(method.members) == 1:
        assert sum(sites for _, sites, _ in table.blocks) == len(adapter.sites)


def test_a_table_groups_sites_by_the_pieces_of_their_names():
    def names(depth):
        table = count_parameters(denoiser(), da.LoRA(), "attention", depth=depth)
        return [name for name, _, _ in table.blocks]

    assert names(1) == ["blocks"]
    assert names(2) == ["blocks.0", "blocks.1"]
    assert names(3)[:2] == ["blocks.0.to_q", "blocks.0.to_k"]


def test_tensors_that_blocks_share_have_a_row_of_their_own():
    model = denoiser()
    table = count_parameters(model, da.make_method("lora+class_embedding"), "attention", depth=1)
    assert table.blocks[-1] == ("shared", 0, 5 * 8)


def test_rank_patterns_count():
    table = count_parameters(denoiser(), da.LoRA(rank=1), "attention", rank_patterns={"blocks.0.*": 3})
    assert [count for _, _, count in table.blocks] == [3 * 64, 64]


@pytest.mark.parametrize(
    ("text", "number"), [("500000", 500_000), ("500k", 500_000), ("1.5M", 1_500_000), ("2G", 2 * 10**9)]
)
def test_amounts_as_people_write_them(text, number):
    assert parse_budget(text) == number


@pytest.mark.parametrize("text", ["", "k", "many", "-3k", "0", "0.2", "nan", "inf", "1e400", "5 apples"])
def test_what_is_no_amount_is_refused(text):
    with pytest.raises(ValueError, match=r"such as 500000, 500k or 1.5M"):
        parse_budget(text)


def test_a_rank_above_the_size_of_the_layers_is_told():
    assert size_notices(denoiser(), da.make_method("lora", rank=3), "attention") == []
    rank, count = size_notices(denoiser(), da.make_method("lora", rank=9), "attention")
    assert "rank 9 of lora is above the size of 8 of 8 layers" in rank
    assert "no change of blocks.0.to_q has a rank above 8" in rank
    assert "lora(rank=9) has 1,152 trained parameters" in count
    assert "have 512 weights" in count


def test_the_whole_of_a_grouped_method_is_compared_with_the_layers():
    """Its rank is that of a tensor of all layers, which has other sizes than each of them."""
    assert size_notices(denoiser(), da.make_method("superlora", rank=1), "attention") == []


@pytest.mark.parametrize("name", RANKED)
def test_a_small_rank_is_not_told(name):
    notices = size_notices(denoiser(), da.make_method(name, rank=2), "conv")
    assert not [notice for notice in notices if "is above the size" in notice]
