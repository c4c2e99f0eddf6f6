"""The `squall` command: simulate, train, evaluate, compare, predict, study.

What only one command needs, and is slow to import, it imports itself: `squall --help` should not wait for it.
"""

import errno
import hashlib
import itertools
import json
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from rich.console import Console
from rich.progress import Progress

import squall
import squall.data
from squall._process.progress import progress_bar, told
from squall._process.threads import keep_freed_memory
from squall.runs.config import ConfigError, RunConfig, explain, to_dict
from squall.runs.evaluate import evaluate_runs
from squall.runs.folder import RunFolder, evaluation_suffix, write_beside
from squall.runs.simulate import simulate_to_file
from squall.runs.train import run
from squall.runs.trained import open_run
from squall.study.definition import PRESETS, read_study
from squall.systems import SYSTEMS, ConvergenceError
from squall.training.loop import Recorder, TrainingDiverged

__all__ = ["main"]

USER_MISTAKE, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 2 after a mistake of the user's, 130 after an interrupt."""
    parser, known = _parser()
    console = Console(stderr=True)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say(console, f"warning: {message}", "yellow")
            warnings.simplefilter("always", UserWarning)
            _check_file(words)
            parsed = parser.parse_args(words)
            command = parsed.subcommand
            return COMMANDS[command](parser.instantiate(parsed)[command], console)
    except (ArgumentError, ValueError, OSError, TrainingDiverged, ConvergenceError) as error:
        known_here = known.get(words[0], []) if words else []
        text = "\n".join([explain(str(error), known_here), *getattr(error, "__notes__", []), *_advice(error)])
        _say(console, f"squall: {text}", "red")
        return USER_MISTAKE
    except KeyboardInterrupt:
        console.print("squall: interrupted", style="red")
        return INTERRUPTED


def _check_file(words: Sequence[str]) -> None:
    """The parser takes a configuration that is empty or no mapping for a fault of its own."""
    for flag, path in itertools.pairwise(words):
        if flag == "--config" and Path(path).is_file():
            try:
                values = yaml.safe_load(Path(path).read_text())
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise ConfigError(f"the configuration {path} is not YAML: {error}") from error
            if not isinstance(values, dict):
                raise ConfigError(f"the configuration {path} holds {values!r}, but must hold keys such as 'data:'")


def _advice(error: Exception) -> list[str]:
    """What to do about a disk that is full; what is on it already is whole."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return ["The disk is full: nothing was lost. Make room and give the same command again"] if full else []


def _say(console: Console, text: str, style: str) -> None:
    """Print as it is: no markup, and no line broken inside a path."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


# The parser: one sub-command each, and the keys it knows, to name the nearest of a misspelt one


def _parser() -> tuple[ArgumentParser, dict[str, list[str]]]:
    parser = _new_parser(prog="squall", description=squall.__doc__, version=squall.__version__)
    commands = parser.add_subcommands()
    parts = {
        "simulate": _new_parser(description="Simulate a system into an HDF5 file in The Well's layout."),
        "train": _train_parser(),
        "evaluate": _evaluate_parser(),
        "compare": _compare_parser(),
        "predict": _predict_parser(),
        "data": _new_parser(description="Say what a data file holds, or write it in squall's layout."),
        "study": _new_parser(description="Run a grid of trainings, see how far it is, report what it found."),
    }
    for name, part in parts.items():
        commands.add_subcommand(name, part, help=part.description)
    known = {name: _options(part) for name, part in parts.items()}
    known["simulate"] = _add_systems(parts["simulate"])
    known["data"] = _add_data_actions(parts["data"])
    known["study"] = _add_study_actions(parts["study"])
    return parser, known


def _options(parser: ArgumentParser) -> list[str]:
    return [key.lstrip("-") for key in parser._option_string_actions if key.startswith("--")]


def _new_parser(**options: Any) -> ArgumentParser:
    return ArgumentParser(exit_on_error=False, allow_abbrev=False, **options)


def _add_systems(parser: ArgumentParser) -> list[str]:
    """One sub-command per system, with its parameters; returns the options that they know."""
    systems = parser.add_subcommands(dest="system")
    known = {}
    for name, system in SYSTEMS.items():
        part = _new_parser(description=f"{system.equation}, by its structure-preserving implicit scheme.")
        part.add_class_arguments(system)
        part.add_argument("--out", type=Path, required=True, help="the HDF5 file to write; refused if it exists")
        part.add_argument("--trajectories", type=int | None, default=None, help="how many; 100 if left out")
        part.add_argument("--steps", type=int, default=500, help="steps of dt")
        part.add_argument("--seed", type=int | None, default=None, help="of the first states; by default the paper's")
        part.add_argument("--initial", type=Path | None, default=None, help="a .npy file of states (trajectory, point)")
        systems.add_subcommand(name, part, help=system.equation)
        known |= dict.fromkeys(_options(part))
    return list(known)


def _add_data_actions(parser: ArgumentParser) -> list[str]:
    """`describe` and `convert`; returns the options that they know."""
    actions = parser.add_subcommands(dest="action")
    describe = _new_parser(description="Print sizes, units, time step, masks, gaps, conditions and the next command.")
    convert = _new_parser(description="Write trajectories in squall's layout, the one of The Well.")
    for part in (describe, convert):
        part.add_argument("path", type=Path, help="a file or folder of any known format")
        part.add_argument("--dt", type=float | None, default=None, help="time between two states")
        part.add_argument("--axes", type=str | None, default=None, help="a word per axis: 'batch time channel x y'")
        part.add_argument("--fields", type=str, nargs="+", default=None, help="those that make the state")
        part.add_argument("--lengths", type=float, nargs="+", default=None, help="of the domain, per axis")
        part.add_argument("--boundary", type=str, nargs="+", default=None, help="periodic, wall or open, per axis")
        part.add_argument("--fill", type=float | None, default=None, help="a number that means a missing value")
        part.add_argument("--gaps", type=bool, default=False, help="NaN in The Well's layout means a missing value")
    convert.add_argument("--out", type=Path, required=True, help="the HDF5 file to write; refused if it exists")
    actions.add_subcommand("describe", describe, help=describe.description)
    actions.add_subcommand("convert", convert, help=convert.description)
    return _options(convert)


def _add_study_actions(parser: ArgumentParser) -> list[str]:
    """`run`, `status` and `report`; returns the options that they know."""
    actions = parser.add_subcommands(dest="action")
    run_parser = _new_parser(description="Run what the folder does not hold yet; the same command goes on.")
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
    status = _new_parser(description="How far a study is.")
    report = _new_parser(description="Write tables, figures and a page into the folder's report/.")
    for part in (status, report):
        part.add_argument("folder", type=Path, help="the folder of the study")
    parts = {"run": run_parser, "status": status, "report": report}
    for name, part in parts.items():
        actions.add_subcommand(name, part, help=part.description)
    return [option for part in parts.values() for option in _options(part)]


def _train_parser() -> ArgumentParser:
    parser = _new_parser(description="Train a model; the same command resumes what was interrupted.")
    parser.add_argument("--config", action="config", help="a YAML file with any of the keys below")
    parser.add_argument(
        "--out",
        type=Path | None,
        default=None,
        help="the run folder; named after the configuration if left out",
    )
    parser.add_class_arguments(RunConfig)
    return parser


def _evaluate_parser() -> ArgumentParser:
    parser = _new_parser(
        description="Roll the test trajectories out, write evaluation.json and figures, print a table."
    )
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--integrator", type=str | None, default=None, help="another one than that of the training")
    parser.add_argument("--substeps", type=int, default=1, help="how many steps of it cover one dt")
    parser.add_argument("--device", type=str, default="cpu", help="where to compute, such as cuda")
    parser.add_argument("--data", type=str | None, default=None, help="where the data file is now, if it was moved")
    return parser


def _compare_parser() -> ArgumentParser:
    parser = _new_parser(description="One table and one figure for several evaluated runs.")
    parser.add_argument(
        "runs", type=Path, nargs="+", help="run folders; those that differ only by seed make one column"
    )
    parser.add_argument("--checkpoint", type=Literal["best", "last"], default="best", help="which weights")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="a folder for the figure and the table")
    return parser


def _predict_parser() -> ArgumentParser:
    parser = _new_parser(description="Roll a trained run out from initial states of one's own.")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--initial", type=Path, required=True, help="a .npy file (trajectory, channel, *space)")
    parser.add_argument("--steps", type=int, default=500, help="steps of the data's dt")
    parser.add_argument(
        "--checkpoint",
        type=Literal["best", "last"] | None,
        default=None,
        help="which weights; the best if there are",
    )
    parser.add_argument("--out", type=Path, required=True, help="the HDF5 file to write; refused if it exists")
    return parser


# The commands


def _simulate(arguments: Namespace, console: Console) -> int:
    name = arguments.system
    options = dict(vars(arguments[name]))
    out, steps = options.pop("out"), options.pop("steps")
    count, seed, initial = options.pop("trajectories"), options.pop("seed"), options.pop("initial")
    system = SYSTEMS[name](**options)
    if initial is not None and (count is not None or seed is not None):
        raise ValueError("--initial gives the first states: --trajectories and --seed do not go with it")
    states = None if initial is None else _initial_states(initial, (1, system.points))
    with progress_bar(console) as progress:
        task = progress.add_task(f"simulating {name}", total=steps, status="")
        simulate_to_file(
            system,
            out,
            trajectories=100 if count is None else count,
            steps=steps,
            seed=seed,
            initial_states=states,
            progress=lambda done: progress.update(task, completed=done),
        )
    print(out)
    return 0


def _initial_states(path: Path, expected: tuple[int, ...]) -> torch.Tensor:
    """States from a .npy file; one channel may be left out."""
    try:
        states = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--initial {path} cannot be read as a NumPy array: {error}") from error
    if not (np.issubdtype(states.dtype, np.floating) or np.issubdtype(states.dtype, np.integer)):
        raise ValueError(f"--initial {path} holds {states.dtype}, but must hold real numbers")
    if expected[0] == 1 and states.ndim == len(expected):
        states = states[:, None]
    if states.shape[1:] != expected:
        raise ValueError(
            f"--initial {path} has shape {states.shape}, but must have (trajectory, {', '.join(map(str, expected))})"
        )
    if not np.isfinite(states).all():
        raise ValueError(f"--initial {path} holds {(~np.isfinite(states)).sum()} numbers that are not finite")
    return torch.from_numpy(np.asarray(states, dtype=np.float64))


def _train(arguments: Namespace, console: Console) -> int:
    from lightning_fabric.utilities.warnings import PossibleUserWarning

    warnings.simplefilter("ignore", PossibleUserWarning)
    options = {name: value for name, value in vars(arguments).items() if name not in ("config", "out")}
    config = RunConfig(**options)
    out = arguments.out or default_folder(config)
    keep_freed_memory()
    with progress_bar(console) as progress, _Watcher(progress, config) as watcher:
        result = run(config, out, watcher)
    if result is None:
        console.print(f"{out} holds the finished run: nothing to train")
    elif not result.finished:
        console.print(f"stopped and saved at step {result.step}; the same command goes on", style="yellow")
        return INTERRUPTED
    print(out)
    return 0


def default_folder(config: RunConfig) -> Path:
    """The run folder of a configuration that names none."""
    digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()
    return Path("runs") / f"{Path(config.data.path).stem or 'data'}-{digest[:10]}"


class _Watcher(Recorder):
    """Moves the progress bar, and turns the first Ctrl-C into a checkpoint and a stop."""

    def __init__(self, progress: Progress, config: RunConfig) -> None:
        self.progress, self.interrupted = progress, False
        self.unit = f"({config.training.residual})²"
        self.task = progress.add_task("training", total=config.training.steps, status="")

    def __enter__(self) -> "_Watcher":
        self.before = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _interrupt(self, *_: object) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        self.progress.console.print("saving after this step; Ctrl-C again to stop at once", style="yellow")

    def stopping(self) -> bool:
        return self.interrupted

    def stepped(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def logged(self, metrics: dict[str, Any]) -> None:
        names = {
            "loss": f"loss {{}} {self.unit}",
            "temperature": f"T {{}} {self.unit}",
            "effective_fraction": "ESS/n {}",
        }
        words = [text.format(f"{metrics[name]:.3g}") for name, text in names.items() if metrics.get(name) is not None]
        if words:
            self.progress.update(self.task, status="  ".join(words))


def _evaluate(arguments: Namespace, console: Console) -> int:
    from squall.report import evaluation_table, write_figures

    with console.status("rolling out"):
        (found,) = evaluate_runs(
            [arguments.run],
            method=arguments.integrator,
            count=arguments.substeps,
            device=arguments.device,
            data=arguments.data,
        )
        suffix = evaluation_suffix(arguments.integrator, arguments.substeps)
        pictures = write_figures(arguments.run, suffix)
    Console().print(evaluation_table(found))
    for path in (RunFolder(arguments.run).path / f"evaluation{suffix}.json", *pictures):
        print(path)
    return 0


def _compare(arguments: Namespace, console: Console) -> int:
    from squall.report import compare, comparison_figure, comparison_table, markdown
    from squall.report.figures import save

    comparison = compare(arguments.runs, arguments.checkpoint)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    for name in ("comparison.png", "comparison.md"):
        if (out / name).exists():
            raise FileExistsError(f"{out / name} exists and is not overwritten: choose another folder by --out")
    Console().print(comparison_table(comparison))
    print(save(comparison_figure(comparison), out / "comparison.png"))
    with write_beside(out / "comparison.md") as part:
        part.write_text(markdown(comparison))
    print(out / "comparison.md")
    return 0


def _predict(arguments: Namespace, console: Console) -> int:
    if arguments.out.exists():
        raise FileExistsError(f"{arguments.out} exists and is not overwritten: choose another name, or remove it")
    if arguments.steps < 1:
        raise ValueError(f"--steps is {arguments.steps}, but must be at least 1")
    trained = open_run(arguments.run)
    kind, trained_steps = trained.load(arguments.checkpoint)
    training = trained.experiment.split.train
    initial = _initial_states(arguments.initial, (training.channels, *training.space))
    states = trained.predict(initial, arguments.steps)
    squall.data.write(
        arguments.out,
        states,
        dt=training.dt,
        fields=training.fields,
        coordinates=training.coordinates,
        boundary=["open" if end == "mixed" else end for end in training.boundary],
        name=f"{training.name}-prediction",
        provenance={
            "run": str(arguments.run),
            "checkpoint": kind,
            "step": trained_steps,
            "squall": squall.__version__,
        },
    )
    print(arguments.out)
    return 0


def _data(arguments: Namespace, console: Console) -> int:
    from squall.data.summary import next_command

    action = arguments.action
    options = dict(vars(arguments[action]))
    path, out = options.pop("path"), options.pop("out", None)
    told = {name: value for name, value in options.items() if value}
    for name in ("lengths", "boundary"):
        if len(told.get(name, ())) == 1:
            (told[name],) = told[name]
    source = squall.data.open(path, **told)
    if action == "convert":
        with console.status("writing"):
            print(squall.data.convert(source, out))
        return 0
    words = [
        f" --{n} {shlex.join(map(str, v)) if isinstance(v, list) else shlex.quote(str(v))}" for n, v in told.items()
    ]
    print(squall.data.summary(source))
    print(f"{'next':<11} {next_command(path, source, ''.join(words))}")
    return 0


def _study(arguments: Namespace, console: Console) -> int:
    from squall.report.study_tables import status_table
    from squall.study.results import read_results

    action = arguments.action
    options = arguments[action]
    if action == "run":
        return _study_run(options, console)
    if action == "status":
        print(status_table(read_results(options.folder)))
        return 0
    from squall.report.study_report import write_report  # plotly: slow to import

    with console.status("drawing"):
        files = write_report(options.folder)
    print((options.folder / "report" / "tables.md").read_text())
    for path in files:
        print(path)
    return 0


def _study_run(options: Namespace, console: Console) -> int:
    from squall.report.study_tables import status_table
    from squall.study.results import read_results
    from squall.study.runner import run_study

    study = read_study(options.study)
    out = options.out or Path("studies") / study.name
    with told(console, f"study {study.name}, {len(study.trials)} trials") as progress:
        failed = run_study(
            study,
            out,
            workers=options.workers,
            together=options.together,
            part=_part(options.part),
            grids=options.grids,
            progress=progress,
        )
    for trial in failed:
        _say(console, f"{trial.name}: the training diverged; kept as a result", "yellow")
    print(status_table(read_results(out)))
    print(out)
    return 0


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ValueError(f"--part is '{text}', but must be such as 2/3: the second of three parts")
    return int(match[1]), int(match[2])


COMMANDS: dict[str, Callable[[Namespace, Console], int]] = {
    "simulate": _simulate,
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "predict": _predict,
    "data": _data,
    "study": _study,
}


if __name__ == "__main__":
    sys.exit(main())
