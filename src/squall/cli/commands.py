"""The commands: for each a parser and one thin function, which imports what is slow and only it needs."""

import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_loader
from rich.console import Console
from rich.progress import Progress

import squall
import squall.data
from squall._process.console import results_console
from squall._process.documents import DocumentError, load_yaml, read_yaml, special_file
from squall._process.files import DAMAGED_ARRAYS
from squall._process.limits import too_large
from squall._process.names import file_name
from squall._process.progress import ProgressLines, progress_bar, told
from squall._process.signals import Stopped, handled, notices_raise
from squall._process.threads import keep_freed_memory
from squall.cli import COMMANDS, USER_MISTAKE
from squall.data.apebench import write_scenario
from squall.runs.config import GROUPS, ConfigError, RunConfig, explain, refuse_file_as_group, refuse_null, to_dict
from squall.runs.emulator import PROGRAM
from squall.runs.evaluate import conserved_quantities, evaluate_runs
from squall.runs.export import export_run
from squall.runs.folder import RunFolder, evaluation_suffix, write_beside
from squall.runs.ranks import OtherProcessError, is_first
from squall.runs.simulate import simulate_sphere_to_file, simulate_to_file
from squall.runs.train import run
from squall.runs.trained import open_run
from squall.study.definition import PRESETS, Study, read_study
from squall.systems import SYSTEMS, ConvergenceError, ShallowWater
from squall.training.loop import Recorder, TrainingDiverged

__all__ = ["execute"]

REPORT = (
    f"This is a fault of squall {squall.__version__}, not yours. Please report the command and the lines above as an "
    "issue in squall's repository"
)


@notices_raise()
def execute(words: Sequence[str]) -> int:
    """Run the command that the first of the words names; return its exit code."""
    words = _specific_last(list(words))
    command, *options = words
    console, errors, known = Console(stderr=True), Console(stderr=True), []
    try:
        parser, known = PARSERS[command]()
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say(console, f"warning: {message}", "yellow")
            warnings.simplefilter("always", UserWarning)
            _check_files(words)
            _warn_of_repeats(options)
            parsed = parser.parse_args(options)
            if command == "train":
                refuse_null(parsed)
            return RUN[command](parser.instantiate(parsed), console)
    except (ArgumentError, ValueError, OSError, TrainingDiverged, ConvergenceError, OtherProcessError) as error:
        text = "\n".join([explain(str(error), known), *getattr(error, "__notes__", []), *_advice(error)])
        if not getattr(error, "known", False):  # to the user, by the first of several processes
            _say(errors, f"squall: {text}", "red")
        return USER_MISTAKE
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        text = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        console.print(f"squall: {text}", style="red")
        return 128 + number
    except Exception as error:
        if too_large(error):
            _say(
                errors,
                f"squall: the numbers asked for are too large or too small for this machine: {_first_line(error)}",
                "red",
            )
            return USER_MISTAKE
        error.add_note(REPORT)
        raise


def _check_files(words: Sequence[str]) -> None:
    """The parser waits for pipes, and takes a configuration that is empty or no mapping for a fault of its own."""
    for flag, path in itertools.pairwise(words if words[:1] == ["train"] else ()):
        if (flag == "--config" or flag.removeprefix("--") in GROUPS) and os.path.exists(path):
            try:
                values = load_yaml(path)
            except DocumentError as error:
                raise ConfigError(f"the configuration {error}") from error
            if not isinstance(values, dict):
                raise ConfigError(f"the configuration {path} holds {values!r}, but must hold keys such as 'data:'")
            if flag == "--config":
                refuse_file_as_group(values)


def _specific_last(words: list[str]) -> list[str]:
    """The options of `train` from the general to the specific: a single key wins over a file wherever it stands.

    >>> _specific_last(["train", "--training.steps", "3", "--config=c.yaml"])
    ['train', '--config', 'c.yaml', '--training.steps', '3']
    """
    if words[:1] != ["train"]:
        return words
    options: list[list[str]] = [[]]
    for word in words[1:]:
        if word.startswith("--"):
            options.append(word.split("=", 1) if word.startswith("--config=") else [word])
        else:
            options[-1].append(word)
    options[1:] = sorted(options[1:], key=lambda option: (option[0] != "--config", option[0].split("=")[0].count(".")))
    return [words[0], *itertools.chain.from_iterable(options)]


def _warn_of_repeats(words: Sequence[str]) -> None:
    names = [word.split("=")[0] for word in words if word.startswith("--") and not word.startswith("--config")]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        warnings.warn(f"{name} is given {names.count(name)} times: the last one counts", stacklevel=2)


def _value(text: str) -> Any:
    """A value of the command line or a configuration file; 'name:' and '{name}' stay text."""
    value = read_yaml(text)
    names_only = isinstance(value, dict) and all(x is None for x in value.values()) and "\n" not in text
    return text if names_only and (":" not in text or text.rstrip().endswith(":")) else value


set_loader("squall", _value, (DocumentError,))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _advice(error: Exception) -> list[str]:
    """What to do about a disk that is full; what is on it already stays whole."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return ["The disk is full: what was saved is whole. Make room and give the same command again"] if full else []


def _say(console: Console, text: str, style: str) -> None:
    """Print as it is: no markup, and no line broken inside a path."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


# The parsers, each with the options it knows: the nearest of them is named where one is misspelt

Parser = tuple[ArgumentParser, list[str]]


def _command_parser(name: str) -> ArgumentParser:
    return _new_parser(prog=f"squall {name}", description=COMMANDS[name])


def _options(parser: ArgumentParser) -> list[str]:
    return [key.lstrip("-") for key in parser._option_string_actions if key.startswith("--")]


def _new_parser(**options: Any) -> ArgumentParser:
    return ArgumentParser(exit_on_error=False, allow_abbrev=False, parser_mode="squall", **options)


def _simulate_parser() -> Parser:
    """One sub-command per system, with its parameters."""
    parser = _command_parser("simulate")
    systems = parser.add_subcommands(dest="system")
    known = {}
    for name, system in SYSTEMS.items():
        part = _new_parser(description=f"{system.equation}, by {system.scheme}.")
        part.add_class_arguments(system)
        part.add_argument("--out", type=Path, required=True, help="the HDF5 file to write; refused if it exists")
        part.add_argument("--trajectories", type=int | None, default=None, help="how many; 100 if left out")
        part.add_argument("--steps", type=int, default=500, help="steps of dt")
        part.add_argument(
            "--seed", type=int | None, default=None, help="of the first states; the usual one if left out"
        )
        part.add_argument(
            "--initial", type=Path | None, default=None, help="a .npy file of states (trajectory, channel, *space)"
        )
        systems.add_subcommand(name, part, help=system.equation)
        known |= dict.fromkeys(_options(part))
    sphere = _new_parser(description="Storms on a sphere, by torch-harmonics' spectral solver.")
    sphere.add_class_arguments(ShallowWater)
    sphere.add_argument("--out", type=Path, required=True, help="the NetCDF file to write; refused if it exists")
    sphere.add_argument("--trajectories", type=int, default=20, help="how many")
    sphere.add_argument("--steps", type=int, default=40, help="steps of dt")
    sphere.add_argument("--seed", type=int, default=0, help="of the first states")
    systems.add_subcommand(ShallowWater.name, sphere, help=ShallowWater.equation)
    benchmark = _new_parser(description="A scenario of APEBench, by the package itself, from its own seeds.")
    benchmark.add_argument("--scenario", type=str, required=True, help="its name there, as diff_kdv")
    benchmark.add_argument("--part", type=str, default="train", help="train or test: which trajectories")
    benchmark.add_argument("--out", type=Path, required=True, help="the HDF5 file to write; kept if it holds the same")
    systems.add_subcommand("apebench", benchmark, help="scenarios of the benchmark APEBench")
    return parser, list(known | dict.fromkeys([*_options(sphere), *_options(benchmark)]))


def _data_parser() -> Parser:
    parser = _command_parser("data")
    actions = parser.add_subcommands(dest="action")
    describe = _new_parser(description="Print sizes, units, time step, masks, gaps, conditions and the next command.")
    convert = _new_parser(description="Write trajectories in squall's layout, the one of The Well.")
    for part in (describe, convert):
        part.add_argument("path", type=Path, help="a file or folder of any known format")
        _add_reading(part)
    convert.add_argument("--out", type=Path, required=True, help="the HDF5 file to write; refused if it exists")
    actions.add_subcommand("describe", describe, help=describe.description)
    actions.add_subcommand("convert", convert, help=convert.description)
    return parser, _options(convert)


def _add_reading(parser: ArgumentParser) -> None:
    """What a file may not say of itself."""
    parser.add_argument("--dt", type=float | None, default=None, help="time between two states")
    parser.add_argument("--axes", type=str | None, default=None, help="a word per axis: 'batch time channel x y'")
    parser.add_argument("--fields", type=str, nargs="+", default=None, help="those that make the state")
    parser.add_argument("--lengths", type=float, nargs="+", default=None, help="of the domain, per axis")
    parser.add_argument("--boundary", type=str, nargs="+", default=None, help="periodic, wall or open, per axis")
    parser.add_argument("--fill", type=float | None, default=None, help="a number that means a missing value")
    parser.add_argument("--gaps", type=bool, default=False, help="NaN in The Well's layout means a missing value")


def _diagnose_parser() -> Parser:
    parser = _command_parser("diagnose")
    parser.add_argument("path", type=Path, help="a run folder, or a file or folder of any known format")
    parser.add_argument("--out", type=Path, default=Path("diagnosis"), help="a folder for the picture and the tables")
    _add_reading(parser)
    parser.add_argument("--data", type=str | None, default=None, help="where the data of a run are, if they were moved")
    parser.add_argument(
        "--trust", action="store_true", help="run the model's code, also from outside the installed packages"
    )
    return parser, _options(parser)


def _study_parser() -> Parser:
    parser = _command_parser("study")
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
    status = _new_parser(description="How far a study is.")
    report = _new_parser(description="Write tables, figures and a page into the folder's report/.")
    pack = _new_parser(description="Write results.csv and results.npz, all that the report needs, into the folder.")
    for part in (status, report, pack):
        part.add_argument("folder", type=Path, help="the folder of the study, with its runs or its pack")
    parts = {"run": run_parser, "status": status, "report": report, "pack": pack}
    for name, part in parts.items():
        actions.add_subcommand(name, part, help=part.description)
    return parser, [option for part in parts.values() for option in _options(part)]


def _train_parser() -> Parser:
    parser = _command_parser("train")
    parser.add_argument("--config", action="config", help="a YAML file with any of the keys below")
    parser.add_argument(
        "--out",
        type=Path | None,
        default=None,
        help="the run folder; named after the configuration if left out",
    )
    parser.add_argument(
        "--init", type=Path | None, default=None, help="a run folder whose weights and normalization it starts from"
    )
    parser.add_class_arguments(RunConfig)
    return parser, _options(parser)


def _evaluate_parser() -> Parser:
    parser = _command_parser("evaluate")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--integrator", type=str | None, default=None, help="another one than that of the training")
    parser.add_argument("--substeps", type=int, default=1, help="how many steps of it cover one dt")
    parser.add_argument("--steps", type=int | None, default=None, help="of a rollout; whole trajectories if left out")
    parser.add_argument("--stride", type=int | None, default=None, help="states between the starts of rollouts")
    parser.add_argument(
        "--events",
        type=float | dict[str, float],
        default=0.99,
        help="values above this quantile of the truth are events; or values by field, such as '{u: 2.5}'",
    )
    parser.add_argument(
        "--conserved",
        type=str,
        nargs="+",
        default=[],
        help="fields whose integral is conserved, or import paths of functions from states to one number each",
    )
    parser.add_argument("--netcdf", type=Path | None, default=None, help="a file for fields and scores by lead time")
    parser.add_argument(
        "--animate", type=Literal["gif", "mp4"] | None, default=None, help="draw the rollouts as animations too"
    )
    parser.add_argument("--device", type=str, default="cpu", help="where to compute, such as cuda")
    parser.add_argument("--data", type=str | None, default=None, help="where the data file is now, if it was moved")
    parser.add_argument(
        "--trust", action="store_true", help="run the model's code, also from outside the installed packages"
    )
    return parser, _options(parser)


def _compare_parser() -> Parser:
    parser = _command_parser("compare")
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        help="run folders, also of a packed study; one column for those that differ only by seed",
    )
    parser.add_argument("--checkpoint", type=Literal["best", "last"], default="best", help="which weights")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="a folder for the figure and the table")
    return parser, _options(parser)


def _predict_parser() -> Parser:
    parser = _command_parser("predict")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument(
        "--initial",
        type=Path,
        required=True,
        help="a .npy file (trajectory, channel, *space), or trajectories of any known format",
    )
    parser.add_argument(
        "--axes", type=str | None, default=None, help="a word per axis of that file, if it cannot say it: 'batch x y'"
    )
    parser.add_argument("--start", type=int, default=0, help="time index in that file of the first state that is read")
    parser.add_argument("--forcings", type=Path | None, default=None, help="a file with the conditions, if another")
    parser.add_argument("--steps", type=int, default=500, help="steps of the data's dt")
    parser.add_argument(
        "--checkpoint",
        type=Literal["best", "last"] | None,
        default=None,
        help="which weights; the best if there are",
    )
    parser.add_argument(
        "--animate", type=Literal["gif", "mp4"] | None, default=None, help="draw the rollouts as animations too"
    )
    parser.add_argument("--out", type=Path, required=True, help="the file: .hdf5, .nc or .zarr; refused if it exists")
    parser.add_argument("--data", type=str | None, default=None, help="where the data file is now, if it was moved")
    parser.add_argument(
        "--trust", action="store_true", help="run the model's code, also from outside the installed packages"
    )
    return parser, _options(parser)


def _export_parser() -> Parser:
    parser = _command_parser("export")
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--out", type=Path, required=True, help="the new folder; refused if it exists")
    parser.add_argument(
        "--checkpoint",
        type=Literal["best", "last"] | None,
        default=None,
        help="which weights; the best if there are",
    )
    parser.add_argument("--data", type=str | None, default=None, help="where the data file is now, if it was moved")
    parser.add_argument(
        "--trust", action="store_true", help="run the model's code, also from outside the installed packages"
    )
    return parser, _options(parser)


# The commands


def _simulate(arguments: Namespace, console: Console) -> int:
    name = arguments.system
    options = dict(vars(arguments[name]))
    if name == ShallowWater.name:
        return _simulate_sphere(options, console)
    if name == "apebench":
        print(write_scenario(options["scenario"], options["part"], options["out"]))
        return 0
    out, steps = options.pop("out"), options.pop("steps")
    count, seed, initial = options.pop("trajectories"), options.pop("seed"), options.pop("initial")
    system = SYSTEMS[name](**options)
    if initial is not None and (count is not None or seed is not None):
        raise ValueError("--initial gives the first states: --trajectories and --seed do not go with it")
    states = None if initial is None else _initial_states(initial, system.shape)
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


def _simulate_sphere(options: dict[str, Any], console: Console) -> int:
    out, run_options = options.pop("out"), {name: options.pop(name) for name in ("trajectories", "steps", "seed")}
    system = ShallowWater(**options)
    with progress_bar(console) as progress:
        total = run_options["trajectories"] * run_options["steps"]
        task = progress.add_task(f"simulating {system.name}", total=total, status="")
        changes = simulate_sphere_to_file(
            system, out, **run_options, progress=lambda done: progress.update(task, completed=done)
        )
    hours = run_options["steps"] * system.dt / 3600
    for quantity, values in changes.items():
        print(
            f"{quantity} changed by {np.median(values):.1e} (median), {max(values, key=abs):.1e} (most), in {hours:g} h"
        )
    print(out)
    return 0


def _initial_states(path: Path, expected: tuple[int, ...]) -> torch.Tensor:
    """States from a .npy file; one channel may be left out."""
    if special := special_file(path):
        raise ValueError(f"--initial {path} is {special}, not a file")
    try:
        states = np.load(path, allow_pickle=False)
    except (OSError, *DAMAGED_ARRAYS) as error:
        raise ValueError(
            f"--initial {path} cannot be read as an array of numbers: save one with `numpy.save`, as float64"
        ) from error
    if not isinstance(states, np.ndarray):
        raise ValueError(f"--initial {path} holds several arrays: save the one of the states with `numpy.save`")
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
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    console.quiet = not is_first()
    options = {name: value for name, value in vars(arguments).items() if name not in ("config", "out", "init")}
    config = RunConfig(**options)
    out = arguments.out or default_folder(config, arguments.init)
    keep_freed_memory()
    with progress_bar(console) as progress:
        watcher = _Watcher(progress, config)
        with handled(watcher.notice):
            result = run(config, out, watcher, init=arguments.init)
    if result is None:
        console.print(f"{out} holds the finished run: nothing to train")
    elif not result.finished:
        console.print(f"stopped and saved at step {result.step}; the same command goes on", style="yellow")
        return 128 + (watcher.received or signal.SIGINT)
    if is_first():
        print(out)
    return 0


def default_folder(config: RunConfig, init: Path | None = None) -> Path:
    """The run folder of a configuration, and of the run that it starts from, that names none."""
    config = dataclasses.replace(config, device=dataclasses.replace(config.device, devices=1))
    about = to_dict(config) | ({} if init is None else {"init": os.path.realpath(init)})
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    return Path("runs") / f"{file_name(Path(config.data.path).stem or 'data')}-{digest[:10]}"


class _Watcher(Recorder):
    """Moves the progress bar, and turns the first Ctrl-C or notice of a batch system into a checkpoint and a stop."""

    def __init__(self, progress: Progress | ProgressLines, config: RunConfig) -> None:
        self.progress, self.received = progress, 0
        self.unit = f"({config.training.residual})²"
        self.task = progress.add_task("training", total=config.training.steps, status="")

    def notice(self, number: int, _: object) -> None:
        """A signal to stop."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def stopping(self) -> bool:
        if self.received:
            self.progress.console.print("saving after this step; Ctrl-C again to stop at once", style="yellow")
        return self.received > 0

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
    from squall.evaluation import Scoring
    from squall.report import evaluation_table, write_animations, write_figures

    with console.status("rolling out"):
        (found,) = evaluate_runs(
            [arguments.run],
            method=arguments.integrator,
            count=arguments.substeps,
            device=arguments.device,
            data=arguments.data,
            trust=arguments.trust,
            steps=arguments.steps,
            stride=arguments.stride,
            scoring=Scoring(events=arguments.events, conserved=conserved_quantities(arguments.conserved)),
            netcdf=arguments.netcdf,
        )
        suffix = evaluation_suffix(arguments.integrator, arguments.substeps)
        pictures = write_figures(arguments.run, suffix)
        if arguments.animate is not None:
            pictures += write_animations(arguments.run, suffix, arguments.animate)
    results_console().print(evaluation_table(found))
    files = [arguments.netcdf] if arguments.netcdf is not None else []
    for path in (RunFolder(arguments.run).path / f"evaluation{suffix}.json", *files, *pictures):
        print(path)
    return 0


def _compare(arguments: Namespace, console: Console) -> int:
    from squall.report import compare, comparison_figure, comparison_note, comparison_table, markdown, terminal
    from squall.report.figures import save

    comparison = compare(arguments.runs, arguments.checkpoint)
    out = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    for name in ("comparison.png", "comparison.md"):
        if (out / name).exists():
            raise FileExistsError(f"{out / name} exists and is not overwritten: choose another folder by --out")
    table, note = comparison_table(comparison), comparison_note(comparison)
    results_console().print(terminal(table, note))
    print(save(comparison_figure(comparison), out / "comparison.png"))
    with write_beside(out / "comparison.md") as part:
        part.write_text(f"{markdown(table)}\n{note}\n", encoding="utf-8")
    print(out / "comparison.md")
    return 0


def _predict(arguments: Namespace, console: Console) -> int:
    from squall.runs.predict import predict_to_file, read_start

    if arguments.out.exists():
        raise FileExistsError(f"{arguments.out} exists and is not overwritten: choose another name, or move it away")
    if arguments.steps < 1:
        raise ValueError(f"--steps is {arguments.steps}, but must be at least 1")
    trained = open_run(arguments.run, arguments.data, trust=arguments.trust)
    trained.load(arguments.checkpoint)
    start = read_start(
        trained,
        arguments.initial,
        arguments.steps,
        start=arguments.start,
        axes=arguments.axes,
        forcings=arguments.forcings,
    )
    kind, pictures = arguments.animate, []
    if kind is not None:
        from squall.report import check_animation, forecast_animations

        check_animation(kind)
        forecast_animations(arguments.out, kind, trained.source.fields, len(start.window))
    with progress_bar(console) as progress:
        task = progress.add_task("predicting", total=arguments.steps, status="")
        predict_to_file(
            trained,
            start,
            arguments.steps,
            arguments.out,
            about={"run": str(arguments.run)},
            progress=lambda done: progress.update(task, completed=done),
        )
    if kind is not None:
        from squall.report import animate_forecast

        with console.status("drawing"):
            pictures = animate_forecast(arguments.out, kind)
    for path in (arguments.out, *pictures):
        print(path)
    return 0


def _export(arguments: Namespace, console: Console) -> int:
    with console.status("exporting"):
        exported = export_run(
            arguments.run,
            arguments.out,
            checkpoint=arguments.checkpoint,
            data=arguments.data,
            trust=arguments.trust,
        )
    if exported.refusal:
        _say(console, f"warning: the weights are written, but no {PROGRAM}: {exported.refusal}", "yellow")
    print(exported.path)
    return 0


def _data(arguments: Namespace, console: Console) -> int:
    from squall.data.summary import next_command

    action = arguments.action
    options = dict(vars(arguments[action]))
    path, out = options.pop("path"), options.pop("out", None)
    told = _reading(options)
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


def _reading(options: Mapping[str, Any]) -> dict[str, Any]:
    """What was told of a file, one value instead of a list of one where all axes share it."""
    told = {name: value for name, value in options.items() if value}
    for name in ("lengths", "boundary"):
        if len(told.get(name, ())) == 1:
            (told[name],) = told[name]
    return told


def _diagnose(arguments: Namespace, console: Console) -> int:
    from squall.evaluation.diagnosis import change
    from squall.report import diagnosis, markdown, terminal
    from squall.report.figures import save
    from squall.runs.diagnose import diagnose_run

    options = dict(vars(arguments))
    path, out, data, trust = (options.pop(name) for name in ("path", "out", "data", "trust"))
    for name in ("diagnosis.png", "diagnosis.md"):
        if (out / name).exists():
            raise FileExistsError(f"{out / name} exists and is not overwritten: choose another folder by --out")
    told = _reading(options)
    found = None
    if (path / "config.yaml").exists():
        if told:
            raise ValueError(f"--{next(iter(told))} is for a data file, but {path} is a run folder")
        with console.status("diagnosing"):
            found = diagnose_run(path, data, trust=trust)
        source, rows = found.source, {"squared change": found.change, "squared error": found.errors}
    else:
        if data or trust:
            raise ValueError(f"--data and --trust are for a run folder, but {path} has no config.yaml")
        source = squall.data.open(path, **told)
        with console.status("reading"):
            rows = {"squared change": change(source)}
    tables = [diagnosis.diagnosis_table(x, f"Shares of the {name}, {source.name}") for name, x in rows.items()]
    text = diagnosis.advice_text(rows["squared change"], found and found.predicts)
    if found is not None:
        tables += [diagnosis.weights_table(found.weights)] if found.weights else []
        text += "\n" + diagnosis.worst_text(found)
    for table in tables:
        results_console().print(terminal(table))
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    print(save(diagnosis.diagnosis_figure(rows, source), out / "diagnosis.png"))
    with write_beside(out / "diagnosis.md") as part:
        part.write_text("\n".join([*map(markdown, tables), "```", text, "```", ""]), encoding="utf-8")
    print(out / "diagnosis.md")
    return 0


def _study(arguments: Namespace, console: Console) -> int:
    from squall.study.results import pack_study, read_results

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
    from squall.study.results import read_results
    from squall.study.runner import run_study

    study = read_study(options.study)
    out = options.out or Path("studies") / file_name(study.name)
    _refuse_elsewhere(options)
    if options.on == "slurm":
        return _submit_study(options, study, out)
    on = None
    if options.on == "ray":
        on = functools.partial(ray_workers, address=options.address, resources=options.resources)
    try:
        with told(console, f"study {study.name}, {len(study.trials)} trials") as progress:
            failed = run_study(
                study,
                out,
                workers=options.workers,
                together=options.together,
                part=_part(options.part),
                grids=options.grids,
                progress=progress,
                on=on,
            )
    except KeyboardInterrupt:
        console.print("stopping: trainings are saved at their step; the same command goes on", style="yellow")
        raise
    for trial in failed:
        _say(console, f"{trial.name}: the training diverged; kept as a result", "yellow")
    print(status_table(read_results(out)))
    print(out)
    return 0


def _refuse_elsewhere(options: Namespace) -> None:
    """What is given is for where the study runs."""
    given = {
        "address": (options.address is not None, ("ray",)),
        "resources": (bool(options.resources), ("ray", "slurm")),
        "jobs": (options.jobs != 1, ("slurm",)),
        "dry-run": (options.dry_run, ("slurm",)),
    }
    for name, (is_given, places) in given.items():
        if is_given and options.on not in places:
            raise ValueError(f"--{name} is for --on {' and --on '.join(places)}, and must be left out otherwise")
    if options.jobs < 1:
        raise ValueError(f"--jobs is {options.jobs}, but must be at least 1")


def _submit_study(options: Namespace, study: Study, out: Path) -> int:
    """Give SLURM jobs that each run the study's command, on the folder that they share."""
    from squall.study.folder import StudyFolder
    from squall.study.on_slurm import job_script, submit
    from squall.study.runner import part_of

    part_of(study.trials if options.grids is None else study.trials_of(options.grids), _part(options.part))
    StudyFolder(out).refuse_other(study)
    workers = str(options.workers or 1)
    definition = options.study if options.study in PRESETS else str(Path(options.study).absolute())
    words = ["study", "run", definition, "--out", str(out.absolute()), "--workers", workers]
    words += ["--together", str(options.together), "--part", options.part]
    words += ["--grids", *options.grids] if options.grids else []
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


PARSERS: dict[str, Callable[[], Parser]] = {
    "simulate": _simulate_parser,
    "train": _train_parser,
    "evaluate": _evaluate_parser,
    "compare": _compare_parser,
    "predict": _predict_parser,
    "export": _export_parser,
    "data": _data_parser,
    "diagnose": _diagnose_parser,
    "study": _study_parser,
}
RUN: dict[str, Callable[[Namespace, Console], int]] = {
    "simulate": _simulate,
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "predict": _predict,
    "export": _export,
    "data": _data,
    "diagnose": _diagnose,
    "study": _study,
}
