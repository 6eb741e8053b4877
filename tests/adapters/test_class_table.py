"""train_scripts/class_conditional.py on a new set of classes, and `diffadapt sample` of what it leaves."""

import json

import pytest
import torch
import yaml
from helpers.class_pipelines import arguments, class_pipeline, dit_pipeline, write_classes
from helpers.scripts import runner
from safetensors.torch import load_file

import diffadapt as da
from diffadapt.cli.main import main as diffadapt
from diffadapt.methods.parse_method import with_class_table

pytestmark = pytest.mark.slow

FIVE = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture
def run(monkeypatch):
    """Runs the script in this process. Returns its exit code."""
    return runner("class_conditional", monkeypatch)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return class_pipeline(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    return write_classes(tmp_path_factory.mktemp("five") / "train", names=FIVE, side=8, each=2)


def table_shapes(folder):
    stored = load_file(folder / "adapter.safetensors")
    return [tuple(value.shape) for name, value in stored.items() if "table_" in name]


@pytest.mark.slow
def test_more_classes_than_the_base_has_get_a_table_of_their_own(run, base, five, tmp_path, capsys):
    out = tmp_path / "out"
    more = {"train_data_dir": five, "held_out": five, "validation_steps": 2, "checkpointing_steps": 2}
    assert run(*arguments(base, out, extractor="embedded:digits", num_validation_images=6, **more)) == 0
    shown = capsys.readouterr().out
    assert "classes  5 of the data as 0,1,2,3,4 of a new table of the adapter: 5 classes, 0 to 4," in shown
    assert table_shapes(out) == [(6, 32)]
    names = {str(label): name for label, name in enumerate(FIVE)}
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["classes"] == names
    assert da.read_metadata(out / "adapter.safetensors")["classes"] == names
    chosen = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))["adapter"]
    assert chosen == "lora(rank=2)+class_embedding(classes=5)"
    again = ["--resume_from_checkpoint", out / "checkpoint-2"]
    assert run(*arguments(base, tmp_path / "again", **{**more, "num_validation_images": 0}), *again) == 0
    whole, parts = (load_file(folder / "adapter.safetensors") for folder in (out, tmp_path / "again"))
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    check_drawing(out, tmp_path, capsys)


def check_drawing(out, tmp_path, capsys):
    """By number and by name, and what is no class."""
    fixed = ["sample", "--adapter", str(out / "adapter.safetensors"), "--num_inference_steps", "2"]
    fixed += ["--num_images", "1", "--num_threads", "1", "--guidance_scale", "2"]
    assert diffadapt([*fixed, "--class_labels", "4, bee", "--out", str(tmp_path / "drawn")]) == 0
    drawn = json.loads((tmp_path / "drawn" / "sample.json").read_text(encoding="utf-8"))["images"]
    assert [(image["label"], image["prompt"]) for image in drawn] == [(4, "class eel"), (1, "class bee")]
    capsys.readouterr()
    assert diffadapt([*fixed, "--class_labels", "5", "--out", str(tmp_path / "wrong")]) == 2
    assert "no class 5: the adapter's new class table has 5 classes, 0 to 4" in capsys.readouterr().err
    assert diffadapt([*fixed, "--class_labels", "bea", "--out", str(tmp_path / "wrong")]) == 2
    assert "did you mean bee?" in capsys.readouterr().err


@pytest.mark.parametrize(("make", "width"), [(class_pipeline, 32), (dit_pipeline, 16)])
def test_a_table_of_fewer_classes_on_request(run, tmp_path, capsys, make, width):
    base = make(tmp_path / "base")
    two = write_classes(tmp_path / "two", names=("yes", "no"), side=16)
    resolution = {"resolution": 16} if make is dit_pipeline else {}
    out = tmp_path / "out"
    fixed = arguments(base, out, train_data_dir=two, num_validation_images=2, **resolution)
    assert run(*fixed, "--new_class_table") == 0
    assert "a new table of the adapter: 2 classes, 0 to 1, and the null class" in capsys.readouterr().out
    assert table_shapes(out) == [(3, width)]


def test_more_classes_than_a_dit_has_and_labels_in_an_explicit_table(run, base, tmp_path, capsys):
    two = write_classes(tmp_path / "two", names=("yes", "no"), side=16)
    fixed = {"train_data_dir": two, "num_validation_images": 2, "class_labels": "1003,1000"}
    adapter = {"adapter": "lora(rank=2)+class_embedding(classes=1004)"}
    out = tmp_path / "out"
    assert run(*arguments(dit_pipeline(tmp_path / "dit"), out, resolution=16, **fixed, **adapter)) == 0
    assert table_shapes(out) == [(1005, 16)]
    assert json.loads((out / "run.json").read_text(encoding="utf-8"))["classes"] == {
        "1000": "yes",
        "1003": "no",
    }


def test_a_base_without_null_class_gets_a_table_without_one(run, five, tmp_path):
    base, out = class_pipeline(tmp_path / "base", null_class=None), tmp_path / "out"
    more = {"train_data_dir": five, "guidance_scale": 1, "label_dropout": 0, "num_validation_images": 0}
    assert run(*arguments(base, out, **more)) == 0
    assert table_shapes(out) == [(5, 32)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"class_labels": "0,1,2,3,4"},
            "has 3 classes, 0 to 2, and the null class 3. For a class table of its",
        ),
        ({"class_labels": "0,1,2,3,7"}, "--adapter '...+class_embedding(classes=8)'"),
        ({"adapter": "class_embedding(classes=4)"}, "new class table, which has 4 classes, 0 to 3"),
        ({"adapter": "peft:IA3"}, "cannot have a class table beside it"),
    ],
)
def test_classes_without_a_row_are_refused_with_the_remedy(run, base, five, tmp_path, capsys, given, message):
    out = tmp_path / "out"
    assert run(*arguments(base, out, train_data_dir=five, **given)) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lora", "lora+class_embedding(classes=7)"),
        ("1lora+class_embedding", "1lora+class_embedding(classes=7)"),
        ("difffit(beta=False)", "difffit(beta=False,classes=7)"),
        ("difffit(class_embedding=false)", "difffit(class_embedding=false)+class_embedding(classes=7)"),
    ],
)
def test_the_table_becomes_part_of_the_adapters_name(name, expected):
    assert with_class_table(name, 7, null_class=True) == expected
    assert da.make_method(expected)
    without = with_class_table(name, 7, null_class=False)
    assert without == expected.replace("classes=7", "classes=7,null_class=false")
    tables = [part for part in da.make_method(without).members if getattr(part, "classes", None)]
    assert [(part.classes, part.null_class) for part in tables] == [(7, False)]
