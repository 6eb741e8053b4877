"""``class_embedding(classes=N)``: tables longer and shorter than the base's, on a UNet2DModel and a DiT."""

import copy

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from helpers.class_models import (
    CLASSES,
    FEWER,
    MORE,
    attached,
    network,
    output,
    picture,
    table,
    tables_of,
    trained,
)
from helpers.class_pipelines import class_tables
from torch import nn

import diffadapt as da
from diffadapt.models.open_pipeline import open_pipeline
from diffadapt.pipelines import ClassConditionalPipeline

sizes = pytest.mark.parametrize("size", [MORE, FEWER], ids=["more", "fewer"])
kinds = pytest.mark.parametrize("kind", ["unet", "dit"])


@kinds
@sizes
def test_rows_start_as_the_bases_or_as_the_mean_and_the_null_class_stays_last(fresh, kind, size):
    pipe, classes, base_classes = fresh(kind), size[kind], CLASSES[kind]
    base = tables_of(network(pipe))[0].weight.clone()
    before = output(pipe, 0, 1, base_classes)
    adapter = attached(pipe, classes)
    new_table = table(adapter)
    assert new_table.shape == (classes + 1, base.shape[1])
    assert torch.equal(new_table[: min(classes, base_classes)], base[: min(classes, base_classes)])
    assert torch.equal(new_table[-1], base[-1])
    mean = base[:base_classes].mean(0)
    torch.testing.assert_close(
        new_table[base_classes:classes], mean.expand(max(0, classes - base_classes), -1)
    )
    null = max(classes, base_classes)
    assert (pipe.class_table.rows, pipe.class_table.null_class) == (null + 1, null)
    assert torch.equal(output(pipe, 0, 1, null), before)


@kinds
@sizes
@pytest.mark.slow
def test_two_steps_then_saved_and_loaded_into_a_fresh_base(fresh, tmp_path, kind, size):
    pipe, classes = fresh(kind), size[kind]
    base = copy.deepcopy(network(pipe).state_dict())
    null = max(classes, CLASSES[kind])
    adapter = attached(pipe, classes)
    start = table(adapter).clone()
    trained(adapter, pipe, 0, classes - 1, null)
    moved = (table(adapter) != start).any(1)
    assert moved[[0, classes - 1, classes]].all()  # the null class is the table's last row
    assert moved.sum() == len({0, classes - 1, classes})
    weights = [adapter.adapted_weight(site) for site in adapter.sites if site.kind == "embedding"]
    assert len(weights) == len(tables_of(network(pipe)))
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    last = [*range(classes), null]
    torch.testing.assert_close(weights[0][last], table(adapter).detach(), rtol=0, atol=1e-6)
    labels = (0, classes - 1, null)
    with torch.no_grad():
        expected = output(pipe, *labels)
        da.save(adapter, tmp_path / "a.safetensors")
        again = fresh(kind)
        assert da.load(again, tmp_path / "a.safetensors").num_parameters == adapter.num_parameters
        assert torch.equal(output(again, *labels), expected)
    da.detach(adapter)
    for name, value in network(pipe).state_dict().items():
        assert torch.equal(value, base[name])
    assert pipe.class_table.rows == CLASSES[kind] + 1
    with torch.no_grad():
        assert torch.equal(output(pipe, 0, CLASSES[kind]), output(fresh(kind), 0, CLASSES[kind]))


@kinds
@sizes
def test_merged_unmerged_and_switched_off(fresh, tmp_path, kind, size):
    pipe, classes, base_classes = fresh(kind), size[kind], CLASSES[kind]
    model, config = network(pipe), dict(network(pipe).config)
    adapter = trained(attached(pipe, classes), pipe, 0, classes - 1)
    null = max(classes, base_classes)
    with torch.no_grad():
        expected, bare = output(pipe, classes - 1, null), output(fresh(kind), 0, base_classes)
        assert da.merge(adapter) == 0
        torch.testing.assert_close(output(pipe, classes - 1, null), expected, rtol=1e-4, atol=1e-5)
        pipe.save_pretrained(tmp_path / "merged")  # opens without an adapter
        saved = open_pipeline(str(tmp_path / "merged"))
        assert saved.class_table.rows == null + 1
        torch.testing.assert_close(output(saved, classes - 1, null), expected, rtol=1e-4, atol=1e-5)
        with da.disabled(pipe):
            assert torch.equal(output(pipe, 0, base_classes), bare)
            assert pipe.class_table.rows == base_classes + 1
        adapter.strength = 0.0
        assert torch.equal(output(pipe, 0, base_classes), bare)
        adapter.strength = 1.0
        da.unmerge(adapter)
        assert torch.equal(output(pipe, classes - 1, null), expected)
    assert dict(model.config) == config
    assert all(len(layer.weight) == base_classes + 1 == layer.num_embeddings for layer in tables_of(model))


def test_guidance_is_that_of_a_model_built_with_the_larger_table(fresh):
    pipe = fresh("unet")
    adapter = da.attach(pipe, da.ClassEmbedding(classes=5), "class_embedding")
    trained(adapter, pipe, 0, 4, 5)
    whole = UNet2DModel.from_config({**pipe.unet.config, "num_class_embeds": 6})
    values = {**pipe.unet.state_dict(), "class_embedding.weight": table(adapter).detach()}
    whole.load_state_dict(values)
    rebuilt = ClassConditionalPipeline(whole, pipe.scheduler, null_class=5)
    rebuilt.set_progress_bar_config(disable=True)
    torch.testing.assert_close(picture(pipe, 4), picture(rebuilt, 4), rtol=0, atol=1e-5)
    assert not torch.allclose(picture(pipe, 4), picture(pipe, 3), atol=1e-3)


@sizes
def test_a_dit_is_guided_by_the_null_row_in_use(fresh, size):
    pipe, classes = fresh("dit"), size["dit"]
    adapter = trained(attached(pipe, classes), pipe, 0, classes - 1, max(classes, 1000))
    pipe.scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    labels = []
    table_of_a_block = class_tables(pipe.transformer)[1]
    handle = table_of_a_block.register_forward_pre_hook(lambda _, given: labels.append(given[0].tolist()))
    image = picture(pipe, classes - 1)
    assert labels == [[classes - 1, max(classes, 1000)]] * 2
    handle.remove()
    stock = diffusers.DiTPipeline(**pipe.components)
    stock.set_progress_bar_config(disable=True)
    alone = picture(stock, classes - 1, guidance=1)
    assert torch.equal(alone, picture(pipe, classes - 1, guidance=1))
    assert torch.equal(image, picture(stock, classes - 1)) == (classes <= 1000)
    da.detach(adapter)
    assert torch.equal(picture(pipe, 7), picture(stock, 7))
    with pytest.raises(ValueError, match="no class 1000: the base has 1000 classes, 0 to 999, and the null"):
        picture(pipe, 1000)


@kinds
@sizes
def test_a_wrong_class_names_the_range(fresh, kind, size):
    pipe, classes = fresh(kind), size[kind]
    attached(pipe, classes)
    expected = f"no class {classes}: the adapter's new class table has {classes} classes, 0 to {classes - 1},"
    with pytest.raises(ValueError, match=expected):
        picture(pipe, classes)


def test_labels_dropped_in_training_mode_become_the_null_class(fresh):
    pipe = fresh("dit")
    adapter = trained(attached(pipe, 1004), pipe, 3, 1004)
    embedder = pipe.transformer.transformer_blocks[0].norm1.emb.class_embedder.train()
    embedder.dropout_prob = 1.0
    labels = torch.tensor([3, 1003])
    torch.testing.assert_close(embedder(labels), table(adapter)[[-1, -1]])
    assert embedder.num_classes == 1000
    da.detach(adapter)
    assert torch.equal(embedder(labels), embedder.embedding_table.weight[[1000, 1000]])


def test_adapters_of_several_sizes_add_up_and_are_switched_alone(fresh):
    pipe = fresh("unet")
    base = pipe.unet.class_embedding.weight.detach().clone()
    many, few = (
        da.attach(pipe, da.ClassEmbedding(classes=classes), "class_embedding", name=str(classes))
        for classes in (5, 2)
    )
    whole = da.attach(pipe, da.Full(), "class_embedding", name="whole")
    with torch.no_grad():
        for adapter in (many, few, whole):
            for tensor in adapter.parameters():
                tensor += torch.randn(tensor.shape)
    few.strength = 0.5
    start = torch.cat([base[:3], base[:3].mean(0).expand(2, -1), base[3:]])
    expected = start + (table(many) - start)
    expected[[0, 1, 5]] += 0.5 * (table(few) - base[[0, 1, 3]])
    expected[[0, 1, 2, 5]] += next(whole.parameters())
    layer, rows = pipe.unet.class_embedding, torch.arange(6)
    torch.testing.assert_close(layer(rows), expected)
    da.merge(few)
    torch.testing.assert_close(layer(rows), expected)
    da.merge(many)
    da.merge(whole)
    torch.testing.assert_close(layer.weight, expected)
    many.strength = 0.0
    assert pipe.class_table.rows == 4
    da.unmerge(few)
    assert str(pipe.class_table) == "2 classes, 0 to 1, and the null class 3"
    few.strength = 0.0
    assert str(pipe.class_table) == "3 classes, 0 to 2, and the null class 3"
    for adapter in (whole, many, few):
        da.detach(adapter)
    assert torch.equal(layer.weight, base)


def test_a_longer_table_beside_a_base_in_half_precision_starts_with_its_bits_and_compiles_whole():
    model = nn.ModuleDict({"class_embedding": nn.Embedding(4, 8, dtype=torch.bfloat16)})
    layer, before = model["class_embedding"], model["class_embedding"].weight.clone()
    adapter = da.attach(model, da.ClassEmbedding(classes=6), "class_embedding")
    rows = torch.tensor([0, 1, 2, 6])
    assert torch.equal(layer(rows), before)
    assert table(adapter).dtype == torch.float32
    with torch.no_grad():
        table(adapter).add_(1.0)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.arange(7)), table(adapter).to(torch.bfloat16))
    assert 0 < da.merge(adapter) < 0.01  # the share lost to rounding
    torch.testing.assert_close(layer.weight, table(adapter).to(torch.bfloat16))
    da.detach(adapter)
    assert torch.equal(layer.weight, before)
