"""Every way in which a file can be wrong: the error says the file, what was found, and what to do."""

import os
import shutil

import h5py
import numpy as np
import pytest

import squall.data
from squall.data import DataError, MissingFileError

from .conftest import trajectories


def refused(path, *parts, error=DataError):
    """Opening raises, and the message names the file and all of `parts`."""
    with pytest.raises(error) as caught:
        squall.data.open(path)
    message = str(caught.value)
    assert str(path) in message
    for part in parts:
        assert part in message, message


def edit(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


def test_missing_file_names_those_that_come_near(path):
    refused(path.with_name("wave.hdf5"), "no such file", "waves.hdf5", error=MissingFileError)
    refused(path.with_name("quite_different.h5"), "waves.hdf5", error=FileNotFoundError)
    refused(path.parent / "no" / "such" / "a.hdf5", f"{path.parent} is there", error=DataError)


def test_a_folder_without_data_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    refused(tmp_path, "a folder without data files", "train/", "found notes.txt")


@pytest.mark.parametrize("content", [b"", b"1.0, 2.0\n", b"PK\x03\x04" + bytes(1000)], ids=["empty", "csv", "npz"])
def test_other_files_are_not_hdf5(tmp_path, content):
    path = tmp_path / "other.hdf5"
    path.write_bytes(content)
    refused(path, "HDF5" if content else "empty", "again" if not content else "squall.data.write")


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.1])
def test_truncated_file(path, kept):
    os.truncate(path, int(kept * path.stat().st_size))
    refused(path, "truncated", "fetch it again")


@pytest.mark.parametrize("size", [9, 50, 100, 1000])
def test_file_cut_in_its_structure(path, size):
    os.truncate(path, size)
    refused(path, "again" if size > 9 else "")


def test_scrambled_structure_is_an_error_of_ours(path):
    """Damage anywhere in the structure is reported as such, or leaves a file that reads: never another error."""
    whole = path.read_bytes()
    damaged = path.with_name("damaged.hdf5")
    generator = np.random.default_rng(0)
    reported = read = 0
    for _ in range(150):
        content = bytearray(whole)
        start = int(generator.integers(0, 12_000))
        content[start : start + 64] = generator.bytes(64)
        damaged.write_bytes(content)
        try:
            squall.data.open(damaged).read()
        except DataError as error:
            reported += str(damaged) in str(error)
        else:
            read += 1
    assert reported + read == 150
    assert reported > 20


@pytest.mark.parametrize(
    "group", ["dimensions", "boundary_conditions", "scalars", "t0_fields", "t1_fields", "t2_fields"]
)
def test_missing_group_is_named(path, group):
    edit(path, lambda file: file.pop(group))
    refused(path, f"the group(s) {group} are missing", "squall.data.write")


def test_all_groups_missing(tmp_path):
    with h5py.File(tmp_path / "plain.hdf5", "w") as file:
        file["tensor"] = trajectories(3, 4, 5)
    refused(tmp_path / "plain.hdf5", "without x-coordinate and t-coordinate", "'tensor' has the shape", "axes=")


def test_hdf5_of_no_known_layout_says_what_was_looked_for(tmp_path):
    with h5py.File(tmp_path / "plain.hdf5", "w") as file:
        file["run/results"] = trajectories(3, 4, 5)
    refused(tmp_path / "plain.hdf5", "unknown layout; found run", "t0_fields", "PDEBench's tensor", "NetCDF")


def test_no_field(path):
    edit(path, lambda file: file["t0_fields"].attrs.update(field_names=np.array([], dtype=h5py.string_dtype())))
    refused(path, "no field that varies in time")


def test_only_constant_fields(path):
    for name in ("u", "v"):
        edit(path, lambda file, name=name: file[f"t0_fields/{name}"].attrs.update(time_varying=False))
    refused(path, "no field that varies in time", "constant ones: u, v")


def test_field_that_is_named_but_not_there(path):
    edit(path, lambda file: file["t0_fields"].pop("v"))
    refused(path, "'v' is named in t0_fields@field_names")


def test_axis_that_is_named_but_not_there(path):
    edit(path, lambda file: file["dimensions"].pop("x"))
    refused(path, "the axes x are missing")


def replace(file, key, values):
    attributes = dict(file[key].attrs)
    del file[key]
    file[key] = values
    file[key].attrs.update(attributes)


def test_one_time(path):
    edit(path, lambda file: replace(file, "dimensions/time", np.zeros(1, np.float32)))
    refused(path, "one time", "at least two")


def test_unequal_times(path):
    def change(file):
        replace(file, "dimensions/time", np.arange(12, dtype=np.float32) ** 2)
        del file["dimensions/time"].attrs["step"]

    edit(path, change)
    refused(path, "not equally spaced", "1 to 21 apart", "interpolate")


@pytest.mark.parametrize("times", [np.zeros(12), -np.arange(12.0), np.full(12, np.nan)], ids=["same", "back", "nan"])
def test_times_that_do_not_advance(path, times):
    def change(file):
        replace(file, "dimensions/time", times)
        del file["dimensions/time"].attrs["step"]

    edit(path, change)
    refused(path, "not equally spaced")


def test_times_that_contradict_the_step(path):
    edit(path, lambda file: replace(file, "dimensions/time", np.arange(12, dtype=np.float32)))
    refused(path, "do not fit the step 0.1", "dimensions/time@step")


def test_fields_of_different_shapes(path):
    edit(path, lambda file: replace(file, "t0_fields/v", trajectories(5, 12, 6)))
    refused(path, "'t0_fields/v' has the shape (5, 12, 6)", "should have (5, 12, 7)")


def test_fields_of_different_numbers_of_trajectories(path):
    edit(path, lambda file: replace(file, "t0_fields/v", trajectories(4, 12, 7)))
    refused(path, "'t0_fields/u' 5, 't0_fields/v' 4")


def test_field_of_whole_numbers(path):
    edit(path, lambda file: replace(file, "t0_fields/v", np.zeros((5, 12, 7), int)))
    refused(path, "'t0_fields/v' holds int64")


def spoil(path):
    """One NaN and two infinities, in two trajectories; the first by number is v of trajectory 1."""

    def change(file):
        file["t0_fields/v"][1, 4, 3] = np.inf
        file["t0_fields/v"][3, 8, 2] = np.nan
        file["t0_fields/u"][3, 9, 0] = -np.inf

    edit(path, change)


def test_check_says_where_and_how_many(path):
    spoil(path)
    source = squall.data.open(path)
    with pytest.raises(DataError) as caught:
        source.check()
    message = str(caught.value)
    assert "3 of 840 values are NaN or infinite" in message
    assert "trajectory 1, time index 4, field 'v', point (3,)" in message
    assert "(2): 1, 3." in message


def test_what_is_not_finite_is_found_where_it_is_read(path, states):
    spoil(path)
    source = squall.data.open(path)
    assert np.array_equal(source.read([0, 2, 4]), states[[0, 2, 4]])
    assert np.array_equal(source.read([1, 3], 5, 8), states[[1, 3], 5:8])
    with pytest.raises(DataError, match=r"trajectory 3, time index 8, field 'v', point \(2,\)"):
        source.read([0, 3], 6, 9)
    part = squall.data.subset(source, [4, 3])
    with pytest.raises(DataError, match="trajectory 3, time index 8"):  # the number in the file, not in the part
        part.read([1], 6, 9)
    with pytest.raises(DataError, match="trajectory 1, time index 4"):
        squall.data.load(source)


def test_file_that_changes_after_opening(path, states):
    source = squall.data.open(path)
    assert source.read().shape == states.shape
    source.close()
    shutil.copy(path, path.with_name("copy"))
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(DataError, match="changed since"):
        source.read()
    path.unlink()
    with pytest.raises(MissingFileError):
        source.read()


@pytest.mark.parametrize("name", ["data.hdf5", "array.npy", "archive.npz"])
def test_file_that_is_cut_while_it_is_read(tmp_path, name):
    path, states, options = tmp_path / name, np.ones((4, 300, 1, 8)), {"axes": "batch time channel x", "dt": 0.1}
    if name == "data.hdf5":
        path, options = squall.data.write(path, states, dt=0.1), {}
    elif name == "array.npy":
        np.save(path, states)
    else:
        np.savez(path, u=states)
    source = squall.data.open(path, **options)
    source.read([0])
    os.truncate(path, path.stat().st_size - 3000)
    with pytest.raises(DataError, match="truncated"):
        source.read()
