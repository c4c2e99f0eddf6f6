"""`squall study`: grids of trainings."""

import functools
import re
import shlex
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from squall._process.console import say
from squall._process.names import file_name
from squall._process.progress import reporting
from squall.cli.options import command_parser, new_parser
from squall.study.definition import PRESETS, Study, read_study
from squall.study.folder import StudyFolder
from squall.study.results import pack_study, read_results
from squall.study.runner import part_of, run_study


def parser() -> ArgumentParser:
    parser = command_parser("study")
    actions = parser.add_subcommands(dest="action")
    run_parser = new_parser(description="Run what the folder does not hold yet; the same command resumes it.")
    run_parser.add_argument("study", type=str, help=f"a YAML file, or one of the presets {', '.join(PRESETS)}")
    run_parser.add_argument("--out", type=Path | None, default=None, help="the folder; studies/<name> if left out")
    run_parser.add_argument("--workers", type=int | None, default=None, help="processes; one per core if left out")
    run_parser.add_argument(
        "--together", type=int, default=1, help="trials that a process trains as one batched computation; for a GPU"
    )
    run_parser.add_argument("--part", type=str, default="1/1", help="i/n: the i-th of n parts, one per machine")
    run_parser.add_argument(
        "--grids", type=str, nargs="+", default=None, help="only these of its grids; after the study"
    )
    run_parser.add_argument(
        "--hours", type=float | None, default=None, help="refuse trainings that need more, by an estimate made first"
    )
    run_parser.add_argument(
        "--on",
        type=Literal["ray", "slurm"] | None,
        default=None,
        help="where: a Ray cluster or SLURM; here if left out",
    )
    run_parser.add_argument(
        "--address", type=str | None, default=None, help="of the Ray cluster, such as 10.0.0.1:6379"
    )
    run_parser.add_argument(
        "--resources",
        type=dict[str, Any],
        default={},
        help="of a worker on Ray, or of a job of SLURM: '{num_gpus: 1}', '{time: 240, partition: gpu}'",
    )
    run_parser.add_argument("--jobs", type=int, default=1, help="jobs of SLURM, of --workers processes each")
    run_parser.add_argument("--dry-run", action="store_true", help="show the script of the SLURM jobs, and do nothing")
    status = new_parser(description="How far a study is.")
    report = new_parser(description="Write tables, figures and a page into the folder's report/.")
    pack = new_parser(description="Write results.csv and results.npz, all that the report needs, into the folder.")
    for part in (status, report, pack):
        part.add_argument("folder", type=Path, help="the folder of the study, with its runs or its pack")
    parts = {"run": run_parser, "status": status, "report": report, "pack": pack}
    for name, part in parts.items():
        actions.add_subcommand(name, part, help=part.description)
    return parser


def run(arguments: Namespace, console: Console) -> int:
    action = arguments.action
    options = arguments[action]
    if action == "run":
        return _study_run(options, console)
    if action == "status":
        from squall.report.tables import status_table

        print(status_table(read_results(options.folder)))
        return 0
    if action == "pack":
        files = pack_study(options.folder)
    else:
        from squall.report import write_report

        with console.status("drawing"):
            files = write_report(options.folder)
        print((options.folder / "report" / "tables.md").read_text(encoding="utf-8"))
    for path in files:
        print(path)
    return 0


def _study_run(options: Namespace, console: Console) -> int:
    from squall.report.tables import status_table
    from squall.study.on_ray import ray_workers

    study = read_study(options.study)
    out = options.out or Path("studies") / file_name(study.name)
    _refuse_elsewhere(options)
    if options.on == "slurm":
        return _submit_study(options, study, out)
    on = None
    if options.on == "ray":
        on = functools.partial(ray_workers, address=options.address, resources=options.resources)
    try:
        with reporting(console, f"study {study.name}, {len(study.trials)} trials") as progress:
            failed = run_study(
                study,
                out,
                workers=options.workers,
                together=options.together,
                part=_part(options.part),
                grids=options.grids,
                hours=options.hours,
                progress=progress,
                on=on,
            )
    except KeyboardInterrupt:
        console.print("stopping: trainings are saved at their step; the same command resumes them", style="yellow")
        raise
    for trial in failed:
        say(console, f"{trial.name}: the training diverged; kept as a result", "yellow")
    print(status_table(read_results(out)))
    print(out)
    return 0


def _refuse_elsewhere(options: Namespace) -> None:
    """Refuse options of another place to run."""
    given = {
        "address": (options.address is not None, ("ray",)),
        "resources": (bool(options.resources), ("ray", "slurm")),
        "jobs": (options.jobs != 1, ("slurm",)),
        "dry-run": (options.dry_run, ("slurm",)),
    }
    for name, (is_given, places) in given.items():
        if is_given and options.on not in places:
            raise ValueError(f"--{name} is for --on {' and --on '.join(places)}, and must be left out otherwise")
    if options.hours is not None and (options.on or not options.hours > 0):
        raise ValueError(
            f"--hours is {options.hours:g}, but must be above 0 and without --on: the estimate is made on this machine"
        )
    for name in ("jobs", "workers", "together"):
        if (count := options[name]) is not None and count < 1:
            raise ValueError(f"--{name} is {count}, but must be at least 1")


def _submit_study(options: Namespace, study: Study, out: Path) -> int:
    """Give SLURM jobs that each run the study's command, on the folder that they share."""
    from squall.study.on_slurm import job_script, submit

    part_of(study.trials if options.grids is None else study.trials_of(options.grids), _part(options.part))
    StudyFolder(out).refuse_other(study)
    workers = str(options.workers or 1)
    definition = options.study if options.study in PRESETS else str(Path(options.study).absolute())
    words = ["study", "run", definition, "--out", str(out.absolute()), "--workers", workers]
    words += ["--together", str(options.together), "--part", options.part]
    words += ["--grids", *options.grids] if options.grids else []
    # An hour: submitit's own five minutes would be spent on starting.
    resources = {"job_name": file_name(study.name), "time": 60, "cpus_per_task": int(workers), **options.resources}
    if options.dry_run:
        print(job_script(out, options.jobs, resources))
        print(f"# Each job runs: squall {shlex.join(words)}")
        return 0
    print("\n".join(submit(words, out, options.jobs, resources)))
    print(f"squall study status {shlex.quote(str(out))}")
    return 0


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ValueError(f"--part is '{text}', but must be such as 2/3: the second of three parts")
    return int(match[1]), int(match[2])
