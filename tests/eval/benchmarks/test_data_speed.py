"""The benchmark of reading images: it reads what it says, and copies are cheaper than files."""

import data_speed


def test_a_later_epoch_is_cheaper_than_decoding_files(tmp_path):
    paths = data_speed.write_photos(tmp_path, (1600, 1200), 2)
    figures = data_speed.measure(paths, 64)
    assert list(figures) == ["all of the file", "first epoch", "later epochs", "without copies"]
    assert figures["later epochs"] < figures["first epoch"] < figures["all of the file"]
