"""Captions from .txt files and metadata, classes from folders; what is missing or outside is listed."""

import json
from importlib.util import find_spec

import pyarrow
import pytest
from helpers.pipelines import write_pictures
from PIL import Image
from pyarrow import parquet

from diffadapt.data.folders import read_captioned_folder, read_class_folders, read_instance_folder


def captions(folder, **columns):
    return {e.source.name: e.caption for e in read_captioned_folder(folder, **columns)}


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
    found = [e.caption for e in read_captioned_folder(tmp_path)]
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
    with pytest.raises(ValueError, match=r"2 of 3 images have no caption(.|\n)*picture-0(.|\n)*picture-2"):
        captions(tmp_path)


def test_columns_without_metadata_are_an_error(tmp_path):
    write_pictures(tmp_path, 1)
    with pytest.raises(ValueError, match="no columns to choose"):
        captions(tmp_path, caption_column="text")


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/secret.png", "C:\\data\\a.png", "link.png", "none.png"]
)
def test_names_that_lead_out_of_the_folder_or_nowhere_are_listed(tmp_path, name):
    folder, elsewhere = write_pictures(tmp_path / "data", 1), write_pictures(tmp_path / "elsewhere", 1)
    (elsewhere / "picture-0.png").rename(tmp_path / "secret.png")
    if name == "link.png":
        (folder / "links").mkdir()
        (folder / "links" / "link.dat").symlink_to(tmp_path / "secret.png")
        name = "links/link.dat"
    metadata(folder, [{"file_name": "picture-0.png", "text": "a"}, {"file_name": name, "text": "b"}])
    with pytest.raises(ValueError, match=r"line 2: .*(outside of the folder|there is no|absolute name)"):
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
    told = [example.caption for example in read_instance_folder(folder, "a sks dog")]
    assert told == ["a sks dog", "a sks dog on a beach", "a sks dog"]
    (folder / "metadata.csv").write_text("file_name,text\npicture-2.png,a sks dog asleep\n", encoding="utf-8")
    told = [example.caption for example in read_instance_folder(folder, "a sks dog")]
    assert told == ["a sks dog", "a sks dog", "a sks dog asleep"]


def test_class_folders_are_numbered_by_name_and_numbers_by_value(tmp_path):
    for name in ("10", "2", "1"):
        write_pictures(tmp_path / name, 2)
    examples, names = read_class_folders(tmp_path)
    assert names == ["1", "2", "10"]
    assert [(e.source.parent.name, e.caption) for e in examples[::2]] == [("1", 0), ("2", 1), ("10", 2)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no images in .*empty"):
        read_class_folders(tmp_path)
    with pytest.raises(ValueError, match="no class folders"):
        read_class_folders(tmp_path / "1")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "csv",
            "file_name,text\npicture-0.png,a red, shiny disc\n",
            "line 2 of .* has 3 fields for 2 columns",
        ),
        ("csv", 'file_name,text\npicture-0.png,"a red\npicture-1.png,"a blue"\n', "line 3 of .* is not CSV"),
        ("csv", "file_name,text,text\npicture-0.png,a,b\n", "has a column twice"),
        (
            "csv",
            "file_name,text\npicture-0.png,a\npicture-0.png,b\n",
            "lines 2 and 3 caption picture-0.png diff",
        ),
        ("jsonl", '{"file_name": "picture-0.png", "text": 3}', "line 1: the caption is '3' of type int"),
        (
            "jsonl",
            '{"file_name": "picture-0.png", "text": {"en": "a"}}',
            "line 1: the caption is .* of type dict",
        ),
        (
            "jsonl",
            '{"file_name": "picture-0.png", "text": "a", "text": "b"}',
            "line 1 .* a column occurs twice",
        ),
        ("jsonl", '{"file_name": "picture-0.png", "text": "\\ud83d"}', "line 1: .* half of a surrogate pair"),
        ("jsonl", '{"file_name": null, "text": "a"}', "line 1: no file name"),
        ("jsonl", '{"file_name": "Picture-0.PNG", "text": "a"}', "did you mean picture-0.png"),
        ("jsonl", '{"file_name": "picture-0.png\\u0000", "text": "a"}', "line 1: .* is not a file name"),
        ("jsonl", f'{{"file_name": "{"a" * 5000}", "text": "a"}}', "line 1: there is no aaa"),
        ("jsonl", '{"file_name": ".hidden/a.png", "text": "a"}', "line 1: .*hidden.* are not read"),
        ("csv", "picture-0.png,a disc\n", "has no rows; the first line of csv names the columns"),
        ("jsonl", "", "has no rows"),
    ],
)
def test_metadata_that_would_give_wrong_captions_is_refused_with_its_line(tmp_path, name, text, message):
    write_pictures(tmp_path, 2)
    write_pictures(tmp_path / ".hidden", 1)
    (tmp_path / ".hidden" / "picture-0.png").rename(tmp_path / ".hidden" / "a.png")
    (tmp_path / f"metadata.{name}").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        captions(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "caption"),
    [
        ("csv", 'file_name,text\npicture-0.png, "a red, shiny disc"\n', "a red, shiny disc"),
        ("csv", 'file_name,text\npicture-0.png,"a ""red""\ndisc"\n', 'a "red" disc'),
        ("csv", "file_name;text\npicture-0.png;a red, shiny disc\n", "a red, shiny disc"),
        ("csv", "file_name\ttext\npicture-0.png\ta disc\n", "a disc"),
        ("csv", "sep=;\nfile_name;text\npicture-0.png;a disc\n", "a disc"),
        ("csv", "\ufefffile_name,text\r\npicture-0.png,a disc\r\n", "a disc"),
        ("csv", "file_name,text\npicture-0.png,a disc\npicture-0.png,a disc\n", "a disc"),
        ("csv", "file_name,text\n.\\picture-0.png,a disc\n", "a disc"),
        ("csv", "file_name , text\npicture-0.png , a disc \n", "a disc"),
        ("CSV", "file_name,text\npicture-0.png,a disc\n", "a disc"),
        ("jsonl", '{"file_name": "picture-0.png", "text": [null, "a disc", "x"]}', "a disc"),
        ("jsonl", '{"file_name": "picture-0.png", "text": "red\u2028on\x85white"}', "red on white"),
    ],
)
def test_metadata_of_other_programs_is_read_right(tmp_path, name, text, caption):
    write_pictures(tmp_path, 1)
    (tmp_path / f"metadata.{name}").write_text(text, encoding="utf-8")
    assert captions(tmp_path) == {"picture-0.png": caption}


@pytest.mark.parametrize("cell", ["NaN", "null", '"nan"', '"None"', '""', '" "', "[]", "[null]"])
def test_what_programs_write_for_nothing_is_no_caption(tmp_path, cell):
    write_pictures(tmp_path, 1)
    line = f'{{"file_name": "picture-0.png", "text": {cell}}}'
    (tmp_path / "metadata.jsonl").write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=r"1 of 1 images have no caption(.|\n)*picture-0"):
        captions(tmp_path)
    assert [e.caption for e in read_instance_folder(tmp_path, "a sks dog")] == ["a sks dog"]


@pytest.mark.parametrize(
    ("encoding", "message"), [("latin-1", "line 2 of"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16")]
)
def test_text_in_other_encodings_is_refused_with_the_remedy(tmp_path, encoding, message):
    write_pictures(tmp_path, 1)
    (tmp_path / "picture-0.txt").write_bytes("a disc\non gr\xfcn".encode(encoding))
    with pytest.raises(ValueError, match=rf"{message}.*picture-0\.txt|picture-0\.txt.*{message}") as caught:
        captions(tmp_path)
    assert "save it as UTF-8" in str(caught.value)


def test_metadata_in_parquet_and_one_level_down(tmp_path):
    write_pictures(tmp_path / "train", 2)
    rows = {"file_name": ["picture-0.png", "picture-1.png"], "text": ["disc 0", "disc 1"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "train" / "metadata.parquet")
    assert captions(tmp_path) == {"picture-0.png": "disc 0", "picture-1.png": "disc 1"}


def test_names_in_both_forms_of_unicode_are_one(tmp_path):
    image = write_pictures(tmp_path, 1) / "picture-0.png"
    image.rename(tmp_path / "cafe\u0301.png")
    metadata(tmp_path, [{"file_name": "caf\u00e9.png", "text": "a disc"}])
    assert list(captions(tmp_path).values()) == ["a disc"]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "caf\u00e9.txt").write_text("a square", encoding="utf-8")
    assert list(captions(tmp_path).values()) == ["a square"]


def test_caption_files_have_either_ending_and_one_text(tmp_path):
    write_pictures(tmp_path, 2)
    (tmp_path / "picture-0.caption").write_text("a disc", encoding="utf-8")
    (tmp_path / "picture-1.TXT").write_text("a square", encoding="utf-8")
    assert captions(tmp_path) == {"picture-0.png": "a disc", "picture-1.png": "a square"}
    (tmp_path / "picture-0.txt").write_text("a circle", encoding="utf-8")
    with pytest.raises(ValueError, match="has two captions"):
        captions(tmp_path)


def test_what_is_not_used_is_told_in_one_line(tmp_path, capsys):
    write_pictures(tmp_path, 1)
    write_pictures(tmp_path / "beach", 1)
    for name in ("a.heic", "b.psd", "c.PSD", "picture-0.txt", "Thumbs.db", ".hidden"):
        (tmp_path / name).write_bytes(b"a disc")
    assert len(read_instance_folder(tmp_path, "a sks dog", with_captions=False)) == 1
    line = capsys.readouterr().out.strip()
    assert "2 .psd" in line
    assert "1 .txt (for captions of images give --instance_captions)" in line
    assert line.endswith("1 folder in it (beach)")
    assert "Thumbs" not in line
    assert "hidden" not in line
    if find_spec("pillow_heif") is None:
        assert "1 .heic (to read them: pip install pillow-heif)" in line
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a", "text": "b"}', encoding="utf-8")
    (tmp_path / "picture-0.png").rename(tmp_path / "images.zip")
    with pytest.raises(ValueError, match=r"no images in .*1 \.zip \(unpack it first\)"):
        read_instance_folder(tmp_path, "a sks dog")


@pytest.mark.parametrize("ending", ["jfif", "jpe", "JPG"])
def test_all_endings_of_jpeg_are_images(tmp_path, ending):
    Image.new("RGB", (8, 8)).save(tmp_path / f"a.{ending}", "jpeg")
    assert len(read_instance_folder(tmp_path, "a sks dog")) == 1


def test_kohya_s_folders_repeat_their_images(tmp_path, capsys):
    write_pictures(tmp_path / "3_sks dog", 2)
    write_pictures(tmp_path / "1_toy", 1)
    (tmp_path / "3_sks dog" / "picture-1.caption").write_text("a sks dog asleep", encoding="utf-8")
    told = [(e.source.parent.name, e.caption) for e in read_instance_folder(tmp_path, "a sks dog")]
    assert told.count(("3_sks dog", "a sks dog")) == told.count(("3_sks dog", "a sks dog asleep")) == 3
    assert told.count(("1_toy", "a sks dog")) == 1
    assert "'3_sks dog' 3 times" in capsys.readouterr().out
    write_pictures(tmp_path / "beach", 1)
    with pytest.raises(ValueError, match="no images in"):
        read_instance_folder(tmp_path, "a sks dog")


def test_columns_of_training_need_not_be_those_of_validation(tmp_path):
    write_pictures(tmp_path, 1)
    columns = {"image_column": "bild", "caption_column": "beschreibung"}
    for row in ({"bild": "picture-0.png", "beschreibung": "a"}, {"file_name": "picture-0.png", "text": "a"}):
        metadata(tmp_path, [row])
        assert captions(tmp_path, **columns, with_other_columns=True) == {"picture-0.png": "a"}
    (tmp_path / "metadata.jsonl").rename(tmp_path / "old")
    (tmp_path / "picture-0.txt").write_text("a", encoding="utf-8")
    assert captions(tmp_path, **columns, with_other_columns=True) == {"picture-0.png": "a"}


def test_a_snapshot_of_the_hub_s_cache_has_its_captions(tmp_path):
    """There every file is a link, and two equal images are links to one file."""
    blobs, snapshot = tmp_path / "data--a--b" / "blobs", tmp_path / "data--a--b" / "snapshots" / "c0ffee"
    write_pictures(blobs, 1)
    snapshot.mkdir(parents=True)
    rows = [{"file_name": name, "text": name} for name in ("a.png", "b.png")]
    (blobs / "m").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (snapshot / "metadata.jsonl").symlink_to("../../blobs/m")
    for name in ("a.png", "b.png"):
        (snapshot / name).symlink_to("../../blobs/picture-0.png")
    assert captions(snapshot) == {"a.png": "a.png", "b.png": "b.png"}


def test_links_out_of_the_data_are_followed_when_asked_for(tmp_path):
    elsewhere = write_pictures(tmp_path / "elsewhere", 1)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.png").symlink_to(elsewhere / "picture-0.png")
    metadata(folder, [{"file_name": "a.png", "text": "a disc"}])
    with pytest.raises(ValueError, match="--follow_links"):
        captions(folder)
    assert captions(folder, follow_links=True) == {"a.png": "a disc"}


@pytest.mark.parametrize("name", ["metadata.jsonl", "picture-0.txt"])
def test_a_link_out_of_the_data_is_no_source_of_captions(tmp_path, name):
    secret = tmp_path / "secret"
    text = '{"file_name": "picture-0.png", "text": "a disc"}' if name == "metadata.jsonl" else "a disc"
    secret.write_text(text, encoding="utf-8")
    folder = write_pictures(tmp_path / "data", 1)
    (folder / name).symlink_to(secret)
    for read in (read_captioned_folder, lambda folder: read_instance_folder(folder, "a sks dog")):
        with pytest.raises(ValueError, match=rf"{name} is a link out of .*--follow_links"):
            read(folder)
    assert captions(folder, follow_links=True) == {"picture-0.png": "a disc"}


def test_images_without_a_row_are_sent_to_the_metadata_above_them(tmp_path):
    write_pictures(tmp_path, 2)
    metadata(tmp_path, [{"file_name": "picture-0.png", "text": "a disc"}])
    (tmp_path / "picture-1.txt").write_text("a square", encoding="utf-8")
    with pytest.raises(ValueError, match=r"add them to .*metadata\.jsonl(.|\n)*picture-1"):
        captions(tmp_path)


@pytest.mark.parametrize("other", ["beside", "in a folder"])
def test_numbers_in_names_of_some_folders_repeat_nothing_and_that_is_told(tmp_path, capsys, other):
    write_pictures(tmp_path / "3_sks dog", 1)
    write_pictures(tmp_path if other == "beside" else tmp_path / "beach", 1)
    for image in tmp_path.rglob("*.png"):
        image.with_suffix(".txt").write_text("a disc", encoding="utf-8")
    assert len(read_captioned_folder(tmp_path)) == 2
    assert "nothing is repeated" in capsys.readouterr().out


def test_a_blank_prompt_is_refused_as_such(tmp_path):
    write_pictures(tmp_path, 1)
    with pytest.raises(ValueError, match="--instance_prompt is blank"):
        read_instance_folder(tmp_path, " ")


def test_hidden_files_of_macos_are_no_images_of_any_layout(tmp_path, capsys):
    write_pictures(tmp_path / "2_sks dog", 1)
    (tmp_path / "beach").mkdir()
    for place in (tmp_path, tmp_path / "2_sks dog", tmp_path / "beach"):
        (place / "._picture-0.png").write_bytes(b"written by macOS")
    assert len(read_instance_folder(tmp_path, "a sks dog")) == 2
    assert "not used" not in capsys.readouterr().out
