"""A study: its grids, its folder, what a kill leaves, and what the report says of it."""

import dataclasses
import functools
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from in_process import run_here
from problems import Stops
from rich.console import Console
from scipy import stats

from squall._process.progress import reporting
from squall.cli import main
from squall.report import write_report
from squall.report.curves import training_figure
from squall.report.tables import number
from squall.runs.config import ConfigError, to_dict
from squall.runs.evaluate import evaluate_runs
from squall.runs.folder import RunFolder, RunFolderError
from squall.runs.train import run, run_together
from squall.study.definition import PRESETS, read_study
from squall.study.folder import StudyFolder
from squall.study.outcome import Outcome
from squall.study.results import Row, pack_study, published, read_results
from squall.study.runner import part_of, run_study
from squall.study.statistics import (
    Ratio,
    compare_paired,
    corrected,
    critical_difference,
    least_median,
    mean_ranks,
    paired_ratio,
    summarize,
)

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = {
    "name": "tiny",
    "seeds": 2,
    "baseline": "original",
    "base": {
        "data": {"validation": 1, "test": 2},
        "model": {"hidden": 3},
        "training": {"steps": 60, "batch": 8, "log_every": 10, "validate_every": 20, "checkpoint_every": 5},
        "device": {"accelerator": "cpu"},
    },
    "variants": {
        "CH": {"system": {"name": "cahn-hilliard", "trajectories": 6, "steps": 10}, "model.name": "hnn"},
        "original": {"loss.name": "mse"},
        "sharp": {"loss": {"temperature": 0.1}},
        "mean": {"loss.name": "mse"},
    },
    "evaluations": {"RK4 of dt/2": {"integrator": "rk4", "substeps": 2}},
    "grids": {
        "all": {
            "axes": [["CH"], ["original", "sharp"]],
            "show": ["table", "ratios", "fields", "training", "temperature", "integrators"],
        },
        "again": {"axes": [["CH"], ["mean"]], "seeds": 1},
    },
}


THEIRS = {"table": "imbalance_aware_learning.table_1"}


def grid_with(**keys) -> dict:
    return {"a": {"axes": [["CH"], ["original"]], **keys}}


preset = functools.cache(read_study)


def written(tmp_path: Path, values: dict) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def changed(**changes) -> dict:
    return json.loads(json.dumps(TINY)) | changes


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished study; a test may write its report or let it grow, and leaves its runs as they are."""
    folder = tmp_path_factory.mktemp("study")
    run_here(read_study(written(folder, TINY)), folder / "out")
    return folder / "out"


# Grids


def test_trials_of_one_configuration_are_one_run(tmp_path):
    study = read_study(written(tmp_path, TINY))
    assert len(study.trials) == 4  # 'mean' is 'original' by another name
    shared = study.grids["again"].trials[("CH", "mean"), 0]
    assert shared == study.grids["all"].trials[("CH", "original"), 0]


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_are_studies(name):
    study = preset(name)
    assert study.name == name
    assert len({trial.name for trial in study.trials}) == len(study.trials)


def test_the_paper_presets_ask_for_the_papers_protocol():
    for name, hidden, seeds in [("paper", 200, 15), ("paper-small", 64, 3)]:
        table = preset(name).grids["table-1"]
        assert {trial.config.model.hidden for trial in table.trials.values()} == {hidden}
        assert {trial.config.training.steps for trial in table.trials.values()} == {10_000}
        assert {trial.seed for trial in table.trials.values()} == set(range(seeds))
        assert {(labels[0], trial.config.model.name) for (labels, _), trial in table.trials.items()} == {
            ("CH", "hnn"),
            ("KdV", "node"),
        }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": 3}, "'sedes' is not a known key: did you mean 'seeds'"),
        ({"seeds": 0}, "'seeds' is 0, but must be how many seeds, at least 1"),
        ({"grids": {}}, "'grids' is missing"),
        ({"grids": {"a": {"axes": [["CH"], ["orignal"]]}}}, "'orignal' is not a known variant.*'original'"),
        ({"grids": {"a": {"axes": []}}}, "the grid 'a' has no axes"),
        ({"grids": {"a": {"axis": [["CH"]]}}}, "'axis' is not a known key of the grid 'a': did you mean 'axes'"),
        ({"grids": {"a": {"axes": [["original"]]}}}, "names no system"),
        ({"base": {"data": {"path": "a.hdf5"}}}, "names both a system and a file"),
        ({"grids": {"a": {"axes": [["CH"]], "show": ["tabel"]}}}, "did you mean 'table'"),
        ({"grids": grid_with(choose=["original"])}, "'choose' of the grid 'a' is .*at least two names"),
        (
            {"base": {"data": {"validation": 0}}, "grids": {"a": {"axes": [["CH"]], "choose": ["mean", "sharp"]}}},
            "the grid 'a' chooses on validation data, but '.*' has none",
        ),
        ({"variants": TINY["variants"] | {"CH": "cahn-hilliard"}}, "the variant 'CH' is 'cahn-hilliard'"),
        ({"grids": ["all"]}, "grids is .*, but must hold names and values"),
        ({"grids": {"a": {"axes": 3}}}, "the grid 'a' has no axes"),
        ({"base": {"model": "hnn", "model.hidden": 3}}, "'model' is 'hnn', but 'model.hidden' asks for a part of it"),
        ({"variants": TINY["variants"] | {"CH": {"system": {"name": "cahn-hilliard", "gama": 1}}}}, "made.*gama"),
        ({"variants": TINY["variants"] | {"CH": {"system": {"name": "cahn-hilliard", "steps": "8"}}}}, "is '8'"),
        ({"grids": grid_with(published={"tabel": "x"})}, "'tabel' is not a known key of 'published' of the grid 'a'"),
        ({"grids": grid_with(published={"table": "table_1"})}, "'table_1' is not a known table"),
        ({"grids": grid_with(published={**THEIRS, "rows": {"original": "orig"}})}, "did you mean 'original'"),
        ({"grids": grid_with(published={**THEIRS, "columns": {"CH": "heat"}})}, "'heat_states' is not a known column"),
        ({"grids": grid_with(published={**THEIRS, "rows": {"sharp": "original"}})}, "'sharp' is not a known label"),
        ({"evaluations": {"stable": {"integrator": "rk5"}}}, "'rk5' is not a known integrator.*did you mean 'rk4'"),
        ({"evaluations": {"stable": {"integrator": "rk4", "substeps": 0}}}, "'substeps' of the evaluation 'stable'"),
        ({"evaluations": {"stable": {"substeps": 2}}}, "'None' is not a known integrator"),
        ({"grids": grid_with(show="table")}, "'show' of the grid 'a' is 'table', but must be a list of table"),
        ({"grids": grid_with(show=None)}, "'show' of the grid 'a' is None"),
        ({"baseline": ["original"]}, "is not a known variant in 'baseline'"),
        ({"keep_weights": "no"}, "'keep_weights' is 'no', but must be true or false"),
        ({"base": {3: "x"}}, "Option '3' is not accepted: known are"),
        ({"variants": TINY["variants"] | {"CH": {"system": {"name": ["x"]}}}}, r"the system '\['x'\]' is unknown"),
        ({"base": {"device.devices": 2}}, "device.devices is 2, but a study trains each run in one process"),
        ({"base": {"integrator": "rk5"}}, "integrator is 'rk5', but must be one of"),
        ({"base": {"model.name": "hnnn"}, "variants": TINY["variants"] | {"CH": {"system": "cahn-hilliard"}}},
         "'hnnn' is not a known model, nor the import path of one.*'hnn'"),
        ({"base": {"data.test": 0}}, "has data.test = 0: there would be nothing to evaluate on"),
        ({"base": {"model": {"name": "my.Model", "predicts": "state"}},
          "variants": TINY["variants"] | {"CH": {"system": "cahn-hilliard"}}}, "no integrator applies to"),
        ({"baseline": "orig"}, "did you mean 'original'"),
        ({"costs": {"orig": 1.1}}, "'orig' is not a known variant in 'costs'"),
        ({"costs": {"sharp": 0}}, "the cost of 'sharp' is 0, but must be a positive number"),
        ({"variants": TINY["variants"] | {"original": {"loss": {"name": "focall"}}}}, "did you mean 'focal'"),
        ({"variants": TINY["variants"] | {"original": {"loss": {"name": "top_k", "options": {"k": 3}}}}},
         "loss.options has 'k', which 'top_k' does not know: known are alpha"),
        ({"base": {"training.stps": 3}}, "did you mean 'training.steps'"),
        ({"variants": TINY["variants"] | {"CH": {"system": "heat"}}}, "the system 'heat' is unknown: known are cahn"),
        ({"variants": TINY["variants"] | {"Original": {"loss.temperature": 3.0}},
          "grids": {"a": {"axes": [["CH"], ["original", "Original"]]}}}, "two different trials would both be"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_be_run_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        read_study(written(tmp_path, changed(**changes)))


def test_a_study_under_torchrun_is_refused(tmp_path, monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        run_study(read_study(written(tmp_path, TINY)), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["a: [", "- 3", ""])
def test_what_is_no_study_is_refused(tmp_path, text):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"study\.yaml"):
        read_study(tmp_path / "study.yaml")


def test_parts_share_the_trials_out():
    trials = list(range(11))
    assert sorted(itertools.chain(*(part_of(trials, (i, 3)) for i in (1, 2, 3)))) == trials
    with pytest.raises(ValueError, match="4/3"):
        part_of(trials, (4, 3))


# The folder


def test_a_folder_of_another_study_is_refused(tmp_path, finished):
    with pytest.raises(RunFolderError, match="holds the study 'tiny', not 'other'"):
        StudyFolder(finished).create(read_study(written(tmp_path, changed(name="other"))))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="is not empty and not a study folder"):
        StudyFolder(tmp_path / "full").create(read_study(written(tmp_path, TINY)))


def test_a_file_of_the_users_is_the_data_of_a_study(tmp_path, finished):
    data = tmp_path / "mine.hdf5"
    base = {key: x for key, x in TINY["base"].items() if key != "data"} | {"model": {"name": "hnn", "hidden": 3}}
    grids = {"a": {"axes": [["original"]], "seeds": 1}}
    values = changed(base=base | {"data": {"path": "../mine.hdf5", "validation": 1, "test": 2}}, grids=grids)
    study = read_study(written(tmp_path, values))
    with pytest.raises(ConfigError, match=r"there is no .*mine.hdf5: give an absolute path, or one relative"):
        run_study(study, tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    shutil.copy(next((finished / "data").glob("*.hdf5")), data)
    for _ in range(2):  # the second time nothing is left to do, and the folder is known again
        assert run_study(study, tmp_path / "out", workers=1) == []
    ours = StudyFolder(tmp_path / "out").outcome(study.trials[0])
    same = read_results(finished).grids["all"].rows[0].outcomes[0]
    assert ours.value(("rollout", "states")) == same.value(("rollout", "states"))
    assert list((tmp_path / "out" / "data").iterdir()) == []


def test_a_study_may_grow_but_not_change_a_run(tmp_path, finished):
    more = changed(seeds=3)
    StudyFolder(finished).create(read_study(written(tmp_path, more)))
    assert [StudyFolder(finished).state(trial) for trial in read_study(written(tmp_path, more)).trials].count(
        "missing"
    ) == 2
    StudyFolder(finished).create(read_study(written(tmp_path, TINY)))
    other = changed()
    other["base"]["training"]["batch"] = 9
    with pytest.raises(RunFolderError, match=r"training\.batch: 8 -> 9"):
        StudyFolder(finished).create(read_study(written(tmp_path, other)))
    other = changed()
    other["variants"]["CH"]["system"]["steps"] = 11
    with pytest.raises(RunFolderError, match=r"data\.path: data/cahn-hilliard-\w+\.hdf5 -> data/cahn-hilliard-"):
        StudyFolder(finished).create(read_study(written(tmp_path, other)))


def results_of(folder: Path) -> dict[str, dict]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("runs/*/evaluation.json"))}


def test_a_finished_study_is_not_run_again(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/*")}
    run_study(StudyFolder(finished).read(), finished, workers=1)
    assert {path: path.stat().st_mtime_ns for path in finished.glob("runs/*/*")} == before
    assert not list(finished.glob("runs/*/checkpoints")), "weights are kept only on request"
    assert not any(str(finished) in path.read_text() for path in finished.glob("runs/*/*.[yj]*")), "can be copied"


def test_a_grown_study_says_what_it_can_no_longer_evaluate(tmp_path, finished):
    more = changed(evaluations={"RK4 of dt/3": {"integrator": "rk4", "substeps": 3}})
    shutil.copytree(finished, tmp_path / "out")
    with pytest.warns(UserWarning, match="of 4 trials that are done, whose weights are gone: ch-original"):
        run_study(read_study(written(tmp_path, more)), tmp_path / "out", workers=1)


def test_a_grown_study_evaluates_what_it_kept(tmp_path):
    values = changed(seeds=1, keep_weights=True, grids={"a": {"axes": [["CH"], ["original"]]}})
    out = tmp_path / "out"
    run_here(read_study(written(tmp_path, values)), out)
    before = results_of(out)
    values["grids"]["a"]["show"] = ["table", "fields", "integrators"]
    run_here(read_study(written(tmp_path, values)), out)
    assert results_of(out) == before
    assert (out / "runs" / "ch-original-seed-0" / "evaluation-rk4-2.json").exists()
    assert (out / "runs" / "ch-original-seed-0" / "rollouts.npz").exists()


def test_a_packed_study_runs_only_what_its_pack_lacks(tmp_path, finished):
    out = tmp_path / "out"
    out.mkdir()
    for path in (finished / "study.yaml", *pack_study(finished)):
        shutil.copy(path, out)
    steps = []
    assert (
        run_study(read_study(written(tmp_path, TINY)), out, workers=1, progress=lambda *done: steps.append(done)) == []
    )
    assert not list(out.glob("runs/*"))
    assert not list(out.glob("data/*")), "nothing is simulated for runs that are done"
    assert steps[-1] == (4 * 60, 4 * 60)


def test_nothing_of_another_folder_is_touched(tmp_path):
    (tmp_path / "thesis" / ".big.part").mkdir(parents=True)
    (tmp_path / "thesis" / ".thesis.tex.part").write_text("half of it")
    (tmp_path / "thesis" / "thesis.tex").touch()
    with pytest.raises(RunFolderError, match="is not empty and not a study folder"):
        run_study(read_study(written(tmp_path, TINY)), tmp_path / "thesis", workers=1)
    assert {path.name for path in (tmp_path / "thesis").iterdir()} == {".big.part", ".thesis.tex.part", "thesis.tex"}


@pytest.mark.slow
def test_a_worker_does_not_outlive_its_study(tmp_path):
    """Also where the study is killed while the worker still imports what it needs."""
    path, out = written(tmp_path, TINY), tmp_path / "out"
    command = [sys.executable, "-m", "squall.cli", "study", "run", str(path), "--out", str(out), "--workers", "1"]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not (out / "data").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(1)
    assert process.poll() is None
    process.kill()
    process.wait()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError("a worker is still there")


@pytest.mark.slow
def test_a_study_killed_three_times_equals_one_that_was_not(tmp_path, finished):
    """Killed with its workers, and killed alone: orphans stop by themselves and leave what they have."""
    path, out = written(tmp_path, TINY), tmp_path / "out"
    command = [sys.executable, "-m", "squall.cli", "study", "run", str(path), "--out", str(out), "--workers"]
    for with_workers, workers in ((True, "2"), (False, "1"), (True, "1")):
        process = subprocess.Popen(
            [*command, workers], start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        before = len(list(out.glob("runs/*/checkpoints/last-*")))
        deadline = time.monotonic() + 600
        while len(list(out.glob("runs/*/checkpoints/last-*"))) <= before and time.monotonic() < deadline:
            if process.poll() is not None:
                break
            time.sleep(0.01)
        if with_workers:
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait()
        process.stdout.close()
    run_here(read_study(path), out)
    assert results_of(out) == {
        name: found | {"data": results_of(out)[name]["data"]} for name, found in results_of(finished).items()
    }


def test_a_training_that_diverges_is_a_result(tmp_path):
    values = changed(seeds=1)
    values["variants"]["CH"]["training.learning_rate"] = 1e30
    values["variants"]["sharp"] = {"loss": {"temperature": "inf"}}  # no point of a figure over temperatures, but a line
    failed = run_here(read_study(written(tmp_path, values)), tmp_path / "out")
    assert {trial.labels for trial in failed} == {("CH", "original"), ("CH", "sharp")}
    row = read_results(tmp_path / "out").grids["all"].rows[0]
    assert row.finished == 1
    assert "diverged at step" in row.outcomes[0].failure["message"]
    write_report(tmp_path / "out")
    assert "| original | 1 | 1 | diverged | diverged |" in (tmp_path / "out" / "report" / "tables.md").read_text()


def test_the_command_runs_shows_and_reports_a_study(tmp_path, capsys):
    values = changed(seeds=1)
    out = tmp_path / "out"
    assert main(["study", "run", str(written(tmp_path, values)), "--out", str(out), "--part", "1/2"]) == 0
    assert "all: 1 done, 1 missing" in capsys.readouterr().out
    assert main(["study", "status", str(out)]) == 0
    assert main(["study", "report", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "| sharp | 0 of 1 | 0 |" in printed
    assert all(Path(line).is_file() for line in printed.splitlines() if line.startswith(str(out)))
    assert main(["study", "status", str(tmp_path / "nothing")]) == 2
    assert main(["study", "run", "nothing.yaml"]) == 2
    assert main(["study", "run", "smoke", "--part", "x"]) == 2


# Statistics


def test_the_least_median_is_one_of_several():
    found = [summarize([3.0, 5.0]), None, summarize([2.0]), summarize([float("inf")])]
    assert least_median(found) == 2
    assert np.isnan(least_median([summarize([3.0]), None]))


def test_medians_and_intervals_against_scipy():
    """A resampled median of 15 is at most the k-th smallest with the probability that 8 draws are."""
    sample = np.sort(np.random.default_rng(1).lognormal(size=15))
    at_most = stats.binom.sf(7, 15, np.arange(1, 16) / 15)
    low, high = sample[np.searchsorted(at_most, [0.025, 0.975])]
    found = summarize(list(np.random.default_rng(2).permutation(sample)))
    assert found is not None
    assert (found.median, found.low, found.high) == (np.median(sample), low, high)


def test_a_diverged_trial_counts_as_worse_than_any_number():
    found = summarize([1.0, 2.0, float("inf")])
    assert found is not None
    assert (found.median, found.high) == (2.0, float("inf"))
    assert summarize([1.0, float("inf"), float("inf")]).median == float("inf")
    assert summarize([]) is None


def test_the_paired_test_against_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.lognormal(size=15), rng.lognormal(0.8, size=15)
    ours = compare_paired(dict(enumerate(a)), dict(enumerate(b)))
    assert ours == pytest.approx(stats.wilcoxon(np.log(a), np.log(b)).pvalue)
    assert compare_paired({0: 1.0}, {1: 1.0}) is None
    assert compare_paired({0: float("inf")}, {0: float("inf")}) == 1.0


def test_a_paired_ratio_against_scipy():
    ours, theirs = {0: 1.0, 1: 3.0, 2: 2.0, 4: 9.0}, {0: 2.0, 1: 2.0, 2: 5.0, 3: 1.0}
    logs = np.log([0.5, 1.5, 0.4])
    interval = stats.ttest_1samp(logs, 0.0).confidence_interval(0.95)
    found = paired_ratio(ours, theirs)
    assert found.count == 3
    assert found.mean == pytest.approx(np.exp(logs.mean()))
    assert (found.low, found.high) == pytest.approx((np.exp(interval.low), np.exp(interval.high)))
    assert paired_ratio({0: np.inf, 1: 1.0}, {0: 1.0, 1: 1.0}).mean == np.inf
    assert paired_ratio({0: 1.0, 1: 1.0}, {0: np.inf, 1: 2.0}) == Ratio(0.5, 0.0, np.inf, 1)
    assert paired_ratio({0: 1.0}, {1: 1.0}) is None


def test_holms_correction_by_hand():
    assert corrected({"a": 0.001, "b": 0.04, "c": 0.5}) == pytest.approx({"a": 0.003, "b": 0.08, "c": 0.5})


ROUNDING = """
540 550 555 585 570 575 520 560 550 555 550 540 590 585 570 545 555 560 540 540 535 545 550 535 525 515 500 585 580 570
525 520 510 565 555 545 560 535 545 505 500 495 550 550 540 545 555 550 555 555 535 545 550 555 550 545 525 565 560 540
570 565 555 630 630 625
"""
"""Seconds/100 of three ways to round first base, 22 players: Hollander and Wolfe (1973), p. 140, as in R's help."""


def test_friedmans_test_of_a_published_sample():
    """R: Friedman chi-squared = 11.143, df = 2, p-value = 0.003805; rank sums 53, 47, 32 (Hollander and Wolfe)."""
    times = np.array(ROUNDING.split(), dtype=float).reshape(22, 3)
    ranks = mean_ranks([times[:10], times[10:]])
    assert ranks.p == pytest.approx(0.003805, abs=5e-7)
    assert ranks.mean * 22 == pytest.approx([53, 47, 32])
    assert (ranks.low < ranks.mean).all()
    assert (ranks.mean < ranks.high).all()
    alone = mean_ranks([np.array([[1.0, math.inf, math.inf]])])
    assert alone.mean.tolist() == [1.0, 2.5, 2.5]
    assert math.isnan(alone.p)
    assert mean_ranks([np.array([[1.0, 2.0, 3.0]] * 2)]).p == pytest.approx(math.exp(-2))  # chi-squared 4, df 2


@pytest.mark.parametrize(("treatments", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (10, 3.164)])
def test_the_critical_difference_by_demsars_table(treatments, q):
    """Demsar (2006), Table 5a: q at 0.05 for the two-tailed Nemenyi test."""
    assert critical_difference(treatments, 6) == pytest.approx(
        q * math.sqrt(treatments * (treatments + 1) / 36), abs=2e-3
    )


def test_a_training_that_diverged_stays_in_the_course_of_many(tmp_path, finished):
    """Five seeds, of which three are lost after the first validation: the median then left the figure."""
    config = to_dict(read_study(written(tmp_path, TINY)).trials[0].config)
    outcomes = []
    for seed in range(5):
        steps = [1.0, 2.0] if seed < 2 else [1.0]
        history = {"step": steps, "rollout_states": [1.0] * len(steps), "growth_factor": [1.0] * len(steps)}
        outcomes.append(Outcome(str(seed), seed, "done" if seed < 2 else "failed", config, history=history))
    grid = next(iter(read_results(finished).grids.values()))
    figure = training_figure(dataclasses.replace(grid, rows=(Row(("a", "b"), tuple(outcomes)),)))
    (middle,) = (line for line in figure.axes[0].lines if line.get_label() == "b")
    assert list(middle.get_ydata()) == [1.0, np.inf]


def test_published_numbers_stand_beside_ours():
    grid = preset("paper").grids["table-1"]
    assert published(grid, Row(("KdV", "T = 100"), ())) == (0.864, 835)
    assert published(grid, Row(("CH", "T = 0"), ())) is None


@pytest.mark.drawn
def test_the_report_of_a_finished_study(finished):
    files = write_report(finished)
    assert {path.suffix for path in files} >= {".png", ".pdf", ".csv", ".md"}
    begins = {".png": b"\x89PNG", ".pdf": b"%PDF"}
    assert all(path.read_bytes().startswith(begins.get(path.suffix, b"")) for path in files)
    text = (finished / "report" / "tables.md").read_text()
    row = read_results(finished).grids["all"].rows[1]
    values = row.values(("rollout", "states"))
    assert number(float(np.median(list(values.values())))) in text
    theirs, ours = (x.values(("rollout", "states"), "best") for x in read_results(finished).grids["all"].rows)
    assert number(float(np.exp(np.mean([np.log(ours[seed] / theirs[seed]) for seed in (0, 1)])))) in text
    assert "paired by seed" in text
    lines = (finished / "report" / "results.csv").read_text().splitlines()
    evaluated = [item for found in results_of(finished).values() for item in found["checkpoints"]]
    assert len(lines) == 1 + 2 * len(evaluated)  # two integrators


def test_weights_are_rolled_out_by_the_other_integrators_of_a_study(finished):
    found = read_results(finished).grids["all"]
    ((name, label),) = found.others.items()
    assert label == "RK4 of dt/2"
    for row in found.rows:
        own, other = row.values(("rollout", "states")), row.values(("rollout", "states"), "last", name)
        assert own.keys() == other.keys() == {0, 1}
        assert all(own[seed] != other[seed] for seed in own)
        assert all(outcome.evaluations[name]["integrator"] == "2 × rk4" for outcome in row.outcomes)
    write_report(finished)
    text = (finished / "report" / "tables.md").read_text()
    assert "| states, RK4 of dt/2 | states, best, RK4 of dt/2 |" in text
    assert {path.name for path in finished.glob("runs/*/rollouts*")} == {"rollouts.npz"}


# Together


def test_trials_together_end_where_they_end_apart(tmp_path, finished):
    run_here(read_study(written(tmp_path, TINY)), tmp_path / "out", together=4)
    apart, together = results_of(finished), results_of(tmp_path / "out")
    assert apart.keys() == together.keys()
    for name, found in together.items():
        for kind, item in found["checkpoints"].items():
            other = apart[name]["checkpoints"][kind]
            assert item["step"] == other["step"]
            for part in ("rollout", "one_step"):
                expected = {key: x for key, x in other[part].items() if isinstance(x, float)}
                assert {key: item[part][key] for key in expected} == pytest.approx(expected, rel=1e-3), (name, kind)


def test_trials_that_stand_at_different_steps_go_on_together(tmp_path, finished):
    """One has half of its steps behind it, one is done, one has not begun."""
    study = read_study(written(tmp_path, TINY))
    folder = StudyFolder(tmp_path / "out")
    folder.create(study)
    shutil.copytree(finished / "data", folder.path / "data", dirs_exist_ok=True)
    half, done, *rest = [(folder.config(trial), folder.run(trial).path) for trial in study.trials]
    run(*half, Stops(30))
    run(*done)
    results = run_together([half, done, *rest])
    assert results[1] is None
    assert [result.step for result in results if result] == [60, 60, 60]
    steps = [line["step"] for line in RunFolder(half[1]).read_metrics() if "loss" in line]
    assert steps == list(range(10, 61, 10))
    other = (dataclasses.replace(half[0], integrator="rk4"), tmp_path / "other")
    with pytest.raises(ValueError, match="can differ only by seed, loss and sampling"):
        run_together([half, other])
    run(*other)
    with pytest.raises(ConfigError, match="evaluate them apart"):
        evaluate_runs([half[1], other[1]])
    assert not RunFolder(half[1]).has("evaluation.json")
    assert evaluate_runs([]) == []


def test_some_of_the_grids_are_run(tmp_path, capsys):
    study = read_study("smoke")
    (one,) = study.trials_of(["figure-2"])
    assert main(["study", "run", "smoke", "--out", str(tmp_path / "out"), "--workers", "1", "--grids", "figure-2"]) == 0
    folder = StudyFolder(tmp_path / "out")
    assert [trial.name for trial in study.trials if folder.state(trial) == "done"] == [one.name]
    assert main(["study", "run", "smoke", "--out", str(tmp_path / "no"), "--grids", "figure-9"]) == 2
    assert "'figure-9' is not a known grid of the study 'smoke'" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_trainings_that_need_more_than_the_time_there_is_are_refused(tmp_path):
    study = read_study(written(tmp_path, TINY))
    with pytest.raises(ConfigError, match=r"the 4 trials .* need about .* hours of training with 1 worker .* is 1e-09"):
        run_here(study, tmp_path / "out", together=4, hours=1e-9)
    assert not list((tmp_path / "out").glob("runs/*"))


# SANN


def test_the_report_shows_what_sann_picks(tmp_path):
    values = changed(seeds=2)
    values["variants"]["SANN"] = {"loss.name": "mse", "sampling": {"name": "stiffness-aware", "fraction": 0.25}}
    values["grids"] = {"sann": {"axes": [["CH"], ["SANN"]], "show": ["table", "sampling"]}}
    out = tmp_path / "out"
    run_here(read_study(written(tmp_path, values)), out)
    (kept,) = out.glob("runs/*/sampling.npz")  # the index is of the data, whatever the seed
    found = np.load(kept)
    assert found["index"].shape == found["stiff"].shape == (3, 10)
    assert found["stiff"].sum() == round(0.25 * 30)
    assert found["index"][found["stiff"]].min() >= found["index"][~found["stiff"]].max()
    assert any("sann-sampling" in path.name for path in write_report(out))
    assert not list(out.glob("runs/*/rollouts*")), "no part of the report shows fields"


def test_progress_is_told_in_lines_where_nobody_watches():
    text = io.StringIO()
    with reporting(Console(file=text, width=200), "study x") as progress:
        for done in (0, 1, 4, 100, 400):
            progress(done, 400)
    lines = text.getvalue().splitlines()
    assert len(lines) == 3  # 0, 25 and 100 percent: one for every tenth
    assert lines[0] == "study x: 0 of 400 steps"
    assert lines[-1] == "study x: 400 of 400 steps"
