"""The folder of a study, one run folder for every trial.

study.yaml      what was asked for
data/           the simulated trajectories
.leases/        who works on what
runs/<label>/   a run folder for every trial, or `failed.json` in it where the training diverged
results.csv     the pack of finished runs, whose folders may then be removed
results.npz
"""

import dataclasses
import os
from functools import cached_property
from pathlib import Path

from squall._process.documents import dump_yaml, load_yaml
from squall._process.files import write_text
from squall.runs.config import RunConfig, difference, to_dict, with_defaults
from squall.runs.folder import RunFolder, RunFolderError
from squall.study.definition import Study, Trial, read_study
from squall.study.outcome import Outcome, read_outcome
from squall.study.pack import PACK, read_pack

TRIAL = "trial.json"
"""Written last into a run folder of a study: its labels and seed. It marks the run as complete."""

FAILED = "failed.json"
"""In the folder of a run whose training diverged."""

LEASES = ".leases"
"""Hidden: no part of the results."""

FINISHED = ("done", "failed")
"""A training that diverged is a result and not repeated."""


class StudyFolder:
    """A study on disk; `create` makes the folder."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def create(self, study: Study) -> None:
        """Make the folder for a study, or make sure that it holds this one.

        A study may grow: what it asks for beyond what is there is added.

        Raises:
            RunFolderError: if it holds another study, or a run that this study asks for otherwise.
        """
        self.refuse_other(study)
        there = self.path / "study.yaml"
        self.path.mkdir(parents=True, exist_ok=True)
        if not there.exists() or load_yaml(there) != study.source:  # else its comments are kept
            write_text(there, dump_yaml(dict(study.source)))
        for name in ("runs", "data"):  # after study.yaml, by which a folder that a kill left is known
            (self.path / name).mkdir(exist_ok=True)

    def refuse_other(self, study: Study) -> None:
        """Make sure, before anything is written, that the folder is free for a study or holds this one.

        Raises:
            RunFolderError: as `create`.
        """
        if (self.path / "study.yaml").exists():
            if (other := self._name()) != study.name:
                raise RunFolderError(
                    f"{self.path} holds the study '{other}', not '{study.name}': choose another folder"
                )
        elif self.path.is_dir() and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise RunFolderError(f"{self.path} is not empty and not a study folder: choose another folder")
        self._refuse_other_runs(study)

    def _refuse_other_runs(self, study: Study) -> None:
        begun = self.begun()
        for trial in study.trials:
            folder, packed = self.run(trial), self.packed.get(trial.name)
            is_there = trial.name in begun and folder.has("config.yaml")
            if not is_there and packed is None:
                continue
            there = with_defaults(folder.read_config() if is_there or packed is None else dict(packed.config))
            requested = to_dict(trial.config)
            requested["device"]["threads"] = there["device"]["threads"]  # which makes no other trial
            if requested["data"]["inputs"] == "all":  # a run folder has the names that it stands for
                requested["data"]["inputs"] = there["data"]["inputs"]
            if trial.system in study.systems:  # absolute in folders of earlier versions
                there["data"]["path"] = f"data/{Path(there['data']['path']).name}"
            if lines := difference(there, requested):
                raise RunFolderError(
                    f"{folder.path} holds a run of another configuration (there -> requested):\n  "
                    + "\n  ".join(lines)
                    + "\nChoose another folder, or give the variant another name"
                )

    def read(self) -> Study:
        """The study that the folder holds.

        Raises:
            RunFolderError: if it holds none.
        """
        if not (self.path / "study.yaml").exists():
            raise RunFolderError(f"{self.path} is not a study folder (no study.yaml). `squall study run` makes one")
        return read_study(self.path / "study.yaml")

    def run(self, trial: Trial) -> RunFolder:
        """The run folder of a trial."""
        return RunFolder(self.path / "runs" / trial.name)

    def config(self, trial: Trial) -> RunConfig:
        """The configuration of a trial, with the path of its data in this folder."""
        data = dataclasses.replace(trial.config.data, path=str(self.path / trial.config.data.path))
        return dataclasses.replace(trial.config, data=data)

    @cached_property
    def packed(self) -> dict[str, Outcome]:
        """The runs of the pack, by name."""
        there = all((self.path / name).exists() for name in ("study.yaml", PACK))
        return read_pack(self.path, self._name()) if there else {}

    def _name(self) -> str:
        """Of the study, without its trials: to read many takes seconds."""
        study = load_yaml(self.path / "study.yaml")
        return str(study.get("name") if isinstance(study, dict) else study)

    def only_packed(self, trial: Trial) -> bool:
        """Whether a finished run is in the pack and not, or not finished, in its folder."""
        packed = self.packed.get(trial.name)
        return packed is not None and packed.state in FINISHED and self._state(trial) not in FINISHED

    def outcome(self, trial: Trial) -> Outcome:
        """What a trial left, in its folder or in the pack.

        Raises:
            RunFolderError: if a file of it, or the pack, is damaged.
        """
        state = self._state(trial)
        if self.only_packed(trial) or (state == "missing" and trial.name in self.packed):
            return self.packed[trial.name]
        return read_outcome(self.run(trial), trial.seed, state, to_dict(trial.config))

    def begun(self) -> set[str]:
        """The names of all runs that have a folder: of 10 000 runs one listing asks a shared disk for less than many
        questions do."""
        runs = self.path / "runs"
        return set(os.listdir(runs)) if runs.is_dir() else set()

    def state(self, trial: Trial) -> str:
        """`done`, `failed` (the training diverged), `started` or `missing`."""
        return self.packed[trial.name].state if self.only_packed(trial) else self._state(trial)

    def _state(self, trial: Trial) -> str:
        folder = self.run(trial)
        if folder.has(TRIAL):
            return "done"
        if folder.has(FAILED):
            return "failed"
        return "started" if folder.has("config.yaml") else "missing"

    def steps_done(self, trial: Trial) -> int:
        """Training steps behind a trial."""
        if self.state(trial) in FINISHED:
            return trial.config.training.steps
        lines = self.run(trial).read_metrics()
        return min(lines[-1]["step"], trial.config.training.steps) if lines else 0
