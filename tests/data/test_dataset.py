"""Data sets of the `datasets` library: columns, splits, streams; nothing outside of the set is read."""

import json

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from pipelines import write_pictures

from diffadapt.data.dataset import captioned_table, labelled_table, open_table
from diffadapt.data.images import open_image


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
    examples = list(captioned_table(open_table(name), name=name))
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
    whole = captioned_table(open_table(str(folder)), name=str(folder))
    stream = captioned_table(open_table(str(folder), is_streaming=True), name=str(folder), buffer=2)
    drawn = [stream.example(draw) for draw in stream.draws(range(3))]
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
        captioned_table(table, name="n", caption_column="words")
    with pytest.raises(ValueError, match=r"no column 'img'; --image_column .*: picture, text, label"):
        captioned_table(table, name="n", image_column="img")
    with pytest.raises(ValueError, match=r"column 'label' of n holds .*, not pictures"):
        captioned_table(table, name="n", image_column="label")
    with pytest.raises(ValueError, match=r"no column 'kind' of labels, but: picture, text, label"):
        labelled_table(table, name="n", label_column="kind")
    with pytest.raises(ValueError, match="must hold class numbers"):
        labelled_table(table, name="n", label_column="text")
    DatasetDict(test=table).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="no split 'train', but: test"):
        open_table(str(tmp_path / "saved"))


def test_labels_become_classes_with_their_names(table):
    examples, names = labelled_table(table, name="n")
    assert names == ["cat", "dog"]
    assert [e.caption for e in examples] == [0, 1, 0, 1, 1]


def test_of_several_captions_the_first_is_used(tmp_path, table):
    table = table.remove_columns("text").add_column("text", [["", "one"], ["two", "x"], [], ["a"], ["b"]])
    captions = [e.caption for e in captioned_table(table, name=str(tmp_path / "pictures"))]
    assert captions == ["one", "two", "", "a", "b"]


@pytest.mark.parametrize("cell", ["https://example.com/cat.png", "outside"])
def test_addresses_and_files_elsewhere_are_never_read(tmp_path, cell):
    if cell == "outside":
        cell = str(write_pictures(tmp_path / "elsewhere", 1) / "picture-0.png")
    (tmp_path / "data").mkdir()
    table = Dataset.from_dict({"image": [cell], "text": ["a disc"]})
    examples = captioned_table(table, name=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="not a file of this data set"):
        examples[0].source.read_bytes()


def test_a_name_that_is_nowhere_is_an_error_of_the_documented_kind(tmp_path):
    with pytest.raises((OSError, ValueError)):
        open_table(str(tmp_path / "nowhere"))
