"""Writing atomically: the old file or the new one, whatever happens."""

import pytest

from diffadapt.common.atomic_files import write_atomically


def test_a_file_is_written_into_a_folder_that_did_not_exist(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    write_atomically(path, lambda temporary: temporary.write_text("whole", encoding="utf-8"))
    assert path.read_text(encoding="utf-8") == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_text_path_will_do(tmp_path):
    write_atomically(
        str(tmp_path / "file.txt"), lambda temporary: temporary.write_text("whole", encoding="utf-8")
    )
    assert (tmp_path / "file.txt").read_text(encoding="utf-8") == "whole"


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old", encoding="utf-8")

    def write(temporary):
        temporary.write_text("new", encoding="utf-8")
        assert path.read_text(encoding="utf-8") == "old"
        assert temporary.parent == path.parent  # or the rename would copy

    write_atomically(path, write)
    assert path.read_text(encoding="utf-8") == "new"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old", encoding="utf-8")

    def write(temporary):
        temporary.write_text("ne", encoding="utf-8")
        raise error

    with pytest.raises(type(error)):
        write_atomically(path, write)
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_before_writing_is_reported_as_itself(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "file.txt", lambda _: 1 / 0)
    assert list(tmp_path.iterdir()) == []
