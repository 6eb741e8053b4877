"""eval/weights.py: figures, tables and plots of adapter files."""

import json

import pytest
import weights as script
from helpers.perturb import perturb
from PIL import Image

import diffadapt as da
from diffadapt.evaluation.adapter_analysis import analyse
from diffadapt.models.open_pipeline import open_pipeline


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny base, files of adapters on its attention, and what `analyse` says of them."""
    from helpers.pipelines import tiny_sd_pipeline

    folder = tmp_path_factory.mktemp("files")
    base = str(tiny_sd_pipeline(folder / "base"))
    pipe = open_pipeline(base)
    for name, seed in (("full", 1), ("lora", 2), ("1lora", 3)):
        adapter = perturb(da.attach(pipe, da.make_method(name), "attention"), seed=seed, size=0.01)
        da.save(adapter, folder / name / "adapter.safetensors", base=base)
        da.detach(adapter)
    return folder


def path_of(files, name):
    return str(files / name / "adapter.safetensors")


@pytest.mark.slow
def test_table_json_and_plots_hold_the_figures_of_the_files(files, tmp_path, capsys):
    given = [path_of(files, "lora"), path_of(files, "1lora"), "--dense", path_of(files, "full")]
    assert script.main([*given, "--output", str(tmp_path), "--k", "3"]) == 0
    content = json.loads((tmp_path / "weights.json").read_text(encoding="utf-8"))
    assert list(content["adapters"]) == ["lora/adapter", "1lora/adapter"]
    pipe = open_pipeline(content["base"])
    adapters = {name: da.load(pipe, path_of(files, name), name=name) for name in ("lora", "full")}
    expected = analyse({"lora": adapters["lora"]}, adapters["full"], k=3)["lora"]
    found = content["adapters"]["lora/adapter"]
    assert found["parameters"] == adapters["lora"].num_parameters
    for layer, own in zip(found["layers"], expected, strict=True):
        assert layer["name"] == own.name
        for field in ("norm", "effective_rank", "amplification", "left", "right", "distance"):
            assert layer[field] == pytest.approx(getattr(own, field), rel=1e-6)
        assert layer["alignment"]["learned"] == pytest.approx(own.alignment["learned"], rel=1e-6)
    printed = capsys.readouterr().out
    assert "| lora/adapter | lora |" in " ".join(printed.split())
    assert "d_E" in printed
    assert "## 1lora/adapter | layer | shape |" in " ".join(
        (tmp_path / "weights.md").read_text(encoding="utf-8").split()
    )
    for name in ("layers", "geometry", "alignment"):
        assert Image.open(tmp_path / f"{name}.png").width > 500


def test_without_a_dense_fine_tune_it_says_what_that_would_show(files, tmp_path, capsys):
    assert script.main([path_of(files, "lora"), "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "next: --dense" in printed
    assert "| d_E |" not in printed
    assert not (tmp_path / "geometry.png").exists()


def test_another_method_as_the_dense_fine_tune_and_a_file_twice_are_refused(files, tmp_path):
    lora, output = path_of(files, "lora"), ["--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="is of method 1lora; a dense fine-tune is of method full"):
        script.main([lora, "--dense", path_of(files, "1lora"), *output])
    with pytest.raises(ValueError, match="the same adapter file is given twice"):
        script.main([lora, lora, *output])
    assert not (tmp_path / "out").exists()


def test_labels_are_as_short_as_they_can_be():
    assert list(script.unique_labels(["a/x.safetensors", "b/y.safetensors"])) == ["x", "y"]
    assert list(script.unique_labels(["a/x.safetensors", "b/x.safetensors"])) == ["a/x", "b/x"]


def test_a_mean_curve_goes_over_the_layers_that_are_long_enough():
    assert script.mean_curve([[1.0, 3.0, 5.0], [3.0, 5.0]]) == [2.0, 4.0, 5.0]


@pytest.mark.parametrize("option", ["k", "rank", "directions"])
def test_numbers_have_ranges(option, files, tmp_path):
    with pytest.raises(ValueError, match=f"--{option} must be at least 1, got 0"):
        script.main([path_of(files, "lora"), f"--{option}", "0", "--output", str(tmp_path)])


def test_a_seed_beyond_64_bits_is_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"--seed must be at least .* got 9223372036854775808"):
        script.main([path_of(files, "lora"), "--seed", str(2**63), "--output", str(tmp_path)])


def test_a_folder_that_cannot_be_written_is_told_first(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file; give a folder"):
        script.main(["nowhere.safetensors", "--output", str(tmp_path / "file")])
