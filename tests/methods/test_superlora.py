"""SuperLoRA against a restatement of its formula, the counts of the paper, and models of several layers."""

import copy
import itertools
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorly
import torch
from diffusers import UNet2DModel
from scipy.linalg import hadamard
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import diffadapt as da
from diffadapt.algebra.layer_maps import LinearMap
from diffadapt.algebra.low_rank import LowRank
from diffadapt.methods.grouped.fastfood import draw_projection

pytestmark = pytest.mark.slow

VARIANTS = [
    {"rank": 3},
    {"rank": 2, "groups": "layer"},
    {"rank": 2, "groups": 1, "scale": 0.7},
    {"rank": 2, "groups": 3, "alpha": 3.0},
    {"rank": 2, "reshape": False},
    {"rank": 2, "groups": 2, "reshape": False},
    {"rank": 3, "groups": "layer", "reshape": False},
    {"tensor_order": 1},
    {"tensor_order": 1, "groups": 7},
    {"rank": 2, "tensor_order": 3},
    {"rank": 2, "tensor_order": 3, "core": "cp", "groups": 2},
    {"rank": 3, "tensor_order": 4, "groups": 1},
    {"rank": 2, "tensor_order": 4, "core": "cp", "groups": "layer"},
    {"rank": 2, "tensor_order": 5, "groups": 1},
    {"rank": 2, "tensor_order": 5, "core": "cp", "groups": 1},
    {"rank": 2, "kron_factors": 2, "kron_block": 3},
    {"rank": 2, "kron_factors": 2, "kron_block": 8, "groups": 2},
    {"rank": 1, "kron_factors": 3, "kron_block": 2, "groups": "layer"},
    {"rank": 1, "kron_factors": 4, "kron_block": 2, "groups": 3, "reshape": False},
    {"rank": 1, "kron_factors": 2, "kron_block": 2, "reshape": False},
    {"rank": 2, "projection": "shuffle", "groups": 3},
    {"rank": 2, "projection": "shuffle", "reshape": False},
    {"rank": 2, "projection": "linear", "rho": 0.5, "groups": 1},
    {"rank": 2, "projection": "linear_v2", "rho": 0.3, "groups": 3, "tensor_order": 3},
    {"rank": 1, "projection": "nonlinear", "rho": 0.2, "groups": "layer", "tensor_order": 3, "core": "cp"},
    {"rank": 2, "projection": "nonlinear_v2", "rho": 0.7, "groups": 2, "kron_factors": 2, "kron_block": 2},
    {"projection": "linear", "rho": 0.1, "tensor_order": 1, "groups": 2},
    {"rank": 1, "projection": "nonlinear", "rho": 0.5},
]
each_variant = pytest.mark.parametrize("options", VARIANTS, ids=[str(da.SuperLoRA(**v)) for v in VARIANTS])
SOME = [VARIANTS[i] for i in (0, 3, 5, 7, 11, 16, 19, 23, 24)]
some_variants = pytest.mark.parametrize("options", SOME, ids=[str(da.SuperLoRA(**v)) for v in SOME])


class Block(nn.Module):
    """Layers of both kinds and of different widths."""

    def __init__(self, width):
        super().__init__()
        self.q = nn.Linear(12, width)
        self.v = nn.Linear(12, 12, bias=False)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.out = nn.Linear(width, 12)

    def forward(self, x):
        y = self.out(torch.tanh(self.q(x))) + self.v(x)
        image = torch.tanh(self.conv(y.reshape(-1, 3, 2, 2)))
        return y + self.deep(image).flatten(1)[:, :12]


class Model(nn.Module):
    def __init__(self, checkpointed=False, reverse=False):
        super().__init__()
        for name, width in sorted({"first": 10, "second": 7}.items(), reverse=reverse):
            self.add_module(name, Block(width))
        self.checkpointed = checkpointed

    def forward(self, x):
        for block in (self.first, self.second):
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def make(dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    return Model(**options).to(dtype)


def inputs(dtype=torch.float64):
    return torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def adapted(options, dtype=torch.float64, trained=True, seed=0, **model_options):
    model = make(dtype, **model_options)
    adapter = da.attach(model, da.SuperLoRA(**options), "all", seed=seed)
    if trained:
        train(adapter)
    return model, adapter


@torch.no_grad()
def train(adapter, size=0.3):
    generator = torch.Generator().manual_seed(5)
    for parameter in adapter.parameters():
        parameter.add_(size * torch.randn(parameter.shape, dtype=torch.float64, generator=generator))


# --- The formula, restated -------------------------------------------------------------------------------


def restated_entries(method, count, width, own):
    """``count`` entries of one group: fold, decompose, unfold, drop the surplus. With numpy and tensorly."""
    if method.tensor_order == 1:
        return own["vector"]
    if method.tensor_order >= 3:
        planes = [own[f"factor{axis}"] for axis in range(method.tensor_order)]
        if method.core == "tucker":
            return tensorly.tucker_to_tensor((own["core"], planes)).reshape(-1)[:count]
        return tensorly.cp_to_tensor((np.ones(method.rank), planes)).reshape(-1)[:count]
    side = next(d for d in itertools.count(1) if d * d >= count)
    rows, columns = (side, side) if method.reshape else (-(-count // width), width)
    matrix = own["up"] @ own["down"]
    for index in reversed(range(method.kron_factors - 1)):
        matrix = np.kron(own[f"left{index}"], matrix)
    assert 0 <= matrix.shape[0] - rows < method.kron_block ** (method.kron_factors - 1)
    assert 0 <= matrix.shape[1] - columns < method.kron_block ** (method.kron_factors - 1)
    return matrix[:rows, :columns].reshape(-1)[:count]


def restated_projection(method, entries, size, seed):
    if method.projection == "none":
        return entries
    drawn = draw_projection(len(entries), size, method.projection, seed)
    drawn = {key: value.numpy() for key, value in drawn.items()}
    if method.projection == "shuffle":
        return entries[drawn["permutation"]]
    h = hadamard(len(drawn["gauss"])) / len(drawn["gauss"]) ** 0.5
    y = (entries @ h[: len(entries)] * drawn["gauss"])[drawn["permutation"]] @ h[:, :size] * drawn["last"]
    return y - np.tanh(y) if "nonlinear" in method.projection else y


def restated_changes(adapter, trained, start):
    """Every site's change, by name."""
    method, sites = adapter.method, adapter.sites
    if method.groups == "weight":
        members = [[site] for site in sites]
    elif method.groups == "layer":
        members = [list(own) for _, own in itertools.groupby(sites, lambda s: s.name.rpartition(".")[0])]
    else:
        members = [list(sites)]
    long = []
    for number, own_sites in enumerate(members):
        total = sum(site.numel for site in own_sites)
        parts = method.groups if isinstance(method.groups, int) else 1
        size = -(-total // parts)
        width = max(site.fan_in for site in own_sites)
        vectors = []
        for part in range(parts):
            count = int(np.ceil(round(method.rho * size, 6)))
            values = []
            for tensors in (trained, start):
                prefix = f"group{number + part}_"
                group_tensors = {
                    k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)
                }
                entries = restated_entries(method, count, width, group_tensors)
                values.append(restated_projection(method, entries, size, adapter.seed))
            vectors.append(values[0] - values[1] if "nonlinear" in method.projection else values[0])
        long.append((own_sites, np.concatenate(vectors)[:total]))
    changes = {}
    for own_sites, vector in long:
        for site in own_sites:
            changes[site.name], vector = vector[: site.numel].reshape(site.shape), vector[site.numel :]
    return changes


def values_of(adapter):
    return {key: value.detach().numpy().copy() for key, value in adapter.parts[0].shared.items()}


@each_variant
def test_weights_are_those_of_the_formula_restated(options):
    model, adapter = adapted(options, trained=False)
    bare, start = make(), values_of(adapter)
    assert torch.equal(model(inputs()), bare(inputs()))
    train(adapter)
    expected = restated_changes(adapter, values_of(adapter), start)
    for site in adapter.sites:
        change = adapter.adapted_weight(site) - bare.get_submodule(site.name).weight
        torch.testing.assert_close(
            change, adapter.method.multiplier * torch.tensor(expected[site.name]), rtol=1e-10, atol=1e-12
        )
    assert adapter.num_parameters == sum(value.size for value in start.values())


@each_variant
@pytest.mark.slow
def test_forward_and_gradients_are_those_of_the_materialised_weights(options):
    model, adapter = adapted(options)
    y = model(inputs())
    y.square().sum().backward()
    adapter_gradients = [p.grad for p in adapter.parameters()]
    part, bare = adapter.parts[0], make()
    weights = {}
    for index, site in enumerate(adapter.sites):
        base = bare.get_submodule(site.name).weight.detach()
        weights[f"{site.name}.weight"] = part.update(index, base).weight(base)
    expected = torch.func.functional_call(bare, weights, (inputs(),))
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    expected_gradients = torch.autograd.grad(expected.square().sum(), list(adapter.parameters()))
    for gradient, expected_gradient in zip(adapter_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-9)


@each_variant
def test_every_trained_tensor_has_a_gradient_within_two_steps(options):
    model, adapter = adapted(options, trained=False)
    reached = set()
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (model(inputs()) - 1).square().mean().backward()
        reached |= {name for name, p in adapter.named_parameters() if p.grad.abs().max() > 1e-12}
        optimizer.step()
    assert reached == {name for name, _ in adapter.named_parameters()}


@pytest.mark.parametrize("projection", ["linear", "linear_v2", "nonlinear", "nonlinear_v2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.slow
def test_projected_adapters_learn(projection, order):
    options = {"rank": 2, "tensor_order": order, "rho": 0.5, "groups": 1, "projection": projection}
    model, adapter = adapted(options, trained=False)
    target = make(seed=1)(inputs()).detach()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = (model(inputs()) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# --- Printed counts --------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))


def vit_base():
    with torch.device("meta"):
        return nn.Sequential(*(Attention(768) for _ in range(12)))


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        (147_456, {"rank": 4, "reshape": False}),  # LoRA
        (115_200, {"rank": 6, "groups": 1, "reshape": False}),
        (165_572, {"rank": 22, "groups": 1}),
        (138_372, {"rank": 26, "groups": 1, "rho": 0.5, "projection": "linear"}),
        (14_155_776, {"groups": 1, "tensor_order": 1}),
    ],
)
def test_counts_of_the_paper_on_vit_base(expected, options):
    # appendix A.6; query and value of 12 blocks: 24 matrices 768 x 768
    assert da.count_parameters(vit_base(), da.SuperLoRA(**options), "qv").total == expected


@pytest.fixture(scope="module")
def unet():
    """The paper's diffusion U-Net: attention after every residual block, 5 of 64 and 16 of 128 channels."""
    with torch.device("meta"):
        return UNet2DModel(
            sample_size=32,
            block_out_channels=(64, 128, 128, 128),
            layers_per_block=2,
            down_block_types=("AttnDownBlock2D",) * 4,
            up_block_types=("AttnUpBlock2D",) * 4,
        )


@pytest.mark.parametrize(
    ("expected", "options"),
    [
        (31, {"rank": 1, "tensor_order": 5, "rho": 0.01, "projection": "linear"}),  # "least parameter 31"
        (37, {"rank": 1, "tensor_order": 4, "rho": 0.01, "projection": "linear"}),
        (46, {"rank": 1, "tensor_order": 5, "rho": 0.1, "projection": "linear"}),
        (55, {"rank": 1, "tensor_order": 3, "rho": 0.01, "projection": "linear"}),
        (76, {"rank": 1, "tensor_order": 5}),  # "5D LoRTA requires less than 80"
        (113, {"rank": 1, "tensor_order": 4}),
        (250, {"rank": 1, "tensor_order": 3}),  # "beyond 200 for 3D"
        (1_504, {"rank": 1}),  # "beyond 1000 for 2D"
        (70_720, {"rank": 13, "groups": 8, "reshape": False}),  # "2D, group8, rank13"
        (565_248, {"tensor_order": 1}),
        (555, {"rank": 1, "kron_factors": 2, "kron_block": 10, "reshape": False}),  # LoKr "500", not exactly
        (152, {"rank": 1, "kron_factors": 3}),  # LoNKr "150", not exactly
        (130, {"rank": 1, "kron_factors": 4, "kron_block": 6, "reshape": False}),
        (75_776, {"rank": 8, "groups": "weight", "reshape": False}),  # LoRA of rank 8
    ],
)
def test_counts_of_the_paper_on_its_unet(unet, expected, options):
    adapter = da.attach(unet, da.SuperLoRA(**{"groups": 1, **options}), "qv")
    assert len(adapter.sites) == 2 * 21
    assert adapter.num_parameters == expected
    da.detach(adapter)


@pytest.mark.parametrize(("order", "side"), [(2, 752), (3, 83), (4, 28), (5, 15)])
def test_cp_has_no_core_and_tucker_counts_one(unet, order, side):
    def count(core):
        method = da.SuperLoRA(rank=2, groups=1, tensor_order=order, core=core)
        return da.count_parameters(unet, method, "qv").total

    assert count("cp") == order * side * 2
    assert count("tucker") == order * side * 2 + (2**order if order >= 3 else 0)


@pytest.mark.parametrize(("factors", "count"), [(2, 64 + 94 * 2), (3, 128 + 12 * 2), (4, 192 + 2 * 2)])
def test_kronecker_factors_round_their_sides_up(unet, factors, count):
    method = da.SuperLoRA(rank=1, groups=1, kron_factors=factors)  # 752 x 752 by 8, 64, 512
    assert da.count_parameters(unet, method, "qv").total == count


# --- The same as LoRA ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_unreshaped_group_per_weight_is_lora(dtype):
    model, adapter = adapted({"rank": 3, "scale": 2.0, "reshape": False}, dtype)
    twin = make(dtype)
    lora = da.attach(twin, da.LoRA(rank=3, scale=2.0), "all")
    with torch.no_grad():
        for parameter, value in zip(lora.parameters(), adapter.parameters(), strict=True):
            parameter.copy_(value)
    y, expected = model(inputs(dtype)), twin(inputs(dtype))
    assert torch.equal(y, expected)
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    for parameter, other in zip(adapter.parameters(), lora.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


def test_rows_of_an_unreshaped_group_are_applied_as_factors():
    model = nn.Sequential(*(nn.Linear(16, out) for out in (16, 8, 24)))
    for groups in ("layer", 1):
        adapter = da.attach(model, da.SuperLoRA(rank=2, groups=groups, reshape=False), "all")
        part = adapter.parts[0]
        assert all(isinstance(part.update(i, layer.weight).delta, LowRank) for i, layer in enumerate(model))
        da.detach(adapter)


def test_a_cut_between_two_rows_keeps_the_factored_forward():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)).double()
    adapter = da.attach(model, da.SuperLoRA(rank=2, groups=2, reshape=False), "all")
    train(adapter)
    middle = adapter.parts[0].update(1, model[1].weight).delta
    x = torch.randn(3, 16, dtype=torch.float64)
    fast = middle.apply(LinearMap(), x, (16, 16))
    torch.testing.assert_close(fast, x @ middle.matrix().T)


# --- Memory ----------------------------------------------------------------------------------------------


def saved_for_backward(options, width=96):
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)).float()
    adapter = da.attach(model, da.SuperLoRA(**options), "all")
    train(adapter)
    ignored = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *adapter.parameters())}
    ignored |= {t.untyped_storage().data_ptr() for t in adapter.buffers()}
    saved = {}
    with saved_tensors_hooks(
        lambda t: (saved.update({t.untyped_storage().data_ptr(): t}), t)[1], lambda t: t
    ):
        y = model(torch.randn(2, width))
    sizes = [t.untyped_storage().nbytes() // 4 for pointer, t in saved.items() if pointer not in ignored]
    del y
    return [size for size in sizes if size > width * width / 2]


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 2, "groups": 1},
        {"rank": 2, "groups": 3},
        {"rank": 2, "groups": 3, "reshape": False},
        {"tensor_order": 1, "groups": 3},
        {"rank": 2, "groups": 1, "tensor_order": 3},
        {"rank": 2, "groups": 1, "tensor_order": 4},
        {"rank": 2, "groups": 1, "tensor_order": 5, "core": "cp"},
        {"rank": 2, "groups": 1, "kron_factors": 2},
    ],
    ids=str,
)
def test_unprojected_groups_keep_nothing_as_large_as_a_weight(options):
    assert saved_for_backward(options) == []


@pytest.mark.parametrize("projection", ["shuffle", "linear", "linear_v2", "nonlinear", "nonlinear_v2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_projected_groups_keep_one_vector(projection, order):
    saved = saved_for_backward({"rank": 2, "groups": 1, "tensor_order": order, "projection": projection})
    assert saved == [2 * 96 * 96]


def test_projections_store_nothing_and_equal_groups_share_one(tmp_path):
    _, adapter = adapted({"rank": 2, "groups": 3, "projection": "linear", "rho": 0.5})
    assert len(list(adapter.buffers())) == 3
    da.save(adapter, tmp_path / "a.safetensors")
    stored = set(adapter.parts[0].named_tensors())
    assert stored == {f"superlora//group{g}_{key}" for g in range(3) for key in ("up", "down")}
    assert adapter.state_dict().keys() == dict(adapter.named_parameters()).keys()


# --- Models of several layers ----------------------------------------------------------------------------


def gradients(model, adapter, run):
    adapter.zero_grad()
    run(model).backward()
    return [p.grad.clone() for p in adapter.parameters()]


def once(model):
    return model(inputs()).square().sum()


@some_variants
def test_gradients_survive_checkpointing_and_two_forwards(options):
    plain = gradients(*adapted(options), once)
    for run, factor in ((once, 1), (lambda model: once(model) + once(model), 2)):
        repeated = gradients(*adapted(options, checkpointed=True), run)
        for gradient, expected in zip(repeated, plain, strict=True):
            torch.testing.assert_close(gradient, factor * expected, rtol=1e-9, atol=1e-10)


COMPILED = [(VARIANTS[i], i in (13, 25)) for i in (3, 8, 13, 23, 25)]


@pytest.mark.parametrize(("options", "checkpointed"), COMPILED, ids=[str(v) for v, _ in COMPILED])
@pytest.mark.slow
def test_compiling_the_model_keeps_gradients(options, checkpointed):
    torch._dynamo.reset()
    plain = gradients(*adapted(options), once)
    model, adapter = adapted(options, checkpointed=checkpointed)
    repeated = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), adapter, once)
    for gradient, expected in zip(repeated, plain, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-10)


@some_variants
def test_nothing_is_stale_after_a_step(options):
    model, adapter = adapted(options)
    for change in (lambda: train(adapter), lambda: [p.data.mul_(1.5) for p in adapter.parameters()]):
        model(inputs())
        before = adapter.adapted_weight("first.q")
        change()
        after = adapter.adapted_weight("first.q")
        assert not torch.equal(before, after)
        block = model.first(inputs())  # not through the adapted model's own forward
        bare = make().first
        for name in ("q", "v", "conv", "deep", "out"):
            bare.get_submodule(name).weight.data = adapter.adapted_weight(f"first.{name}")
        torch.testing.assert_close(block, bare(inputs()), rtol=1e-10, atol=1e-10)
        y = model(inputs())
        da.merge(adapter)
        torch.testing.assert_close(model(inputs()), y, rtol=1e-10, atol=1e-10)
        da.unmerge(adapter)


def test_a_merged_or_idle_adapter_prepares_nothing():
    model, adapter = adapted({"rank": 2, "projection": "linear", "groups": 1})
    part = adapter.parts[0]
    with torch.no_grad():
        model(inputs())
    assert part.grouped_changes.current is None
    model(inputs())
    assert part.grouped_changes.current is not None
    da.merge(adapter)
    model(inputs())
    assert part.grouped_changes.current is None
    da.unmerge(adapter)
    adapter.strength = 0
    model(inputs())
    assert part.grouped_changes.current is None
    assert torch.equal(model(inputs()), make()(inputs()))


def test_a_failing_forward_leaves_nothing_stale():
    model, adapter = adapted({"rank": 2, "projection": "linear", "groups": 1})
    with pytest.raises(RuntimeError):
        model(torch.zeros(3, 5, dtype=torch.float64))
    train(adapter)
    assert not adapter.parts[0].grouped_changes.in_forward


def test_two_models_share_nothing():
    options = {"rank": 2, "groups": 2, "projection": "linear", "rho": 0.5}
    model, adapter = adapted(options)
    other, second = adapted(options)
    expected = model(inputs())
    train(second)
    other(inputs()).sum().backward()
    assert all(p.grad is None for p in adapter.parameters())
    assert torch.equal(model(inputs()), expected)


@some_variants
def test_copies_and_pickles_compute_the_same_bits(options):
    model, _ = adapted(options)
    expected = model(inputs())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(inputs()), expected)


@some_variants
def test_autocast_does_not_round_the_groups(options):
    model, adapter = adapted(options, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        model(inputs(torch.float32))
        for change in adapter.parts[0].grouped_changes.current:
            assert {tensor.dtype for tensor in change.tensors()} == {torch.float32}
    expected = make(torch.float32)
    for site in adapter.sites:
        expected.get_submodule(site.name).weight.data = adapter.adapted_weight(site)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected_output = model(inputs(torch.float32)), expected(inputs(torch.float32))
    torch.testing.assert_close(y.float(), expected_output.float(), rtol=0.1, atol=0.1)


# --- Files -----------------------------------------------------------------------------------------------


@some_variants
def test_the_order_of_the_layers_at_loading_does_not_matter(options, tmp_path):
    model, adapter = adapted(options)
    da.save(adapter, tmp_path / "a.safetensors", base="test")
    other = make(reverse=True)
    other.load_state_dict(make().state_dict())
    assert [name for name, _ in other.named_children()] == ["second", "first"]
    loaded = da.load(other, tmp_path / "a.safetensors")
    for site in adapter.sites:
        assert torch.equal(loaded.adapted_weight(site.name), adapter.adapted_weight(site))
    assert torch.equal(other(inputs()), model(inputs()))


_OTHER_PROCESS = """
import sys, torch
sys.path[:0] = {folders!r}
torch.set_num_threads({threads})
import diffadapt as da
from test_superlora import everything, make
torch.save(everything(da.load(make(torch.float32), {path!r})), {out!r})
"""


def everything(adapter):
    """The trained tensors, the numbers made again from the seed, and the weights."""
    weights = [adapter.adapted_weight(site) for site in adapter.sites]
    return [p.detach() for p in adapter.parameters()], list(adapter.buffers()), weights


@pytest.mark.parametrize(("options", "threads"), [(VARIANTS[25], 3), (VARIANTS[11], 1)], ids=["3", "1"])
@pytest.mark.slow
def test_another_process_makes_the_same_bits(options, threads, tmp_path):
    _, adapter = adapted(options, torch.float32, seed=7)
    path, out = str(tmp_path / "a.safetensors"), str(tmp_path / "out.pt")
    da.save(adapter, path)
    code = _OTHER_PROCESS.format(
        folders=[str(Path(__file__).parent), str(Path(__file__).parents[1])],
        threads=threads,
        path=path,
        out=out,
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    torch.set_num_threads(1)
    trained, made_again, weights = everything(adapter)
    for ours, theirs in zip((trained, made_again, weights), torch.load(out), strict=True):
        for tensor, other in zip(ours, theirs, strict=True):
            if threads == 1 or ours is not weights:
                assert torch.equal(tensor, other)
            else:  # a product of few rows is summed in another order by more threads
                torch.testing.assert_close(tensor, other, rtol=1e-5, atol=1e-6)


def test_the_seed_of_the_file_makes_the_projection_again(tmp_path):
    options = {"rank": 2, "groups": 1, "projection": "nonlinear", "rho": 0.5}
    _, adapter = adapted(options, seed=11)
    da.save(adapter, tmp_path / "a.safetensors")
    loaded = da.load(make(), tmp_path / "a.safetensors")
    for constant, other in zip(adapter.buffers(), loaded.buffers(), strict=True):
        assert torch.equal(constant, other)
    _, different = adapted(options, seed=12)
    assert any(not torch.equal(a, b) for a, b in zip(adapter.buffers(), different.buffers(), strict=True))


# --- Options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": "block"}, "groups must be weight, layer or a number >= 1, got 'block'"),
        ({"groups": 0}, "got 0"),
        ({"groups": True}, "groups"),
        ({"tensor_order": 6}, r"tensor_order must be in 1\.\.5, got 6"),
        ({"kron_factors": 5}, r"kron_factors must be in 1\.\.4, got 5"),
        ({"kron_block": 0}, r"kron_block must be in 1\.\.512, got 0"),
        ({"core": "train"}, "core must be one of tucker, cp"),
        ({"projection": "random"}, "projection must be one of"),
        ({"rho": 0.0, "projection": "linear"}, r"rho must be in \(0, 1\], got 0.0"),
        ({"rho": 1.5, "projection": "linear"}, "got 1.5"),
        ({"rho": 0.5}, "projection=none needs rho=1"),
        ({"rho": 0.5, "projection": "shuffle"}, "projection=shuffle needs rho=1"),
        ({"reshape": False, "tensor_order": 3}, "reshape=False needs tensor_order=2, got 3"),
        ({"kron_factors": 2, "tensor_order": 3}, "kron_factors=2 needs tensor_order=2, got 3"),
    ],
)
def test_wrong_options_say_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        da.SuperLoRA(**options)


def test_a_rank_must_be_below_the_shortest_side():
    model = make()
    with pytest.raises(ValueError, match=r"rank must be below 3, the shortest side .* got 3; lower the rank"):
        da.attach(model, da.SuperLoRA(rank=3, tensor_order=5), "all")
    assert not da.attached(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_most_groups_that_are_allowed_can_be_joined():
    model = nn.Sequential(nn.Linear(64, 64)).double()
    adapter = da.attach(model, da.SuperLoRA(tensor_order=1, groups=256), "0")
    train(adapter)
    x = torch.randn(3, 64, dtype=torch.float64)
    y = model(x)
    y.square().sum().backward()
    torch.testing.assert_close(y, x @ adapter.adapted_weight("0").T + model[0].bias)
    assert all(parameter.grad.any() for parameter in adapter.parameters())


def test_dense_factors_far_larger_than_the_group_are_refused():
    model = make()
    with pytest.raises(ValueError, match=r"make 134217728 rows and columns of a group of .*lower kron_block"):
        da.attach(model, da.SuperLoRA(rank=1, kron_factors=4, kron_block=512), "all")
    assert not da.attached(model)


def test_rank_patterns_do_not_fit_shared_factors():
    with pytest.raises(ValueError, match="cannot have a rank of its own"):
        da.attach(make(), da.SuperLoRA(rank=2), "all", rank_patterns={"first.q": 1})


def test_every_option_can_be_written_as_text():
    method = da.make_method("superlora(rank=2, groups=4, tensor_order=3, projection=linear, rho=0.1)")
    assert method == da.SuperLoRA(rank=2, groups=4, tensor_order=3, projection="linear", rho=0.1)
    assert da.make_method("superlora(groups=layer, reshape=false)").groups == "layer"
