"""Smaller, combined and extracted adapters, and what is said of their errors."""

import pytest
import torch
from helpers.models import denoiser, image
from helpers.perturb import perturb
from helpers.pipelines import tiny_sd_pipeline

import diffadapt as da
from diffadapt.formats.edit.extract import SOLVERS, extract, relative_error, share_outside
from diffadapt.formats.edit.open_adapters import replaced
from diffadapt.formats.edit.resize_combine import combined, rank_for_energy, resized
from diffadapt.formats.layer_change import layer_changes

pytestmark = pytest.mark.slow


@torch.no_grad()
def run(model):
    return model.eval()(image())


@pytest.mark.parametrize(
    "method", ["lora(rank=3)", "flora(rank=3)", "dora(rank=3)", "liera(rank=2)", "full+norms"]
)
def test_a_rank_that_is_large_enough_keeps_everything(method):
    model = denoiser()
    adapter = perturb(da.attach(model, da.make_method(method), "attention+conv"))
    before = run(model)
    forms, kept = resized(layer_changes([adapter]), rank=1000)
    replaced([adapter], forms)
    assert kept == pytest.approx(1)
    assert torch.allclose(run(model), before, atol=2e-4)


def test_a_smaller_rank_is_the_best_of_its_size_and_the_energy_is_what_is_said():
    model = denoiser()
    adapter = perturb(da.attach(model, da.LoRA(rank=6), "to_q"))
    site = adapter.sites[0].name
    change = (adapter.adapted_weight(site) - adapter.layer_states[site].base()).double()
    values = torch.linalg.svdvals(change)
    forms, _ = resized(layer_changes([adapter]), rank=2)
    cut = forms[site].tensors["up"] @ forms[site].tensors["down"]
    assert (cut - change).norm() == pytest.approx(values[2:].norm().item(), rel=1e-5)
    total = kept = 0.0
    for other in adapter.sites:
        own = torch.linalg.svdvals(
            (adapter.adapted_weight(other) - adapter.layer_states[other.name].base()).double()
        )
        total, kept = total + own.square().sum(), kept + own[:2].square().sum()
    assert resized(layer_changes([adapter]), rank=2)[1] == pytest.approx((kept / total).item(), rel=1e-6)


def test_an_energy_chooses_the_smallest_rank_that_keeps_it():
    values = torch.tensor([3.0, 2.0, 1.0, 0.0])  # squares 9, 4, 1
    assert [rank_for_energy(values, share) for share in (0.5, 9 / 14, 0.7, 13 / 14, 1.0)] == [1, 1, 2, 2, 3]
    assert rank_for_energy(torch.zeros(4), 0.9) == 1


@pytest.mark.parametrize(
    "options", [{}, {"rank": 1, "energy": 0.5}, {"rank": 0}, {"energy": 0.0}, {"energy": 1.5}]
)
def test_sizes_that_make_no_sense_are_refused(options):
    adapter = da.attach(denoiser(), da.LoRA(rank=2), "to_q")
    with pytest.raises(ValueError, match=r"rank|energy"):
        resized(layer_changes([adapter]), **options)


@pytest.mark.parametrize(
    ("first", "second"),
    [("lora(rank=1)", "lora(rank=2)"), ("lora(rank=1)", "liera(rank=2)"), ("dora(rank=2)", "1lora+norms")],
)
def test_combined_adapters_do_what_the_stack_did(first, second):
    model = denoiser()
    pair = [
        perturb(da.attach(model, da.make_method(method), "attention", name=str(seed), seed=seed), seed)
        for seed, method in enumerate((first, second))
    ]
    pair[0].strength, pair[1].strength = 0.7, 0.5
    stacked = run(model)
    forms, error = combined(layer_changes(pair))
    adapter = replaced(pair, forms)
    assert torch.allclose(run(model), stacked, atol=1e-5)
    assert error < 1e-6
    assert list(da.attached(model).values()) == [adapter]


def test_low_rank_pairs_are_joined_by_their_factors():
    model = denoiser()
    pair = [perturb(da.attach(model, da.LoRA(rank=r), "to_q", name=str(r)), r) for r in (1, 2)]
    forms, _ = combined(layer_changes(pair))
    assert {form.form for form in forms.values()} == {"lora"}
    assert {form.rank for form in forms.values()} == {3}


def tuned_pair(method, targets="attention+conv"):
    """A model whose change the method can hold, and the bare model."""
    tuned = denoiser()
    adapter = perturb(da.attach(tuned, da.make_method(method), targets, seed=4))
    da.merge(adapter)
    weights = {name: value.clone() for name, value in tuned.state_dict().items()}
    da.detach(adapter)
    tuned.load_state_dict(weights)
    return denoiser(), tuned


@pytest.mark.parametrize(
    "method", ["lora(rank=2)", "flora(rank=2, kernel_rank=3)", "1lora", "gamma", "full", "bitfit", "norms"]
)
def test_what_a_method_made_it_can_extract(method):
    base, tuned = tuned_pair(method)
    adapter = da.attach(base, da.make_method(method), "attention+conv")
    extract(adapter, {"": tuned})
    assert relative_error(adapter, {"": tuned}) < 1e-5
    assert torch.allclose(run(base), run(tuned), atol=1e-5)


def test_dora_comes_nearer_than_lora_to_scaled_rows():
    base, tuned = tuned_pair("dora(rank=2)")
    errors = {}
    for method in ("lora(rank=2)", "dora(rank=2)"):
        adapter = da.attach(base, da.make_method(method), "attention+conv")
        extract(adapter, {"": tuned})
        errors[method[:4]] = relative_error(adapter, {"": tuned})
        da.detach(adapter)
    assert errors["dora"] < errors["lora"]


def test_the_error_falls_with_the_rank_and_the_rest_is_counted():
    base, tuned = tuned_pair("full")
    errors = []
    for rank in (1, 3, 8):
        adapter = da.attach(base, da.LoRA(rank=rank), "attention")
        extract(adapter, {"": tuned})
        errors.append(relative_error(adapter, {"": tuned}))
        outside = share_outside(adapter, {"": tuned})
        da.detach(adapter)
    assert errors[0] > errors[1] > errors[2] > 0
    assert 0 < outside < 1


def test_methods_without_a_solution_are_named():
    base, tuned = tuned_pair("full")
    adapter = da.attach(base, da.make_method("vera(rank=2)"), "attention")
    with pytest.raises(ValueError, match="vera cannot be extracted"):
        extract(adapter, {"": tuned})
    assert "vera" not in SOLVERS


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    from diffadapt.models.families import load_base

    folder = tmp_path_factory.mktemp("work")
    base = tiny_sd_pipeline(folder / "base")
    for seed, name in enumerate(("one", "two")):
        pipe = load_base(str(base)).pipe
        adapter = perturb(da.attach(pipe, da.LoRA(rank=4), "attention", seed=seed), seed)
        da.save(adapter, folder / f"{name}.safetensors", base=str(base))
        if name == "one":
            da.merge(adapter)
            weights = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
            da.detach(adapter)
            pipe.unet.load_state_dict(weights)
            pipe.save_pretrained(folder / "tuned")
    return folder


def command(capsys, *arguments):
    from diffadapt.cli.main import main

    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def test_resize_says_the_energy_it_kept(work, tmp_path, capsys):
    said = command(capsys, "resize", work / "one.safetensors", tmp_path / "small.safetensors", "--rank", 2)
    assert "ranks 2 to 2" in said
    assert "% of the energy kept" in said
    said = command(capsys, "resize", work / "one.safetensors", tmp_path / "e.safetensors", "--energy", 0.9)
    assert da.read_metadata(tmp_path / "e.safetensors")["adapter"]["base"]["name"] == str(work / "base")


def test_what_needs_its_base_is_opened_on_the_one_it_names(work, tmp_path, capsys):
    from diffadapt.models.families import load_base

    adapter = perturb(
        da.attach(load_base(str(work / "base")).pipe, da.make_method("dora", rank=2), "attention")
    )
    da.save(adapter, tmp_path / "dora.safetensors", base=str(work / "base"))
    said = command(
        capsys, "resize", tmp_path / "dora.safetensors", tmp_path / "d.safetensors", "--rank", 1000
    )
    assert "100.0000 % of the energy kept" in said
    found = da.load(load_base(str(work / "base")).pipe, tmp_path / "d.safetensors", strict_base=True)
    for site in found.sites:
        assert torch.allclose(found.adapted_weight(site), adapter.adapted_weight(site), atol=1e-5)


def test_with_a_base_any_file_becomes_our_own(work, tmp_path, capsys):
    one, kohya = work / "one.safetensors", tmp_path / "kohya.safetensors"
    command(capsys, "export", one, kohya, "--to", "kohya")
    both = tmp_path / "both.safetensors"
    said = command(capsys, "combine", one, f"{kohya}:-1", "--base", work / "base", "--out", both)
    assert "relative error" in said
    assert da.read_metadata(both)["format"] == "diffadapt"
    command(capsys, "resize", kohya, tmp_path / "small.safetensors", "--rank", 1, "--base", work / "base")
    assert da.read_metadata(tmp_path / "small.safetensors")["adapter"]["base"]["name"] == str(work / "base")


def test_combine_says_how_layers_were_joined(work, tmp_path, capsys):
    one, two = work / "one.safetensors", work / "two.safetensors"
    said = command(capsys, "combine", f"{one}:0.7", f"{two}:0.5", "--out", tmp_path / "both.safetensors")
    assert "0 as whole differences" in said
    assert "relative error" in said


def test_extract_says_the_relative_error(work, tmp_path, capsys):
    fixed = ["extract", "--finetuned", work / "tuned", "--base", work / "base"]
    said = command(capsys, *fixed, "--rank", 4, "--out", tmp_path / "a.safetensors")
    assert float(said.split("relative error ")[1].split()[0]) < 1e-4
    said = command(capsys, *fixed, "--param_budget", "5k", "--out", tmp_path / "b.safetensors")
    assert "relative error" in said
    assert da.read_metadata(tmp_path / "b.safetensors")["adapter"]["method"][0]["name"] == "lora"
