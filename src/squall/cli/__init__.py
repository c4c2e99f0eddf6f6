"""The `squall` command. What it prints about itself needs no extra and no PyTorch; a command imports what it needs."""

import sys
from collections.abc import Sequence

import squall
from squall._process.console import with_safe_output
from squall._process.extras import MissingExtraError, explain_missing_extra
from squall._process.messages import suggestion
from squall._process.startup import imports_uncollected

__all__ = ["COMMANDS", "USER_MISTAKE", "main"]

USER_MISTAKE = 2
"""The exit code of argparse for the same."""

COMMANDS = {
    "simulate": "Simulate a system into an HDF5 file in The Well's layout; storms on a sphere into NetCDF.",
    "diagnose": "How uneven the data, or the errors of a run, are, and whether weighting is likely to help.",
    "train": "Train a model; the same command resumes an interrupted training.",
    "evaluate": "Roll out the test trajectories, write evaluation.json and figures, print a table.",
    "compare": "One table and one figure for several evaluated runs.",
    "predict": "Roll out a trained model from your own initial states.",
    "export": "Write a trained model into a folder for others: weights, a program, a model card.",
    "data": "Describe a data file of any known format, or write it in squall's layout.",
    "study": "Run a grid of trainings, show its progress, report and pack its results.",
}


@with_safe_output
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 2 after a mistake of the user's, 130 after an interrupt."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["--version"]:
        print(f"squall {squall.__version__}")
        return 0
    if words[:1] in (["-h"], ["--help"]):
        print(_usage())
        return 0
    try:
        if not words:
            raise ValueError(f"no command is given\n\n{_usage()}")
        if words[0] not in COMMANDS:
            raise ValueError(f"unknown command '{words[0]}': {suggestion(words[0], COMMANDS)}")
        with explain_missing_extra():
            with imports_uncollected():
                from squall.cli.execute import execute

            return execute(words)
    except (MissingExtraError, ValueError) as error:
        print(f"squall: {error}", file=sys.stderr)
        return USER_MISTAKE


def _usage() -> str:
    commands = "\n".join(f"  {name:10}{description}" for name, description in COMMANDS.items())
    usage = "usage: squall [-h] [--version] COMMAND ..."
    return f"{usage}\n\n{squall.__doc__}\n\n{commands}\n\nThe options of a command: squall COMMAND --help"
