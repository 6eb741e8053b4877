"""Captions from .txt files and metadata, classes from folders; what is missing or outside is listed."""

import json

import pytest
from pipelines import write_pictures

from diffadapt.data.sources import captioned_folder, class_folders, instance_folder


def captions(folder, **columns):
    return {e.source.name: e.caption for e in captioned_folder(folder, **columns)}


def metadata(folder, rows, *, kind="jsonl"):
    if kind == "jsonl":
        text = "\n".join(json.dumps(row) for row in rows)
    else:
        text = "\n".join([",".join(rows[0]), *(",".join(f'"{v}"' for v in row.values()) for row in rows)])
    (folder / f"metadata.{kind}").write_text(text + "\n", encoding="utf-8")


def test_captions_stand_in_text_files_beside_pictures_also_in_folders_within(tmp_path):
    write_pictures(tmp_path, 1)
    write_pictures(tmp_path / "more", 1)
    write_pictures(tmp_path / ".thumbnails", 1)  # hidden: left alone
    (tmp_path / "picture-0.txt").write_text("a red disc,\n  on white\n", encoding="utf-8")
    (tmp_path / "more" / "picture-0.txt").write_text("\ufeffein grüner Kreis", encoding="utf-8")
    found = [e.caption for e in captioned_folder(tmp_path)]
    assert sorted(found) == ["a red disc, on white", "ein grüner Kreis"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_captions_stand_in_metadata(tmp_path, kind):
    write_pictures(tmp_path / "in", 2)
    rows = [{"file_name": f"in/picture-{i}.png", "text": f"disc, {i}", "other": "x"} for i in (1, 0)]
    metadata(tmp_path, rows, kind=kind)
    assert captions(tmp_path) == {"picture-0.png": "disc, 0", "picture-1.png": "disc, 1"}
    assert captions(tmp_path, caption_column="other") == {"picture-0.png": "x", "picture-1.png": "x"}


def test_the_column_of_files_can_have_another_name(tmp_path):
    write_pictures(tmp_path, 1)
    metadata(tmp_path, [{"path": "./picture-0.png", "caption": "a disc"}])
    assert captions(tmp_path, image_column="path") == {"picture-0.png": "a disc"}


@pytest.mark.parametrize("option", [{"caption_column": "words"}, {"image_column": "words"}])
def test_a_wrong_column_lists_those_there_are(tmp_path, option):
    write_pictures(tmp_path, 1)
    metadata(tmp_path, [{"file_name": "picture-0.png", "text": "a disc"}])
    with pytest.raises(ValueError, match=r"no column 'words'.*file_name, text"):
        captions(tmp_path, **option)


def test_pictures_without_caption_are_all_listed(tmp_path):
    write_pictures(tmp_path, 3)
    (tmp_path / "picture-1.txt").write_text("a disc", encoding="utf-8")
    (tmp_path / "picture-2.txt").write_text("  \n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"2 of 3 pictures have no caption(.|\n)*picture-0(.|\n)*picture-2"):
        captions(tmp_path)


def test_columns_without_metadata_are_an_error(tmp_path):
    write_pictures(tmp_path, 1)
    with pytest.raises(ValueError, match="no columns to choose"):
        captions(tmp_path, caption_column="text")


@pytest.mark.parametrize("name", ["../secret.png", "/etc/secret.png", "link.png", "none.png"])
def test_names_that_lead_out_of_the_folder_or_nowhere_are_listed(tmp_path, name):
    folder, elsewhere = write_pictures(tmp_path / "data", 1), write_pictures(tmp_path / "elsewhere", 1)
    (elsewhere / "picture-0.png").rename(tmp_path / "secret.png")
    if name == "link.png":
        (folder / "links").mkdir()
        (folder / "links" / "link.dat").symlink_to(tmp_path / "secret.png")
        name = "links/link.dat"
    metadata(folder, [{"file_name": "picture-0.png", "text": "a"}, {"file_name": name, "text": "b"}])
    with pytest.raises(ValueError, match=r"line 2: .*(outside of the folder|there is no)"):
        captions(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{broken", "line 1 of .* is not JSON"), ("[1]", "not of the form"), ("\xff", "is not UTF-8 text")],
)
def test_damaged_metadata_names_file_and_line(tmp_path, text, message):
    write_pictures(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        captions(tmp_path)


def test_pictures_of_a_subject_may_have_captions_of_their_own(tmp_path):
    folder = write_pictures(tmp_path, 3)
    (folder / "picture-1.txt").write_text("a sks dog\non a beach", encoding="utf-8")
    told = [example.caption for example in instance_folder(folder, "a sks dog")]
    assert told == ["a sks dog", "a sks dog on a beach", "a sks dog"]
    (folder / "metadata.csv").write_text("file_name,text\npicture-2.png,a sks dog asleep\n", encoding="utf-8")
    told = [example.caption for example in instance_folder(folder, "a sks dog")]
    assert told == ["a sks dog", "a sks dog", "a sks dog asleep"]


def test_class_folders_are_numbered_by_name_and_numbers_by_value(tmp_path):
    for name in ("10", "2", "1"):
        write_pictures(tmp_path / name, 2)
    examples, names = class_folders(tmp_path)
    assert names == ["1", "2", "10"]
    assert [(e.source.parent.name, e.caption) for e in examples[::2]] == [("1", 0), ("2", 1), ("10", 2)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no pictures in .*empty"):
        class_folders(tmp_path)
    with pytest.raises(ValueError, match="no class folders"):
        class_folders(tmp_path / "1")
