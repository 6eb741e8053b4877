"""Data sets of the `datasets` library: columns, splits, streams; nothing outside of the set is read."""

import json

import datasets
import pyarrow
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from helpers.pipelines import write_pictures
from pyarrow import parquet

from diffadapt.common.images import open_image
from diffadapt.data.hub_tables import open_table, read_captioned_table, read_labelled_table


@pytest.fixture
def table(tmp_path):
    """Five pictures with captions and labels, as files beside the table."""
    paths = sorted(str(p) for p in write_pictures(tmp_path / "pictures", 5).iterdir())
    columns = {"picture": paths, "text": [f"disc {i}" for i in range(5)], "label": [0, 1, 0, 1, 1]}
    kinds = {"picture": Image(), "text": Value("string"), "label": ClassLabel(names=["cat", "dog"])}
    return Dataset.from_dict(columns, features=Features(kinds))


def test_a_saved_data_set_gives_the_pictures_that_were_put_in(tmp_path, table):
    table.save_to_disk(tmp_path / "saved")
    name = str(tmp_path / "saved")
    examples = list(read_captioned_table(open_table(name), name=name))
    assert [e.caption for e in examples] == [f"disc {i}" for i in range(5)]
    for index, example in enumerate(examples):
        original = open_image(tmp_path / "pictures" / f"picture-{index}.png")
        assert open_image(example.source).tobytes() == original.tobytes()
    assert str(examples[2].source) == f"row 2 of {name}"


def test_a_folder_is_read_as_datasets_reads_it_with_and_without_streaming(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_pictures(tmp_path / "data", 3)
    rows = [{"file_name": f"picture-{i}.png", "text": f"disc {i}"} for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    whole = read_captioned_table(open_table(str(folder)), name=str(folder))
    stream = read_captioned_table(open_table(str(folder), is_streaming=True), name=str(folder), buffer=2)
    drawn = [stream.example(draw) for draw in stream.sample_indices(range(3))]
    assert {e.caption for e in drawn} == {e.caption for e in whole} == {"disc 0", "disc 1", "disc 2"}
    pictures = {e.caption: e.source.read_bytes() for e in whole}
    assert all(e.source.read_bytes() == pictures[e.caption] for e in drawn)


def test_a_configuration_chooses_the_part_of_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for name, count in (("few", 1), ("many", 3)):
        write_pictures(tmp_path / "data" / name, count)
    parts = "".join(f"- config_name: {name}\n  data_dir: {name}\n" for name in ("few", "many"))
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{parts}---\n", encoding="utf-8")
    counts = [len(open_table(str(tmp_path / "data"), config_name=name)) for name in ("few", "many")]
    assert counts == [1, 3]


def test_wrong_columns_and_splits_list_those_there_are(tmp_path, table):
    with pytest.raises(
        ValueError, match=r"no column 'words'; --caption_column is one of: picture, text, label"
    ):
        read_captioned_table(table, name="n", caption_column="words")
    with pytest.raises(ValueError, match=r"no column 'img'; --image_column .*: picture, text, label"):
        read_captioned_table(table, name="n", image_column="img")
    with pytest.raises(ValueError, match=r"column 'label' of n holds .*, not images"):
        read_captioned_table(table, name="n", image_column="label")
    with pytest.raises(ValueError, match=r"no column 'kind' of labels, but: picture, text, label"):
        read_labelled_table(table, name="n", label_column="kind")
    with pytest.raises(ValueError, match=r"row 0 of n has the label -1; .* must hold class numbers"):
        read_labelled_table(table.add_column("class", [-1, 0, 0, 0, 0]), name="n", label_column="class")
    DatasetDict(test=table).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="no split 'train', but: test"):
        open_table(str(tmp_path / "saved"))


def test_labels_become_classes_with_their_names(table):
    examples, names = read_labelled_table(table, name="n")
    assert names == ["cat", "dog"]
    assert [e.caption for e in examples] == [0, 1, 0, 1, 1]


def test_of_several_captions_the_first_is_used(tmp_path, table):
    table = table.remove_columns("text").add_column("text", [["", "one"], ["two", "x"], [], ["a"], ["b"]])
    captions = [e.caption for e in read_captioned_table(table, name=str(tmp_path / "pictures"))]
    assert captions == ["one", "two", "", "a", "b"]


@pytest.mark.parametrize("cell", ["https://example.com/cat.png", "outside"])
def test_addresses_and_files_elsewhere_are_never_read(tmp_path, cell):
    if cell == "outside":
        cell = str(write_pictures(tmp_path / "elsewhere", 1) / "picture-0.png")
    (tmp_path / "data").mkdir()
    table = Dataset.from_dict({"image": [cell], "text": ["a disc"]})
    examples = read_captioned_table(table, name=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="not a file of this data set"):
        examples[0].source.read_bytes()


def test_a_name_that_is_nowhere_is_an_error_of_the_documented_kind(tmp_path):
    with pytest.raises((OSError, ValueError)):
        open_table(str(tmp_path / "nowhere"))


def test_labels_are_numbers_with_gaps_or_names(table, capsys):
    numbers = table.remove_columns("label").add_column("label", [900, 0, 5, 5, 0])
    examples, names = read_labelled_table(numbers, name="n")
    assert names == ["0", "5", "900"]
    assert [e.caption for e in examples] == [2, 0, 1, 1, 0]
    assert "labels of n: 0, 5, 900 are its classes 0 to 2" in capsys.readouterr().out
    words = table.remove_columns("label").add_column("label", ["dog", "ant", "dog", "cat", "ant"])
    examples, names = read_labelled_table(words, name="n")
    assert names == ["ant", "cat", "dog"]
    assert [e.caption for e in examples] == [2, 0, 2, 1, 0]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_paths_in_tables_of_text_are_images(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_pictures(tmp_path / "data", 2)
    rows = [("picture-0.png", "a red, shiny disc"), ("picture-1.png", "a disc")]
    if kind == "csv":
        text = "image,text\n" + "".join(f'{name},"{caption}"\n' for name, caption in rows)
    else:
        text = "".join(json.dumps({"image": name, "text": caption}) + "\n" for name, caption in rows)
    (folder / f"train.{kind}").write_text(text, encoding="utf-8")
    name = str(folder)
    for is_streaming in (False, True):
        examples = read_captioned_table(open_table(name, is_streaming=is_streaming), name=name)
        if is_streaming:
            examples = [examples.example(draw) for draw in examples.sample_indices(range(2))]
        assert {e.caption for e in examples} == {"a red, shiny disc", "a disc"}
        assert all(open_image(e.source).size == (40, 40) for e in examples)


def test_names_of_classes_that_are_numbers_are_sorted_as_folders_are(table):
    words = table.remove_columns("label").add_column("label", ["10", "2", "2", "10", "1"])
    examples, names = read_labelled_table(words, name="n")
    assert names == ["1", "2", "10"]
    assert [e.caption for e in examples] == [2, 1, 1, 2, 0]


@pytest.mark.parametrize("missing", [None, " "])
def test_a_row_without_the_name_of_its_class_is_named(table, missing):
    words = table.remove_columns("label").add_column("label", ["dog", "ant", missing, "cat", "ant"])
    with pytest.raises(ValueError, match="row 2 of n has the label"):
        read_labelled_table(words, name="n")


def test_an_image_of_a_table_that_is_asked_for_again_is_the_same_one(table):
    """What is read ahead is found by its source."""
    examples = read_captioned_table(table, name="n")
    assert examples[1].source == examples[1].source
    assert examples[1].source != examples[2].source
    others = read_captioned_table(table, name="n")
    assert examples[1].source != others[1].source  # another table may have the same name


def test_captions_of_another_type_are_refused_before_a_row_is_read(table):
    with pytest.raises(ValueError, match=r"column 'label' of n holds ClassLabel.*not captions"):
        read_captioned_table(table, name="n", caption_column="label")
    numbers = table.remove_columns("text").add_column("text", [1, 2, 3, 4, 5])
    with pytest.raises(ValueError, match=r"column 'text' of n holds Value\('int64'\), not captions"):
        read_captioned_table(numbers, name="n")


def test_missing_captions_of_a_table_are_no_words(table):
    table = table.remove_columns("text").add_column("text", [None, "nan", "a  disc", "None", "null"])
    assert [e.caption for e in read_captioned_table(table, name="n")] == ["", "", "a disc", "", ""]


@pytest.mark.parametrize("is_streaming", [False, True])
def test_images_in_plain_parquet_are_read(tmp_path, monkeypatch, is_streaming):
    """Tables of pandas and polars hold bytes and paths without the metadata of `datasets`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    contents = [p.read_bytes() for p in sorted(write_pictures(tmp_path / "pictures", 3).iterdir())]
    cells = [{"bytes": content, "path": None} for content in contents]
    (tmp_path / "data").mkdir()
    columns = {"image": cells, "text": ["disc 0", "disc 1", "disc 2"]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "data" / "train.parquet")
    name = str(tmp_path / "data")
    table = read_captioned_table(open_table(name, is_streaming=is_streaming), name=name, buffer=3)
    rows = [table.example(draw) for draw in table.sample_indices(range(3))] if is_streaming else list(table)
    assert {e.caption: e.source.read_bytes() for e in rows} == dict(
        zip(columns["text"], contents, strict=True)
    )


def test_paths_are_relative_to_the_folder_of_their_table(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write_pictures(tmp_path / "data" / "inner", 1)
    rows = [{"image": "picture-0.png", "text": "a disc"}, {"image": "none.png", "text": "a square"}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    name = str(tmp_path / "data")
    examples = read_captioned_table(
        datasets.load_dataset("json", data_files=str(folder / "*.jsonl"))["train"], name=name
    )
    assert examples[0].source.read_bytes() == (folder / "picture-0.png").read_bytes()
    with pytest.raises(ValueError, match=r"row 1 of .* names .*none\.png, which is not"):
        examples[1].source.read_bytes()
