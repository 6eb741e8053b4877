"""New class tables where they end: bases they do not fit, files that cannot hold them, what they count."""

import copy

import diffusers
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from helpers.class_models import MORE, attached, output, table, trained
from helpers.class_pipelines import class_tables
from torch import nn

import diffadapt as da
from diffadapt.adapters.attach import attached as attached_to
from diffadapt.adapters.budget import count_parameters
from diffadapt.evaluation.adapter_analysis import analyse
from diffadapt.formats.edit.resize_combine import combined
from diffadapt.formats.layer_change import layer_changes
from diffadapt.models.open_pipeline import open_pipeline
from diffadapt.pipelines import ClassConditionalPipeline


def test_stock_pipelines_that_cannot_be_right_are_named(bases):
    parts = {**bases["dit"].components, "transformer": copy.deepcopy(bases["dit"].transformer)}
    stock = diffusers.DiTPipeline(**parts)
    with pytest.warns(UserWarning, match=r"takes row 1000 for the null class, which is 1001 now; draw with"):
        da.attach(stock, da.ClassEmbedding(classes=1001), "class_embedding")


def test_a_base_without_null_class_gets_a_table_without_one(fresh):
    parts = fresh("unet").components
    pipe = ClassConditionalPipeline(parts["unet"], parts["scheduler"])
    with pytest.raises(ValueError, match="has no null class: null_class=False"):
        da.attach(pipe, da.ClassEmbedding(classes=6), "class_embedding")
    adapter = da.attach(pipe, da.ClassEmbedding(classes=6, null_class=False), "class_embedding")
    assert table(adapter).shape == (6, 32)
    assert torch.equal(table(adapter)[:4], parts["unet"].class_embedding.weight)
    assert str(pipe.class_table) == "6 classes, 0 to 5"


@pytest.mark.parametrize(
    ("method", "targets", "message"),
    [
        ("class_embedding(classes=3,null_class=false)", "class_embedding", "drop null_class=False"),
        ("class_embedding(classes=3)", "class_embedding+!transformer_blocks.0.*", "every copy"),
        ("difffit(classes=3,class_embedding=false)", "attention", "needs class_embedding"),
        ("class_embedding(classes=0)", "class_embedding", "at least 1, got 0"),
        ("class_embedding(classes=true)", "class_embedding", "classes must be int"),
    ],
)
def test_tables_that_do_not_fit_are_refused_and_nothing_is_attached(fresh, method, targets, message):
    pipe = fresh("dit")
    with pytest.raises(ValueError, match=message):
        da.attach(pipe, da.make_method(method), targets)
    assert not attached_to(pipe)
    assert all(type(layer) is nn.Embedding for layer in class_tables(pipe.transformer))


def test_embeddings_that_are_no_class_table_and_null_classes_elsewhere_are_refused(fresh):
    with pytest.raises(ValueError, match="words is no class table"):
        da.attach(nn.ModuleDict({"words": nn.Embedding(4, 8)}), da.ClassEmbedding(classes=3), "words")
    parts = fresh("unet").components
    pipe = ClassConditionalPipeline(parts["unet"], parts["scheduler"], null_class=0)
    with pytest.raises(ValueError, match="null class in its last row"):
        da.attach(pipe, da.ClassEmbedding(classes=3), "class_embedding")


def test_exports_hold_a_longer_table_in_whole_pipelines_only(fresh, tmp_path):
    for kind, classes in MORE.items():
        pipe = fresh(kind)
        adapter = trained(attached(pipe, classes), pipe, 0, classes - 1)
        with torch.no_grad():
            expected = output(pipe, classes - 1, classes)
        report = da.export(adapter, tmp_path / kind, "merged")
        assert ("stock DiTPipeline" in report.line) == (kind == "dit")
        with torch.no_grad():
            made = output(open_pipeline(str(tmp_path / kind)), classes - 1, classes)
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-5)
        part = {"unet": UNet2DModel, "dit": DiTTransformer2DModel}[kind]
        part.from_pretrained(tmp_path / kind, subfolder="unet" if kind == "unet" else "transformer")
        assert pipe.class_table.rows == classes + 1  # the live model is as it was
        for to in ("kohya", "diffusers"):
            with pytest.raises(ValueError, match=r"rows more than the base's.*--to merged"):
                da.export(adapter, tmp_path / "file.safetensors", to)
        with pytest.raises(ValueError, match="more rows than"):
            combined(layer_changes([adapter]))


def test_figures_of_a_longer_table_are_those_of_its_change(fresh):
    pipe = fresh("unet")
    adapter = da.attach(pipe, da.ClassEmbedding(classes=5), "class_embedding")
    with torch.no_grad():
        table(adapter)[4] += 2.0
    (figures,) = analyse({"a": adapter})["a"]
    assert figures.norm == pytest.approx(2 * 32**0.5)
    assert figures.effective_rank == pytest.approx(1)


def test_parameters_of_a_real_dit_with_another_number_of_classes():
    with torch.device("meta"):
        real = DiTTransformer2DModel(num_layers=28)  # DiT-XL/2's widths, 1000 classes
    counted = count_parameters(real, da.ClassEmbedding(classes=101), "class_embedding")
    assert counted.total == 117_504  # 1LoRA's Table 1
    rest = count_parameters(real, da.DiffFit(), "linear").total - 1001 * 1152
    assert count_parameters(real, da.DiffFit(classes=101), "linear").total == rest + 117_504
