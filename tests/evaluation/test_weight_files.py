"""Weights of extractors: nothing is read before its hash agrees, nothing is fetched unasked."""

import dataclasses
import hashlib
import pickle

import pytest
import torch

from diffadapt.evaluation.features import hub_models, weight_files
from diffadapt.evaluation.features.extractors import (
    available,
    load_extractor,
    weights_by_extractor,
)


@pytest.fixture(autouse=True)
def no_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "caches", lambda: [tmp_path / "cache"])


def known(monkeypatch, name, data, url="file:///nowhere"):
    file = dataclasses.replace(
        weight_files.FILES[name], url=url, size=len(data), sha256=hashlib.sha256(data).hexdigest()
    )
    monkeypatch.setitem(weight_files.FILES, name, file)
    return file


def test_missing_weights_name_file_size_source_place_and_what_works_now(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_extractor("inception")
    for part in (
        "weights-inception-2015-12-05-6726825d.pth",
        "91.2 MiB",
        "https://github.com/toshas/torch-fidelity",
        str(tmp_path / "cache"),
        "--weights inception=PATH",
        "--download",
        "embedded:clip",
    ):
        assert part in str(caught.value)


def test_a_pickle_is_refused_by_its_hash_before_it_runs(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "weights.pth"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="is not the published weights-inception"):
        load_extractor("inception", weights={"inception": path})
    with pytest.raises(ValueError, match="holds no readable weights"):
        weight_files.read_state_dict(path)
    assert not (tmp_path / "ran").exists()


def test_download_shows_the_file_first_and_keeps_it_in_the_cache(tmp_path, monkeypatch, capsys):
    source = tmp_path / "source.pth"
    torch.save({"a": torch.ones(2)}, source)
    file = known(monkeypatch, "inception", source.read_bytes(), source.as_uri())
    path = weight_files.locate("inception", weights={}, download=True, available=[])
    assert path == tmp_path / "cache" / file.name
    assert path.read_bytes() == source.read_bytes()
    shown = capsys.readouterr().err
    assert file.url in shown
    assert file.sha256 in shown
    assert "MiB" in shown
    assert "inception" in available()


def test_a_download_that_hashes_wrong_leaves_nothing(tmp_path, monkeypatch):
    source = tmp_path / "source.pth"
    source.write_bytes(b"other bytes")
    known(monkeypatch, "inception", b"right bytes", source.as_uri())
    with pytest.raises(ValueError, match="is not the published"):
        weight_files.locate("inception", weights={}, download=True, available=[])
    assert list((tmp_path / "cache").iterdir()) == []
    known(monkeypatch, "inception", b"right bytes", (tmp_path / "nothing").as_uri())
    with pytest.raises(OSError, match="cannot download"):
        weight_files.locate("inception", weights={}, download=True, available=[])


def test_no_download_unless_asked(tmp_path, monkeypatch):
    source = tmp_path / "source.pth"
    torch.save({}, source)
    known(monkeypatch, "vgg16", source.read_bytes(), source.as_uri())
    with pytest.raises(FileNotFoundError, match="allow --download"):
        weight_files.locate("vgg16", weights={}, download=False, available=[])
    assert not (tmp_path / "cache").exists()


def test_weights_option(tmp_path):
    (tmp_path / "w.pth").touch()
    assert weight_files.parse_weights([f"vgg16={tmp_path / 'w.pth'}"]) == {"vgg16": tmp_path / "w.pth"}
    with pytest.raises(ValueError, match="EXTRACTOR=PATH"):
        weight_files.parse_weights(["w.pth"])
    with pytest.raises(FileNotFoundError, match="nothing at"):
        weight_files.parse_weights(["vgg16=/nowhere/w.pth"])


def test_a_hub_model_that_is_not_here_says_so():
    with pytest.raises(FileNotFoundError) as caught:
        load_extractor("dino")
    for part in ("facebook/dino-vits16", "huggingface.co", "--weights", "--download", "embedded:clip"):
        assert part in str(caught.value)


def test_a_damaged_blob_of_the_hub_is_refused(tmp_path):
    data = b"weights"
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name, content in (("good", data), ("bad", b"others")):
        folder = tmp_path / name
        folder.mkdir()
        blob = blobs / hashlib.sha256(data if name == "good" else b"these").hexdigest()
        blob.write_bytes(content)
        (folder / "model.safetensors").symlink_to(blob)
    hub_models.check_blob(tmp_path / "good" / "model.safetensors")
    with pytest.raises(ValueError, match="is damaged"):
        hub_models.check_blob(tmp_path / "bad" / "model.safetensors")


def test_a_download_from_the_hub_shows_sizes_and_hashes_first(tmp_path, monkeypatch, capsys):
    class Lfs:
        sha256 = "f" * 64

    class File:
        rfilename, size, lfs = "model.safetensors", 3 * 2**20, Lfs

    class Api:
        def model_info(self, name, *, files_metadata):
            return type("Info", (), {"siblings": [File]})

    def snapshot(name, *, allow_patterns, local_files_only=False):
        if local_files_only:
            raise FileNotFoundError(name)
        shown = capsys.readouterr().err
        assert "3.0 MiB, sha256 ffff" in shown
        assert "*.bin" not in allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(hub_models, "HfApi", Api)
    monkeypatch.setattr(hub_models, "snapshot_download", snapshot)
    options = {"weights": {}, "extractor": "dino:a/b", "available": []}
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert hub_models.model_folder("a/b", download=True, **options) == tmp_path
    with pytest.raises(FileNotFoundError):
        hub_models.model_folder("a/b", download=False, **options)


def test_weights_are_given_by_the_names_of_extractors(tmp_path):
    file = tmp_path / "file.pth"
    file.write_bytes(b"")
    found = weights_by_extractor([f"dino={tmp_path}", f"clip:a/b={tmp_path}", f"inception={file}"])
    assert found == {"dino:facebook/dino-vits16": tmp_path, "clip:a/b": tmp_path, "inception": file}


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("inceptionv3={here}", "did you mean inception"),
        ("Dino={here}", "did you mean dino"),
        ("embedded:clip={here}", "takes no weights"),
        ("dino={here}/nowhere", "there is nothing at"),
    ],
)
def test_weights_of_an_unknown_extractor_are_refused_with_the_nearest(tmp_path, pair, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        weights_by_extractor([pair.format(here=tmp_path)])


def test_weights_named_twice_are_refused(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        weights_by_extractor([f"dino={tmp_path}", f"dino={tmp_path}"])


def test_a_folder_with_pickled_weights_alone_says_what_to_do(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError) as caught:
        hub_models.model_folder(str(tmp_path), weights={}, extractor="clip:x", download=False, available=[])
    for words in ("only pytorch_model.bin", "may run code", "save_pretrained", "--weights"):
        assert words in str(caught.value)
