"""Trajectories in memory and in a file answer alike; parts, splits and pairs are what indices say."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import squall.data
from squall.data import DataError, InMemory, Transitions

from .conftest import trajectories


@pytest.fixture(params=["memory", "file", "packed", "part of file", "part of part"])
def source(request, path, states):
    """The same five trajectories, in every way to have them."""
    if request.param == "memory":
        return InMemory(states, dt=0.1, fields=("u", "v"), lengths=7.0)
    if request.param == "packed":
        import h5py

        with h5py.File(path, "r+") as file:
            for name in ("u", "v"):
                attributes = dict(file["t0_fields"][name].attrs)
                values = file["t0_fields"].pop(name)[()]
                file["t0_fields"].create_dataset(name, data=values, chunks=(2, 5, 7), compression="gzip")
                file["t0_fields"][name].attrs.update(attributes)
    opened = squall.data.open(path)
    if request.param == "part of file":
        return squall.data.subset(opened, range(5))
    if request.param == "part of part":
        return squall.data.subset(squall.data.subset(opened, [4, 3, 2, 1, 0]), [4, 3, 2, 1, 0])
    return opened


def test_sources_answer_alike(source, states):
    assert source.shape == states.shape
    assert (source.trajectories, source.steps, source.channels, source.space) == (5, 11, 2, (7,))
    assert (source.fields, source.dt, source.spacing) == (("u", "v"), 0.1, (1.0,))
    assert source.dtype == torch.float64
    assert source.nbytes == states.nbytes
    assert np.array_equal(source.read(), states)
    assert np.array_equal(source.read([3, 3, 0], 2, 9), states[[3, 3, 0], 2:9])
    assert np.array_equal(source.read(torch.tensor([4])), states[[4]])
    assert source.read([]).shape == (0, *states.shape[1:])
    windows = source.windows(np.array([4, 0, 4]), [9, 0, 2], 3)
    assert np.array_equal(windows, np.stack([states[4, 9:12], states[0, 0:3], states[4, 2:5]]))
    assert "shape=(5, 12, 2, 7)" in repr(source)


def test_pieces_cover_the_whole_once(source, states):
    for limit in (1, 200, 1500, 10**9):
        seen = np.zeros(states.shape[:2], int)
        for chosen, start, stop in source.chunks(limit):
            seen[chosen.start : chosen.stop, start:stop] += 1
            assert len(chosen) * (stop - start) * 2 * 7 * 8 <= max(limit, 2 * 7 * 8)
        assert (seen == 1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([5], [0], 2), "trajectories: got 5; allowed are 0 ... 4"),
        (([-1], [0], 2), "trajectories: got -1"),
        (([0], [11], 2), "starts: got 11; allowed are 0 ... 10"),
        (([0], [-1], 2), "starts: got -1"),
        (([0, 1], [0], 2), "1 given for 2"),
        (([0], [0], 13), "a trajectory has 12 states"),
        (([0], [0], 0), "length: got 0"),
        ((torch.tensor([0.5]), [0], 2), "whole numbers"),
        ((torch.tensor([[0]]), [0], 2), "whole numbers"),
    ],
)
def test_what_lies_beyond_is_refused(source, arguments, message):
    with pytest.raises(IndexError, match=message):
        source.windows(*arguments)


def test_all_pairs_are_the_neighbours(source, states):
    transitions = Transitions(source)
    assert len(transitions) == 5 * 11
    assert transitions.dt == 0.1
    before, after = transitions.fetch(range(len(transitions)))
    assert np.array_equal(before, states[:, :-1].reshape(-1, 2, 7))
    assert np.array_equal(after, states[:, 1:].reshape(-1, 2, 7))
    one = transitions[13]
    assert np.array_equal(one[0], states[1, 2])
    assert np.array_equal(one[1], states[1, 3])
    with pytest.raises(IndexError, match=r"got 55; allowed are 0 \.\.\. 54"):
        transitions.fetch([0, 55])
    with pytest.raises(IndexError):
        transitions.fetch([-1])


@given(data=st.data(), batch=st.integers(1, 5), times=st.integers(2, 6))
def test_pair_number_says_trajectory_and_time(data, batch, times):
    clock = torch.arange(batch * times, dtype=torch.float32).reshape(batch, times, 1, 1)
    transitions = Transitions(InMemory(clock, dt=1.0))
    numbers = data.draw(st.lists(st.integers(0, len(transitions) - 1), max_size=20))
    before, after = transitions.fetch(numbers)
    assert torch.equal(after, before + 1)  # neighbours, never across trajectories: the next one starts after a gap
    assert (before.flatten() % times != times - 1).all()
    trajectory, time = transitions.locate(numbers)
    assert (trajectory * (times - 1) + time).tolist() == numbers
    assert torch.equal(before.flatten(), (trajectory * times + time).float())


@given(total=st.integers(2, 30), validation=st.integers(0, 40), test=st.integers(0, 40))
def test_split_takes_the_last_for_test(total, validation, test):
    source = InMemory(torch.arange(total * 2.0).reshape(total, 2, 1, 1), dt=1.0)
    if validation + test >= total:
        with pytest.raises(DataError, match=f"leave none of {total}"):
            squall.data.split(source, validation=validation, test=test)
        return
    parts = squall.data.split(source, validation=validation, test=test)
    assert [part.trajectories for part in parts] == [total - validation - test, validation, test]
    assert torch.equal(torch.cat([part.read() for part in parts]), source.read())
    assert parts.test.trajectories == len(parts.test.read())


@given(total=st.integers(4, 200), share=st.floats(0.001, 0.3))
def test_fraction_is_its_share_of_all(total, share):
    source = InMemory(torch.zeros(total, 2, 1, 1), dt=1.0)
    parts = squall.data.split(source, validation=share, test=share)
    assert abs(parts.test.trajectories - share * total) <= 1
    assert parts.validation.trajectories == parts.test.trajectories >= 1


@pytest.mark.parametrize("wrong", [-1, -0.5, 1.5, float("nan"), float("inf")])
def test_split_refuses_what_is_no_number_of_trajectories(wrong):
    with pytest.raises(DataError, match="test: got"):
        squall.data.split(InMemory(torch.zeros(4, 2, 1, 1), dt=1.0), test=wrong)


def test_subset_refuses_what_is_not_there(source):
    with pytest.raises(IndexError, match="indices: got 9"):
        squall.data.subset(source, [0, 9])


def test_small_data_are_loaded_and_large_stay(path, states):
    source = squall.data.open(path)
    part = squall.data.subset(source, [4, 1])
    loaded = squall.data.load(part, limit_bytes=part.nbytes)
    assert isinstance(loaded, InMemory)
    assert np.array_equal(loaded.read(), states[[4, 1]])
    assert loaded.description is source.description
    assert squall.data.load(part, limit_bytes=part.nbytes - 1) is part


def test_memory_is_shared_not_copied():
    states = torch.zeros(3, 4, 1, 5)
    source = InMemory(states, dt=1.0)
    states[1, 2] = 7.0
    assert (source.read([1], 2, 3) == 7).all()
    frozen = np.zeros((3, 4, 1, 5))
    frozen.flags.writeable = False
    assert InMemory(frozen, dt=1.0).read().sum() == 0


def test_states_in_memory_have_to_be_finite(states):
    states[3, 2, 1, 6] = np.nan
    with pytest.raises(DataError, match=r"trajectory 3, time index 2, field 'u1', point \(6,\)"):
        InMemory(states, dt=0.1)


def test_data_loader_workers_read_for_themselves(path, states):
    source = squall.data.open(path)
    source.read([0])  # open in this process, so that a worker inherits what is open
    transitions = Transitions(squall.data.subset(source, [3, 1]))
    batches = torch.utils.data.BatchSampler(range(len(transitions)), 4, drop_last=False)
    loader = torch.utils.data.DataLoader(
        transitions, sampler=batches, batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    before, after = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert np.array_equal(before, states[[3, 1], :-1].reshape(-1, 2, 7))
    assert np.array_equal(after, states[[3, 1], 1:].reshape(-1, 2, 7))
    assert np.array_equal(source.read([0]), states[[0]])


def test_closing_gives_the_descriptor_back(path):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no /proc")
    before = descriptors()
    with squall.data.open(path) as source:
        assert descriptors() == before
        source.read()
        source.read()
        assert descriptors() == before + 1
    assert descriptors() == before
    squall.data.open(path).read()
    assert descriptors() == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_larger_than_memory(tmp_path):
    """A process that may use less memory than the file holds writes it, fits to it, and trains from it.

    The bytes that the system read for 20 batches are those of the pairs, and not more.
    """
    code = """
        import resource, sys
        import torch
        import squall.data
        torch.set_num_threads(1)

        def status(file, key):
            return next(int(line.split()[1]) for line in open(f"/proc/self/{file}") if line.startswith(key))

        base = status("status", "VmSize:") * 1024
        limit = base + 130 * 2**20  # fragments of freed memory take up to 100
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        shape = (20, 512, 2, 32, 32)  # 160 MiB
        with squall.data.create(sys.argv[1], shape, dt=0.1) as file:
            for number in range(20):
                file.append(torch.full((1, *shape[1:]), float(number), dtype=torch.float64))
        source = squall.data.open(sys.argv[1])
        assert source.nbytes == 160 * 2**20
        train = squall.data.load(squall.data.split(source, test=2).train, limit_bytes=2**20)
        transitions = squall.data.Transitions(train)
        generator = torch.Generator().manual_seed(0)
        before = status("io", "rchar:")
        for _ in range(20):
            numbers = torch.randint(len(transitions), (50,), generator=generator)
            u, after = transitions.fetch(numbers)
            assert torch.equal(u[:, 0, 0, 0], transitions.locate(numbers)[0].double())
        read = status("io", "rchar:") - before
        wanted = 20 * 50 * 2 * 2 * 32 * 32 * 8
        assert wanted <= read < wanted + 20_000, (read, wanted)
        fit = squall.data.Normalization.fit(train)
        assert abs(fit.mean[0] - 8.5) < 1e-12
        source.check()
        try:
            torch.empty(160 * 2**20, dtype=torch.uint8)
        except RuntimeError:
            print("the whole does not fit")
        """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "large.hdf5")],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"},  # address space that nobody uses
    )
    assert result.returncode == 0, result.stderr
    assert "the whole does not fit" in result.stdout
    (tmp_path / "large.hdf5").unlink()


def test_opening_reads_the_structure_only(tmp_path):
    """The numbers of a large file are not touched: opening reads no more than that of a small one."""
    read = []
    if not sys.platform.startswith("linux"):
        pytest.skip("reads /proc")

    def characters():
        with open("/proc/self/io") as file:
            return int(file.readline().split()[1])

    for batch in (2, 2000):
        path = squall.data.write(tmp_path / f"{batch}.hdf5", trajectories(batch, 20, 1, 64), dt=0.1)
        before = characters()
        squall.data.open(path)
        read.append(characters() - before)
    assert read[1] < read[0] + 10_000
    assert read[1] < 100_000
