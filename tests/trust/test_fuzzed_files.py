"""Cases that mutated files brought to light (`benchmarks/fuzz.py`)."""

import numpy as np
import pytest

import squall.data
from squall.cli import main
from squall.data import DataError
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
