"""`squall train`: one training; the same command resumes it."""

import dataclasses
import hashlib
import itertools
import json
import logging
import os
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import Progress

from squall._process.documents import DocumentError, load_yaml
from squall._process.names import file_name
from squall._process.progress import ProgressLines, progress_bar
from squall._process.signals import handled
from squall._process.threads import keep_freed_memory
from squall.cli.options import command_parser
from squall.runs.config import (
    GROUPS,
    ConfigError,
    LossConfig,
    RunConfig,
    refuse_base_60,
    refuse_file_as_group,
    refuse_null,
    to_dict,
)
from squall.runs.ranks import is_first
from squall.runs.train import run as train
from squall.training.loop import Recorder

NEXT_STATE = (
    "model.predicts is 'state': no loss is shown to beat MSE for such models, and the default loss is often worse. "
    "Compare with --loss.name mse, or try --loss.kl_budget 1 --loss.budget_cap 3"
)


def parser() -> ArgumentParser:
    parser = command_parser("train", _TrainParser)
    parser.add_argument("--config", action="config", help="a YAML file with any of the keys below")
    parser.add_argument(
        "--out", type=Path | None, default=None, help="the run folder; named after the configuration if left out"
    )
    parser.add_argument(
        "--init", type=Path | None, default=None, help="a run folder whose weights and normalization it starts from"
    )
    parser.add_class_arguments(RunConfig)
    return parser


def run(arguments: Namespace, console: Console) -> int:
    from lightning_fabric.utilities.warnings import PossibleUserWarning

    warnings.simplefilter("ignore", PossibleUserWarning)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    console.quiet = not is_first()
    options = {name: value for name, value in vars(arguments).items() if name not in ("config", "out", "init")}
    config = RunConfig(**options)
    out = arguments.out or default_folder(config, arguments.init)
    if config.model.predicts == "state" and config.loss == LossConfig():
        console.print(NEXT_STATE, style="yellow")
    keep_freed_memory()
    with progress_bar(console) as progress:
        watcher = _Watcher(progress, config)
        with handled(watcher.notice):
            result = train(config, out, watcher, init=arguments.init)
    if result is None:
        console.print(f"{out} holds the finished run: nothing to train")
    elif not result.finished:
        console.print(f"stopped and saved at step {result.step}; the same command resumes it", style="yellow")
        return 128 + (watcher.received or signal.SIGINT)
    if is_first():
        print(out)
    return 0


def default_folder(config: RunConfig, init: Path | None = None) -> Path:
    """The run folder of a configuration, and of the run that it starts from, that names none."""
    config = dataclasses.replace(config, device=dataclasses.replace(config.device, devices=1))
    about = to_dict(config) | ({} if init is None else {"init": os.path.realpath(init)})
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
    name = file_name(Path(config.data.path).stem or "data")
    return Path("runs") / f"{name}-{digest[:10]}"  # 40 bits: two of 10 000 runs meet with a chance of 5e-5


class _TrainParser(ArgumentParser):
    """Parses the words of a training: what jsonargparse lets pass or takes for a fault of its own is refused."""

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Namespace:
        words = _specific_last(_data_as_path(_apart(args or ())))
        _check_files(words, self)
        parsed = super().parse_args(words, *rest, **options)
        refuse_null(parsed)
        return parsed


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


def _check_files(words: Sequence[str], parser: ArgumentParser) -> None:
    """The parser waits for pipes, and takes a configuration that is empty or no mapping for a fault of its own."""
    for flag, path in itertools.pairwise(words):
        if (flag == "--config" or flag.removeprefix("--") in GROUPS) and os.path.exists(path):
            try:
                values = load_yaml(path)
            except DocumentError as error:
                raise ConfigError(f"the configuration {error}") from error
            if not isinstance(values, dict):
                raise ConfigError(f"the configuration {path} holds {values!r}, but must hold keys such as 'data:'")
            if flag == "--config":
                refuse_file_as_group(values)
            refuse_base_60(values if flag == "--config" else {flag.removeprefix("--"): values}, [parser])


def _apart(words: Sequence[str]) -> list[str]:
    """The options that take a file of keys, apart from their values.

    >>> _apart(["--config=c.yaml", "--training.steps=3"])
    ['--config', 'c.yaml', '--training.steps=3']
    """
    flags = tuple(f"--{name}=" for name in ("config", *GROUPS))
    return [part for word in words for part in (word.split("=", 1) if word.startswith(flags) else [word])]


def _data_as_path(words: Sequence[str]) -> list[str]:
    """`--data FILE` is `--data.path FILE`, unless FILE holds keys of `data`.

    >>> _data_as_path(["--data", "storms.nc"]), _data_as_path(["--data", "part.yaml"])
    (['--data.path', 'storms.nc'], ['--data', 'part.yaml'])
    """
    words = list(words)
    for i, value in enumerate(words[1:]):
        holds_keys = value.lstrip().startswith("{") or Path(value).suffix.lower() in (".yaml", ".yml", ".json")
        if words[i] == "--data" and not holds_keys:
            words[i] = "--data.path"
    return words


def _specific_last(words: Sequence[str]) -> list[str]:
    """The options from the general to the specific: a single key wins over a file wherever it stands.

    >>> _specific_last(["--training.steps", "3", "--config", "c.yaml"])
    ['--config', 'c.yaml', '--training.steps', '3']
    """
    options: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            options.append([word])
        else:
            options[-1].append(word)
    options[1:] = sorted(options[1:], key=lambda option: (option[0] != "--config", option[0].split("=")[0].count(".")))
    return list(itertools.chain.from_iterable(options))
