"""Cases that mutated files brought to light (`benchmarks/fuzz.py`)."""

import os

import numpy as np
import pytest

import squall.data
from squall.cli import main
from squall.data import DataError, endless
from squall.runs.config import ConfigError
from squall.study.definition import read_study


def test_a_header_of_an_array_that_is_no_python_is_an_error_of_the_file(tmp_path, capsys):
    path = tmp_path / "states.npy"
    np.save(path, np.zeros((4, 3, 1, 6)))
    path.write_bytes(path.read_bytes().replace(b"), }", b"(, }"))
    with pytest.raises(DataError, match=r"states\.npy: not read as NumPy arrays"):
        squall.data.open(path)
    assert main(["train", "--data.path", str(path), "--out", str(tmp_path / "run")]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_archive_of_a_later_zip_version_is_an_error_of_the_file(tmp_path):
    path = tmp_path / "states.npz"
    np.savez(path, np.zeros((4, 3, 1, 6)))
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02")
    content[at + 6] = 149  # the version that is needed to extract
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"states\.npz"):
        squall.data.open(path)


def test_an_empty_grid_of_a_study_has_no_axes(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("name: s\nvariants: {a: {}}\ngrids: {g: null}\n")
    with pytest.raises(ConfigError, match="the grid 'g' has no axes"):
        read_study(path)


def endless_heap(path):
    """A file whose heap of texts ends with free space of no size, over which HDF5 loops endlessly."""
    squall.data.write(path, np.zeros((4, 3, 1, 6)), dt=0.1)
    content = bytearray(path.read_bytes())
    at = content.index(b"GCOL") + 16
    while int.from_bytes(content[at : at + 2], "little"):
        at += 16 + -(-int.from_bytes(content[at + 8 : at + 16], "little") // 8) * 8
    content[at + 8 : at + 16] = bytes(8)
    path.write_bytes(content)
    return path


@pytest.mark.skipif(not hasattr(os, "fork"), reason="HDF5 reads the structure first in a forked process")
@pytest.mark.parametrize("folder", [False, True])
def test_a_file_in_which_hdf5_runs_in_a_circle_is_refused_by_name(tmp_path, monkeypatch, capsys, folder):
    monkeypatch.setattr(endless, "SECONDS", 0.2)
    squall.data.write(tmp_path / "a.hdf5", np.zeros((4, 3, 1, 6)), dt=0.1)
    (tmp_path / "c.hdf5").symlink_to(tmp_path / "gone")
    path = endless_heap(tmp_path / "b.hdf5")
    assert main(["data", "describe", str(tmp_path if folder else path)]) == 2
    assert f"squall: {path}: HDF5 loops endlessly" in capsys.readouterr().err.replace("\n", "")


def test_a_file_that_was_read_to_its_end_is_not_read_in_a_process_again(tmp_path, monkeypatch):
    path = squall.data.write(tmp_path / "a.hdf5", np.zeros((4, 3, 1, 6)), dt=0.1)
    assert main(["data", "describe", str(path)]) == 0
    monkeypatch.setattr(endless, "_in_a_process", lambda _: pytest.fail("it was read again"))
    assert main(["data", "describe", str(path)]) == 0
