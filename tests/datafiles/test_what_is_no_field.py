"""What a file holds beside numbers is said, not taken for numbers; a file that contradicts itself is not believed."""

import io
import json
import warnings
import zipfile

import h5py
import numpy as np
import pytest
import torch

import squall.data
from squall.data import DataError

from .conftest import trajectories

STATES = trajectories(3, 4, 5, dtype=np.float32)


def test_text_and_functions_of_matlab_are_no_fields_and_said(tmp_path):
    path = tmp_path / "a.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        for name, values, kind in (
            ("w", STATES.T, "double"),
            ("name", np.ones((5, 4, 3), "u2"), "char"),
            ("f", np.ones((1, 3), "u4"), "function_handle"),
        ):
            file[name] = values
            file[name].attrs["MATLAB_class"] = np.bytes_(kind)
    source = squall.data.open(path, axes="x time batch", dt=1.0)
    assert source.fields == ("w",)
    assert source.shape == (3, 4, 1, 5)
    assert [note for note in source.notes if "left out" in note] == [
        "left out 'f': it holds object",
        "left out 'name': it holds object",
    ]


def test_what_is_no_plain_tensor_is_left_out_and_said(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"u": torch.from_numpy(STATES), "sparse": torch.eye(3).to_sparse(), "by": "me"}, path)
    source = squall.data.open(path, axes="batch time x", dt=1.0)
    assert source.fields == ("u",)
    assert {note for note in source.notes if "left out" in note} == {
        "left out 'sparse': it holds object",
        "left out 'by': it holds object",
    }


def test_numbers_wider_than_float32_are_read_as_float64(tmp_path):
    np.save(tmp_path / "a.npy", STATES.astype(np.longdouble))
    assert squall.data.open(tmp_path / "a.npy", axes="batch time x", dt=1.0).dtype == torch.float64


def test_an_archive_with_a_name_twice_is_refused(tmp_path):
    array = io.BytesIO()
    np.save(array, STATES)
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        warnings.simplefilter("ignore")
        for _ in range(2):
            archive.writestr("u.npy", array.getvalue())
    with pytest.raises(DataError, match=r"a\.npz.*'u\.npy' is twice in the archive"):
        squall.data.open(tmp_path / "a.npz", axes="batch time x", dt=1.0)


def store(path, **told):
    xarray = pytest.importorskip("xarray")
    axes = {"time": np.arange(4.0), "x": np.arange(5.0)}
    xarray.Dataset({"u": (("time", "x"), STATES[0])}, axes).to_zarr(path, zarr_format=3, **told)


def edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_the_arrays_of_a_store_are_believed_and_not_the_copy_of_what_they_say(tmp_path):
    store(tmp_path / "a.zarr", consolidated=True)
    edit(
        tmp_path / "a.zarr" / "zarr.json",
        lambda values: values["consolidated_metadata"]["metadata"]["u"].update(data_type="int32"),
    )
    states = squall.data.open(tmp_path / "a.zarr").read([0])
    torch.testing.assert_close(states[0, :, 0], torch.from_numpy(STATES[0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda u: u.update(storage_transformers=[{"name": "elsewhere"}]), "'u' is stored through a storage transf"),
        (lambda u: u["chunk_grid"]["configuration"].update(chunk_shape=[0, 5]), "'u' cannot be read and may be damag"),
    ],
)
def test_a_store_that_cannot_be_read_is_named_with_its_array(tmp_path, change, message):
    store(tmp_path / "a.zarr", consolidated=False)
    edit(tmp_path / "a.zarr" / "u" / "zarr.json", change)
    with pytest.raises(DataError, match=rf"a\.zarr: {message}"):
        squall.data.open(tmp_path / "a.zarr").read([0])


def test_a_link_that_leads_nowhere_is_said(tmp_path):
    (tmp_path / "a.nc").symlink_to(tmp_path / "gone.nc")
    with pytest.raises(DataError, match="a link that leads nowhere"):
        squall.data.open(tmp_path / "a.nc")
