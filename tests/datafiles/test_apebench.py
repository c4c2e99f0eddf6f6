"""APEBench's data, networks and scores, against the package itself on a tiny scenario."""

import hashlib
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import squall.data
from squall.cli import main
from squall.data.apebench import load_scenario, write_scenario

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "apebench_rollouts.py"
TINY = {"num_points": 32, "num_train_samples": 3, "train_temporal_horizon": 4, "num_test_samples": 2}
TINY |= {"test_temporal_horizon": 5}


@pytest.fixture(scope="module")
def apebench():
    """Skips without the package."""
    pytest.importorskip("jax", reason="pip install 'squall[apebench]'")
    return pytest.importorskip("apebench", reason="pip install 'squall[apebench]'")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("apebench_rollouts", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_file_holds_the_trajectories_of_the_package(apebench, tmp_path):
    file = squall.data.open(write_scenario("diff_burgers", "train", tmp_path / "data.hdf5", **TINY))
    expected = np.asarray(load_scenario("diff_burgers", **TINY).get_train_data())
    assert file.shape == (3, 5, 1, 32)
    assert np.array_equal(file.read().numpy(), expected)
    assert file.provenance["sha256"] == hashlib.sha256(expected.tobytes()).hexdigest()
    assert file.provenance["apebench"] == "0.1.1"


def test_a_file_that_is_there_is_kept_if_it_holds_the_same_and_never_overwritten(apebench, tmp_path):
    path = write_scenario("diff_burgers", "test", tmp_path / "data.hdf5", **TINY)
    before = path.read_bytes()
    assert write_scenario("diff_burgers", "test", path, **TINY) == path
    with pytest.raises(FileExistsError, match="its scenario is diff_burgers, not diff_kdv"):
        write_scenario("diff_kdv", "test", path, **TINY)
    with pytest.raises(FileExistsError, match="its part is test, not train"):
        write_scenario("diff_burgers", "train", path, **TINY)
    assert path.read_bytes() == before
    file = squall.data.open(path)
    other = tmp_path / "other.hdf5"
    squall.data.write(other, file.read() + 1, dt=1.0, provenance=dict(file.provenance))
    with pytest.raises(FileExistsError, match="its states differ from its checksum"):
        write_scenario("diff_burgers", "test", other, **TINY)
    foreign = squall.data.write(tmp_path / "foreign.hdf5", np.zeros((1, 2, 1, 8)), dt=1.0)
    with pytest.raises(FileExistsError, match="its apebench is not known"):
        write_scenario("diff_burgers", "test", foreign, **TINY)


def test_a_mistake_is_answered_with_what_is_allowed(apebench, tmp_path, capsys):
    with pytest.raises(squall.data.DataError, match="did you mean 'diff_kdv'"):
        load_scenario("diff_kvd")
    with pytest.raises(squall.data.DataError, match="num_point"):
        load_scenario("diff_kdv", num_point=3)
    with pytest.raises(squall.data.DataError, match="part is 'valid', but must be one of train, test"):
        write_scenario("diff_kdv", "valid", tmp_path / "data.hdf5")
    for words, answer in ((["diff_kvd"], "did you mean 'diff_kdv'"), (["diff_kdv", "--part", "all"], "train, test")):
        assert main(["simulate", "apebench", "--out", str(tmp_path / "data.hdf5"), "--scenario", *words]) == 2
        assert answer in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_without_the_package_the_command_names_the_one_that_installs_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apebench", None)
    monkeypatch.setitem(sys.modules, "apebench.scenarios", None)
    assert main(["simulate", "apebench", "--scenario", "diff_kdv", "--out", str(tmp_path / "data.hdf5")]) == 2
    assert "apebench is not installed; run: pip install 'squall[apebench]'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("config", "weights"),
    [("Conv;34;10;relu", 31757), ("Res;26;8;relu", 32943), ("UNet;12;2;relu", 27193), ("FNO;12;18;4;gelu", 32527)],
)
def test_the_networks_of_the_benchmark_have_the_weights_of_the_package(benchmark, config, weights):
    torch.manual_seed(0)
    network = benchmark.network(config)
    assert sum(x.numel() for x in network.parameters()) == weights
    assert network(torch.zeros(2, 1, 160)).shape == (2, 1, 160)


@pytest.mark.parametrize("config", ["Conv;5;3;relu", "Res;4;2;relu", "UNet;4;2;relu", "FNO;5;4;2;gelu"])
def test_the_networks_of_the_benchmark_compute_what_those_of_the_package_do(apebench, benchmark, config):
    """Given the same weights; and their first weights have the same spread."""
    import equinox as eqx
    import jax

    torch.manual_seed(0)
    network = benchmark.network(config)
    theirs = load_scenario("diff_burgers", **TINY).get_network(config, jax.random.PRNGKey(0))
    ours = dict(network.named_parameters())
    leaves, tree = jax.tree_util.tree_flatten_with_path(eqx.filter(theirs, eqx.is_array))
    assert len(leaves) == len(ours)
    values = []
    for place, leaf in leaves:
        x = ours[our_name(jax.tree_util.keystr(place))].detach().numpy()
        assert x.size == leaf.size
        if x.size > 20:
            assert 0.5 < x.std() / np.asarray(leaf).std() < 2, place
        values.append(x.reshape(leaf.shape))
    theirs = eqx.combine(jax.tree_util.tree_unflatten(tree, values), theirs)
    u = torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(0))
    expected = np.asarray(jax.jit(jax.vmap(theirs))(u.numpy()))
    np.testing.assert_allclose(network(u).detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def our_name(theirs: str) -> str:
    """`.left_arc_blocks[0][0].conv_1.weight` is `left.0.first.weight`."""
    name = re.sub(r"arc_blocks\[(\d)\]\[0\]", r"arc.\1", theirs).replace("_sampling_blocks", "")
    for old, new in {
        "left_arc": "left",
        "right_arc": "right",
        "conv_1": "first",
        "conv_2": "second",
        "by_pass_conv": "bypass",
        "spectral_conv.weights_real": "real",
        "spectral_conv.weights_imag": "imaginary",
    }.items():
        name = name.replace(old, new)
    return name.replace("[", ".").replace("]", "").strip(".")


def test_a_tiny_run_is_scored_by_the_package_and_not_repeated(apebench, benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "write_scenario", lambda *words: write_scenario(*words, **TINY))
    monkeypatch.setattr(benchmark, "load_scenario", lambda name: load_scenario(name, **TINY))
    words = f"x --data {tmp_path} --out {tmp_path}/out.csv --steps 2 --seeds 0 --scenarios diff_burgers --losses MSE"
    monkeypatch.setattr(sys, "argv", words.split())
    benchmark.main()
    (row,) = benchmark.read(tmp_path / "out.csv")
    test = squall.data.open(tmp_path / "diff_burgers-test.hdf5").read()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        untrained = benchmark.network("Conv;34;10;relu")
    with torch.no_grad():
        first = (untrained(test[:, 0]) - test[:, 1]).norm(dim=(1, 2)) / test[:, 1].norm(dim=(1, 2))
    assert float(row["nrmse_1"]) == pytest.approx(first.mean().item(), rel=0.2)  # two steps of warm-up change little
    benchmark.main()
    assert benchmark.read(tmp_path / "out.csv") == [row]
    assert "| diff_burgers | Conv;34;10;relu | 2 | MSE | 1 |" in benchmark.table([row])


def test_minibatches_go_through_all_transitions_once_an_epoch(benchmark):
    sampler = benchmark.Epochs(population=50, batch=20, seed=0)
    drawn = [sampler(step).tolist() for step in range(6)]
    assert [len(batch) for batch in drawn] == [20, 20, 10, 20, 20, 10]
    for epoch in (drawn[:3], drawn[3:]):
        assert sorted(number for batch in epoch for number in batch) == [*range(50)]
    assert drawn[:3] != drawn[3:]
