"""Files of statistics as ADM and pytorch-fid write them."""

import numpy as np
import pytest
from helpers.feature_sets import gaussian_sets

from diffadapt.metrics import Statistics, fid, read_statistics


def _write(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_imported_statistics_give_the_same_distance(tmp_path):
    real, generated = gaussian_sets()
    known = Statistics.of(real)
    path = _write(tmp_path / "reference.npz", mu=known.mean.numpy(), sigma=known.covariance.numpy())
    imported = read_statistics(path)
    assert fid(real=imported, generated=generated) == pytest.approx(
        fid(real=real, generated=generated), rel=1e-12
    )
    assert "not known" in imported.note


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "no sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, "do not fit"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "NaN"),
        ({"mu": np.zeros(2), "sigma": np.array([[1.0, 2.0], [0.0, 1.0]])}, "not symmetric"),
        ({"mu": np.array([{"run": "code"}]), "sigma": np.eye(1)}, "no npz of statistics"),
    ],
)
def test_files_that_are_no_statistics_are_refused(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        read_statistics(_write(tmp_path / "reference.npz", **arrays))


def test_another_file_is_refused(tmp_path):
    (tmp_path / "reference.npz").write_bytes(b"PK\x03\x04 not a whole zip")
    with pytest.raises(ValueError, match="no npz of statistics"):
        read_statistics(tmp_path / "reference.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match="no npz of statistics"):
        read_statistics(tmp_path / "array.npy")
