"""Links in folders of data: followed within the data's root, elsewhere only when asked for."""

import pytest
from helpers.pipelines import write_pictures

from diffadapt.common.images import check_images, list_images


def names(paths, folder):
    return [path.relative_to(folder).as_posix() for path in paths]


@pytest.fixture
def hub_cache(tmp_path):
    """A data set as the hub's cache keeps it: a snapshot of links into the repository's blobs."""
    repository = tmp_path / "hub" / "datasets--somebody--dogs"
    blobs = write_pictures(repository / "blobs", 3)
    snapshot = repository / "snapshots" / ("0" * 40)
    (snapshot / "train").mkdir(parents=True)
    for index, blob in enumerate(sorted(blobs.iterdir())):
        blob = blob.rename(blob.with_name(f"{index:064x}"))
        (snapshot / "train" / f"{index}.png").symlink_to(f"../../../blobs/{blob.name}")
    return snapshot


def test_a_snapshot_of_the_hubs_cache_is_read(hub_cache):
    assert names(list_images(hub_cache, recursive=True), hub_cache) == [f"train/{i}.png" for i in range(3)]
    assert len(check_images(list_images(hub_cache / "train"))) == 3


def test_a_snapshot_may_not_link_out_of_its_repository(hub_cache, tmp_path):
    elsewhere = write_pictures(tmp_path / "elsewhere", 1) / "picture-0.png"
    (hub_cache / "train" / "x.png").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"--follow_links(.|\n)*x\.png"):
        list_images(hub_cache, recursive=True)


def test_links_to_files_and_folders_within_the_folder_are_followed(tmp_path):
    folder = write_pictures(tmp_path / "data" / "all", 2).parent
    (folder / "chosen").symlink_to(folder / "all")
    (folder / "one.png").symlink_to("all/picture-1.png")
    expected = [
        "all/picture-0.png",
        "all/picture-1.png",
        "chosen/picture-0.png",
        "chosen/picture-1.png",
        "one.png",
    ]
    assert names(list_images(folder, recursive=True), folder) == expected


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_links_out_of_the_folder_are_followed_only_when_asked_for(tmp_path, kind):
    elsewhere = write_pictures(tmp_path / "elsewhere", 2)
    folder = write_pictures(tmp_path / "data", 1)
    target = elsewhere if kind == "folder" else elsewhere / "picture-1.png"
    (folder / "link.png").symlink_to(target)
    with pytest.raises(ValueError, match=r"links out of .*data(.|\n)*--follow_links(.|\n)*link\.png"):
        list_images(folder, recursive=True)
    assert len(list_images(folder, recursive=True, follow_links=True)) == (3 if kind == "folder" else 2)


def test_a_link_to_a_folder_above_it_ends(tmp_path):
    folder = write_pictures(tmp_path / "data", 1)
    (folder / "again").symlink_to(folder)
    assert names(list_images(folder, recursive=True), folder) == ["picture-0.png"]


def test_a_link_to_nothing_is_named_when_it_is_read(tmp_path):
    folder = write_pictures(tmp_path / "data", 1)
    (folder / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError, match=r"1 of 2 .*cannot be read(.|\n)*gone\.png"):
        check_images(list_images(folder))


def test_a_link_to_itself_is_named_when_it_is_read(tmp_path):
    folder = write_pictures(tmp_path / "data", 1)
    (folder / "self.png").symlink_to("self.png")
    with pytest.raises(ValueError, match=r"1 of 2 .*cannot be read(.|\n)*self\.png"):
        check_images(list_images(folder))
