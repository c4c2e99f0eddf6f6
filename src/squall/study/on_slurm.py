"""A study on SLURM: a job array of ordinary `squall study run` commands, which share the folder by its leases.

submitit submits the jobs. Before a job's time is over, SLURM signals it: its trainings are saved at their step, and
the job is queued again.
"""

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from squall._process.extras import explain_missing_extra
from squall.runs.folder import RunFolderError

JOBS = ".jobs"
"""The folder of the jobs' scripts and logs, in that of the study."""

REQUEUES = 1000
"""How often a job may reach its time limit. The study ends it."""

LEAST_MINUTES = 3
"""The shortest time of a job. SLURM signals up to 60 s early, and a signal before Python has started ends the job."""

SAVE_SECONDS = 80.0
"""How long the trainings may take to save, of the 90 seconds between SLURM's signal and the end of a job."""


class StudyJob:
    """What one job does, pickled by submitit: the command `squall` with some words."""

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        command = [sys.executable, "-m", "squall.cli", *self.words]
        # SLURM's signal reaches every process of a job, and would end those that do not expect it.
        with subprocess.Popen(command, preexec_fn=lambda: signal.signal(signal.SIGUSR2, signal.SIG_IGN)) as process:
            self.process = process
            code = process.wait()
        if code != 0:
            raise RuntimeError(f"squall {' '.join(self.words)} ended with exit code {code}")

    def checkpoint(self) -> Any:
        """Called by submitit within the signal's handler: save, and give the job to be queued again."""
        if self.process is not None:
            self.process.send_signal(signal.SIGUSR1)
            end = time.monotonic() + SAVE_SECONDS
            # Not by Popen.wait: it is interrupted by this handler and has its lock.
            while time.monotonic() < end and not _ended(self.process.pid):
                time.sleep(0.05)
        return importlib.import_module("submitit.helpers").DelayedSubmission(StudyJob(self.words))


def _ended(pid: int) -> bool:
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def submit(words: Sequence[str], folder: Path, jobs: int, resources: Mapping[str, Any]) -> list[str]:
    """Submit a job array.

    Args:
        words: of the command `squall` that each job runs; its paths are the same on every node.
        folder: of the study, on a disk that the nodes share.
        jobs: how many.
        resources: of a job, as submitit's SLURM executor takes them: `time` in minutes, `partition`, `mem`, ...

    Returns:
        the numbers of the jobs.

    Raises:
        ValueError: for a resource that is unknown, or too little time.
        RunFolderError: where there is no SLURM, or it refuses the jobs.
    """
    executor = _executor(folder, resources, dry=False)
    refused = importlib.import_module("submitit.core.utils").FailedJobError
    try:
        with executor.batch():
            submitted = [executor.submit(StudyJob(words)) for _ in range(jobs)]
    except refused as error:
        reason = " ".join(str(error).split())
        raise RunFolderError(f"SLURM takes no job: {reason}. Look at --dry-run, and change --resources") from error
    return [job.job_id for job in submitted]


def job_script(folder: Path, jobs: int, resources: Mapping[str, Any]) -> str:
    """The script that `submit` would give to sbatch."""
    executor = _executor(folder, resources, dry=True)
    if jobs > 1:
        executor.parameters["map_count"] = jobs
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def _executor(folder: Path, resources: Mapping[str, Any], *, dry: bool) -> Any:
    minutes = resources.get("time")
    if isinstance(minutes, int | float) and minutes < LEAST_MINUTES:
        raise ValueError(
            f"--resources: time is {minutes} minutes, but must be at least {LEAST_MINUTES}: SLURM signals a job "
            "90 to 150 s before its end, and a job that has not started Python by then is lost"
        )
    with explain_missing_extra():
        slurm: Any = importlib.import_module("submitit.slurm.slurm")

    class Anywhere(slurm.SlurmExecutor):
        """Needs no SLURM on this machine."""

        @classmethod
        def affinity(cls) -> int:
            return 1

    try:
        executor = (Anywhere if dry else slurm.SlurmExecutor)(folder.absolute() / JOBS, max_num_timeout=REQUEUES)
    except RuntimeError as error:
        raise RunFolderError(f"{error} Give the command where sbatch and srun are, or look at --dry-run") from error
    executor.update_parameters(**resources)
    return executor
