"""A packed study gives the report of its run folders, to the last byte of its tables, and loses nothing by a kill."""

import csv
import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import yaml

from squall.cli import main
from squall.report import compare, write_report
from squall.report.study import study_tables
from squall.runs.folder import RunFolder, RunFolderError
from squall.study import pack
from squall.study.definition import read_study
from squall.study.folder import StudyFolder
from squall.study.outcome import FIELDS
from squall.study.results import pack_study, read_results

ROOT = Path(__file__).parents[2]


@pytest.fixture
def packed(study_folder, tmp_path):
    """The pack alone, as another machine gets it."""
    pack_study(study_folder)
    target = tmp_path / "packed"
    target.mkdir()
    for name in ("study.yaml", "results.csv", "results.npz"):
        shutil.copy(study_folder / name, target)
    return target


def rows(folder) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def changed(folder, change) -> None:
    values = yaml.safe_load((folder / "study.yaml").read_text())
    change(values)
    (folder / "study.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def test_the_report_from_a_pack_is_that_from_the_folder(study_folder, packed):
    files = {path.name: path for path in write_report(study_folder)}
    again = {path.name: path for path in write_report(packed)}
    assert files.keys() == again.keys()
    assert len([name for name in files if name.endswith(".png")]) > 3
    for name in files:
        if not name.endswith(".html"):
            assert files[name].read_bytes() == again[name].read_bytes(), name


def test_a_pack_keeps_every_number_of_every_run(study_folder, packed):
    theirs = {outcome.name: outcome for outcome in read_results(study_folder).outcomes}
    for outcome in read_results(packed).outcomes:
        other = theirs[outcome.name]
        ours, expected = (json.loads(json.dumps(x.evaluations)) for x in (outcome, other))
        for evaluation, reference in zip(ours.values(), expected.values(), strict=True):
            for kind, item in evaluation["checkpoints"].items():
                kept, curves = item.pop("curves"), reference["checkpoints"][kind].pop("curves")
                del curves["energy_truth"]  # of single trajectories, which no report shows
                assert kept.keys() == curves.keys()
                assert kept["time"] == curves["time"]
                for name, values in curves.items():  # drawn only: four digits
                    assert kept[name] == [x if x is None else pytest.approx(x, rel=2**-14) for x in values]
        assert ours == expected
        for name in ("seed", "state", "config", "history", "environment", "failure"):
            assert getattr(outcome, name) == getattr(other, name), name


def test_fields_are_kept_of_the_runs_that_figures_show(packed):
    kept = {outcome.name: outcome.fields() for outcome in read_results(packed).outcomes}
    assert {name for name, fields in kept.items() if fields} == {"ch-original-seed-0", "ch-t-100-seed-0"}
    with zipfile.ZipFile(packed / "results.npz") as archive:
        assert sum(name.endswith("/truth.npy") for name in archive.namelist()) == 1, "equal truths are stored once"


def test_single_precision_is_taken_only_where_it_loses_nothing():
    assert pack._column("history/score", {0: [0.1, None]}, 2).dtype == np.float32
    assert pack._column("history/score", {0: [1 / 3]}, 1).dtype == np.float64
    assert pack._column("last/curves/states", {0: [1 / 3]}, 1).dtype == np.float32
    assert pack._column("last/curves/states", {0: [1e300]}, 1).dtype == np.float64


def test_the_table_has_a_row_for_each_run_checkpoint_and_integrator(packed):
    found = {(row["run"], row["checkpoint"]): row for row in rows(packed)}
    assert found["ch-original-seed-0", "last"]["rollout: states"] == "0.4321"
    assert found["ch-original-seed-0", "best"]["rollout: states"] == "0.1234"
    assert found["ch-t-100-seed-1", "last"]["rollout: states"] == "inf"
    expected = {"labels": "CH / original", "seed": "0", "state": "done", "integrator": "euler", "versions": "torch 2.0"}
    expected |= {"commit": "c0ffee" * 6, "data sha256": "da7a", "step": "20"}
    assert expected.items() <= found["ch-original-seed-0", "last"].items()


def test_runs_that_are_not_finished_failed_or_missing_are_kept_as_such(packed):
    states = {row["run"]: row["state"] for row in rows(packed)}
    assert states["ch-t-0-seed-0"] == "failed"
    assert states["ch-t-0-seed-1"] == "started"
    assert states["ch-original-seed-1"] == "missing"
    assert {outcome.name: outcome.state for outcome in read_results(packed).outcomes} == states


def test_a_text_that_a_spreadsheet_would_compute_stays_text(study_folder):
    RunFolder(study_folder / "runs" / "ch-t-0-seed-0").write_json("failed.json", {"step": 7, "message": '=cmd|"x",1'})
    pack_study(study_folder)
    assert next(row for row in rows(study_folder) if row["state"] == "failed")["failure"] == '\'=cmd|"x",1'


def test_the_same_results_are_the_same_bytes(study_folder):
    before = [path.read_bytes() for path in pack_study(study_folder)]
    assert [path.read_bytes() for path in pack_study(study_folder)] == before


def test_a_grown_study_is_packed_anew_with_the_runs_whose_folders_are_gone(packed, study_folder):
    before = rows(packed)
    changed(packed, lambda values: values.update(seeds=3))
    shutil.copytree(study_folder / "runs" / "ch-t-100-seed-0", packed / "runs" / "ch-t-100-seed-2")
    assert main(["study", "pack", str(packed)]) == 0
    after = {(row["run"], row["checkpoint"]): row for row in rows(packed)}
    assert after["ch-t-100-seed-2", "last"]["rollout: states"] == "0.0567"
    kept = [row for row in before if row["state"] in ("done", "failed")]
    assert all(after[row["run"], row["checkpoint"]] == row for row in kept)
    assert len(kept) == 7


def test_a_packed_run_counts_as_done_and_guards_its_configuration(packed):
    folder = StudyFolder(packed)
    study = folder.read()
    states = {trial.name: folder.state(trial) for trial in study.trials}
    assert states["ch-original-seed-0"] == "done"
    assert folder.only_packed(study.trials[0])
    values = dict(study.source) | {"base": {"training": {"steps": 21}, "data": {"validation": 2, "test": 2}}}
    (packed.parent / "other.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(RunFolderError, match=r"training\.steps: 20 -> 21"):
        folder.refuse_other(read_study(packed.parent / "other.yaml"))


def test_runs_of_a_pack_are_compared_as_those_of_folders(packed, study_folder):
    names = ["ch-original-seed-0", "ch-t-100-seed-0"]
    found, again = (compare([folder / "runs" / name for name in names]) for folder in (study_folder, packed))
    assert [row.name for row in found.rows] == [row.name for row in again.rows]
    for row, other in zip(found.rows, again.rows, strict=True):
        assert row.summary(("rollout", "states"), "best") == other.summary(("rollout", "states"), "best")
    with pytest.raises(RunFolderError, match="not a run folder"):
        compare([packed / "runs" / "ch-t-10-seed-0"])


def test_a_kill_leaves_the_old_pack(study_folder, monkeypatch):
    before = [path.read_bytes() for path in pack_study(study_folder)]
    changed(study_folder, lambda values: values.update(seeds=3))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pack, "_member", killed)
    with pytest.raises(KeyboardInterrupt):
        pack_study(study_folder)
    assert [(study_folder / name).read_bytes() for name in ("results.csv", "results.npz")] == before
    assert not list(study_folder.glob(".*.part"))


def test_the_pack_of_another_study_is_neither_read_nor_overwritten(packed, study_folder, capsys):
    changed(packed, lambda values: values.update(name="another"))
    before = (packed / "results.npz").read_bytes()
    for action in ("pack", "report", "status"):
        assert main(["study", action, str(packed)]) == 2
        assert "is the pack of the study 'by-hand', not of 'another'" in " ".join(capsys.readouterr().err.split())
    assert (packed / "results.npz").read_bytes() == before


def test_a_pack_of_more_than_the_study_asks_for_is_not_overwritten(packed):
    before = (packed / "results.npz").read_bytes()
    changed(packed, lambda values: values.update(seeds=1))
    with pytest.raises(RunFolderError, match=r"holds 2 runs that .* not ask for, such as ch-t-0-seed-1"):
        pack_study(packed)
    assert (packed / "results.npz").read_bytes() == before


def test_a_table_of_ones_own_is_not_overwritten(study_folder):
    (study_folder / "results.csv").write_text("mine")
    with pytest.raises(RunFolderError, match="not of a pack"):
        pack_study(study_folder)
    assert (study_folder / "results.csv").read_text() == "mine"


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "later", "no runs"])
def test_a_damaged_pack_is_refused(packed, damage):
    path = packed / "results.npz"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[len(content) // 3] ^= 0xFF
    path.write_bytes({"cut": content[:-100], "empty": b"", "text": b"no zip"}.get(damage, content))
    if damage in ("later", "no runs"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("runs.json", json.dumps({"format": "squall study results 9"} if damage == "later" else {}))
    with pytest.raises(RunFolderError, match=r"results\.npz (is damaged|has the format)"):
        read_results(packed)


def test_nothing_in_a_pack_is_unpickled(packed):
    with zipfile.ZipFile(packed / "results.npz", "a") as archive, archive.open("last/curves/x.npy", "w") as file:
        np.lib.format.write_array(file, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(RunFolderError, match=r"is damaged.*allow_pickle=False"):
        read_results(packed)


def test_the_fields_file_is_not_asked_of_a_pack_that_has_none(packed):
    missing = next(outcome for outcome in read_results(packed).outcomes if outcome.state == "missing")
    assert missing.arrays(FIELDS) is None


@pytest.mark.filterwarnings("ignore:the runs on korteweg-de-vries are on 2")  # paper-small: see docs/study.md
@pytest.mark.parametrize("name", ["paper", "paper-small", "sweeps-small", "evidence-small", "candidates-small"])
def test_the_committed_tables_are_those_of_the_committed_packs(name):
    folder = ROOT / "studies" / name
    results = read_results(folder)
    assert study_tables(results) == (folder / "report" / "tables.md").read_text()
    assert pack.csv_table(results.labels, results.outcomes) == (folder / "results.csv").read_text()


def test_the_program_of_the_page_reads_a_pack(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (program,) = re.findall(
        r"```python\n(.*?results\.npz.*?)```", (ROOT / "docs" / "study.md").read_text(), flags=re.DOTALL
    )
    exec(compile(program, "page", "exec"), {})
    assert capsys.readouterr().out.startswith("ch-briefly-trained-seed-0 ")
