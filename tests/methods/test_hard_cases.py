"""Combinations, tied tables, strengths and weights that are zero."""

import copy

import pytest
import torch
from helpers.method_cases import Model, close, train, trainable
from helpers.originals import layer
from torch import nn

import diffadapt as da


@pytest.mark.parametrize("order", ["first", "exp"])
@pytest.mark.parametrize("inner", ["lora", "dora", "pissa", "flora"])
def test_liera_cannot_move_weights_that_are_zero(inner, order):
    base, x = layer("conv")
    base.weight.data[:, 2] = 0
    model = Model(base)
    adapter = da.attach(model, da.LieRA(rank=2, order=order, inner=inner), "layer")
    train(adapter)
    changed = adapter.adapted_weight("layer")
    assert not changed[:, 2].any()
    assert not torch.equal(changed, base.weight)
    base.weight.data.zero_()
    model(x).sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in trainable(adapter) if p.shape != (6,))


@pytest.mark.parametrize("method", [da.DoRA(rank=2), da.LieRA(rank=2, inner="dora")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_renormalising_keeps_rows_of_zeros_finite(method, dtype):
    base, x = layer("linear")
    base, x = base.to(dtype), x.to(dtype)
    base.weight.data[3] = 0
    model = Model(base)
    plain = base(x)
    adapter = da.attach(model, method, "layer")
    close(model(x), plain, 1e-6 if dtype == torch.float64 else 1e-2)
    for _ in range(2):
        y = model(x)
        y.sum().backward()
        assert all(p.grad.isfinite().all() for p in trainable(adapter))
        assert y.isfinite().all()
        train(adapter)


def test_dora_moves_a_row_of_zeros_by_its_magnitude():
    base, x = layer("linear")
    base.weight.data[3] = 0
    model = Model(base)
    adapter = da.attach(model, da.DoRA(rank=2), "layer")
    train(adapter, size=0.1)
    model(x).square().sum().backward()
    assert adapter.parts[0].tensors[0]["magnitude"].grad[3] != 0


# Class tables, which diffusers copies into every block


class Labelled(nn.Module):
    """Two blocks with a class table each, and a layer of another width."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"class_embedder": nn.ModuleDict({"embedding_table": nn.Embedding(5, 8)})})
            for _ in range(2)
        )
        self.proj = nn.Linear(8, 3)
        self.norm = nn.LayerNorm(3)
        self.blocks[1].load_state_dict(self.blocks[0].state_dict())

    def forward(self, labels):
        first, second = (block["class_embedder"]["embedding_table"](labels) for block in self.blocks)
        return self.norm(self.proj(first + 2 * second))


@pytest.mark.parametrize("method", ["class_embedding", "difffit", "1lora+class_embedding"])
def test_copies_of_a_class_table_are_trained_as_one(method):
    model, labels = Labelled(), torch.tensor([0, 3, 3])
    adapter = da.attach(
        model, da.make_method(method), "proj" if method != "class_embedding" else "class_embedding"
    )
    (part,) = (part for part in adapter.parts if part.shared)
    (table,) = part.shared.values()
    assert table.shape == (5, 8)
    with torch.no_grad():
        table[3] += 1
    names = [f"blocks.{i}.class_embedder.embedding_table" for i in range(2)]
    weights = [adapter.adapted_weight(name) for name in names]
    assert torch.equal(*weights)
    assert torch.equal(weights[0], table)
    model(labels)[:, 0].sum().backward()
    assert table.grad[3].any()
    assert not table.grad[1].any()
    before = model(labels)
    da.merge(adapter)
    close(model(labels), before, 1e-6)


def test_class_tables_that_differ_are_not_tied_silently():
    model = Labelled()
    nn.init.normal_(model.blocks[1]["class_embedder"]["embedding_table"].weight)
    with pytest.raises(ValueError, match="differ; exclude"):
        da.attach(model, da.ClassEmbedding(), "class_embedding")
    adapter = da.attach(model, da.ClassEmbedding(), "class_embedding+!blocks.0.*")
    assert adapter.num_parameters == 40


# Combinations and several adapters


def test_a_combination_adds_the_changes_of_its_parts_to_the_frozen_weight():
    base, x = layer("conv")
    model = Model(copy.deepcopy(base))
    adapter = da.attach(model, da.make_method("lora(rank=2)+dora(rank=1)+gamma+bitfit"), "layer")
    train(adapter)
    lora, dora, gamma, bitfit = (dict(part.tensors[0].items()) for part in adapter.parts)
    weight = base.weight.flatten(1)
    direction = weight + dora["up"] @ dora["down"]
    renormalised = dora["magnitude"][:, None] * direction / direction.norm(dim=1, keepdim=True)
    total = renormalised + lora["up"] @ lora["down"] + (gamma["gamma"] - 1)[:, None] * weight
    bias = base.bias * gamma["gamma"] + bitfit["bias"]
    expected = torch.func.functional_call(base, {"weight": total.view_as(base.weight), "bias": bias}, (x,))
    close(model(x), expected, 1e-12)
    da.merge(adapter)
    close(model(x), expected, 1e-12)


def test_options_belong_to_the_part_that_names_them():
    method = da.make_method("1lora+lora(rank=4, alpha=8)+flora(kernel_rank=1)", rank=3)
    one, lora, flora = method.members
    assert (one.name, lora.rank, lora.alpha, flora.rank, flora.kernel_rank) == ("1lora", 4, 8, 3, 1)
    with pytest.raises(ValueError, match="no option 'kernal_rank'; did you mean kernel_rank"):
        da.make_method("lora+flora(kernal_rank=1)")


def test_parts_for_norms_find_them_whatever_the_targets():
    model = Labelled()
    adapter = da.attach(model, da.make_method("1lora+norms"), "proj")
    assert [site.name for site in adapter.sites] == ["proj", "norm"]
    assert adapter.num_parameters == 3 + 6


STACKED = ("liera(rank=2, order=exp)", "dora(rank=2)", "gamma", "flora(rank=3)")


@pytest.mark.parametrize("kind", ["linear", "conv-grouped"])
@pytest.mark.parametrize("merged", [(), (0, 2), (1, 3)], ids=str)
def test_adapters_add_up_each_at_its_own_strength(kind, merged):
    base, x = layer(kind)
    model = Model(copy.deepcopy(base))
    adapters = [da.attach(model, da.make_method(spec), "layer", name=spec) for spec in STACKED]
    weight, bias = base.weight.clone(), base.bias.clone()
    for adapter, strength in zip(adapters, (0.3, 1.0, -0.5, 2.0), strict=True):
        train(adapter)
        weight = weight + strength * (adapter.adapted_weight("layer") - base.weight)
        bias = bias + strength * (adapter.adapted_bias("layer") - base.bias)
        adapter.strength = strength
    for index in merged:
        da.merge(adapters[index])
    expected = torch.func.functional_call(base, {"weight": weight, "bias": bias}, (x,))
    close(model(x), expected, 1e-12)
    for adapter in adapters:
        da.detach(adapter)
    assert torch.equal(model(x), base(x))


def test_a_rank_pattern_reaches_only_the_parts_and_sites_it_names():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    adapter = da.attach(model, da.LoRA(rank=2), "linear", rank_patterns={"[01]": 5, "1": 3})
    ranks = [tensors["up"].shape[1] for tensors in adapter.parts[0].tensors]
    assert ranks == [5, 3, 2]
    assert adapter.num_parameters == 16 * (5 + 3 + 2)


def test_a_rank_pattern_passes_by_the_parts_without_a_rank():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    adapter = da.attach(model, da.make_method("1lora+lora(rank=2)"), "linear", rank_patterns={"0": 5})
    assert adapter.num_parameters == 2 * 8 + 16 * (5 + 2)
    da.detach(adapter)
    with pytest.raises(ValueError, match="1lora has no rank, so there is none to choose for 0"):
        da.attach(model, da.OneLoRA(), "linear", rank_patterns={"0": 5})
    assert not da.attached(model)


def test_layers_of_one_shape_share_the_frozen_matrices_of_vera_whatever_else_is_adapted():
    def constants(targets):
        model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 6))
        part = da.attach(model, da.VeRA(rank=4), targets, seed=7).parts[0]
        return dict(part.constants.named_buffers())

    all_three, last = constants("linear"), constants("2")
    assert sorted(all_three) == ["down_6x8", "down_8x6", "up_6x8", "up_8x6"]
    assert sorted(last) == ["down_6x8", "up_6x8"]
    assert all(torch.equal(last[key], all_three[key]) for key in last)


def test_a_bias_given_to_a_layer_without_one_is_merged_and_taken_away():
    base = nn.Linear(4, 3, bias=False)
    model, x = Model(base), torch.randn(2, 4)
    adapter = da.attach(model, da.DiffFit(), "layer")
    train(adapter)
    before = model(x)
    da.merge(adapter)
    assert base.bias is not None
    close(model(x), before, 1e-6)
    da.detach(adapter)
    assert base.bias is None
