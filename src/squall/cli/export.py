"""`squall export`: a trained model as a folder for others."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from squall._process.console import say
from squall.cli.options import add_run, add_weights, command_parser
from squall.runs.emulator import PROGRAM
from squall.runs.export import export_run


def parser() -> ArgumentParser:
    parser = command_parser("export")
    add_run(parser)
    parser.add_argument("--out", type=Path, required=True, help="the new folder; refused if it exists")
    add_weights(parser)
    return parser


def run(arguments: Namespace, console: Console) -> int:
    with console.status("exporting"):
        exported = export_run(
            arguments.run, arguments.out, checkpoint=arguments.checkpoint, data=arguments.data, trust=arguments.trust
        )
    if exported.refusal:
        say(console, f"warning: the weights are written, but no {PROGRAM}: {exported.refusal}", "yellow")
    print(exported.path)
    return 0
