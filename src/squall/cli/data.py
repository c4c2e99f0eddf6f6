"""`squall data`: describe a file of any known format, or write it in squall's layout."""

import shlex
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

import squall.data
from squall.cli.options import add_reading, command_parser, new_parser, reading
from squall.data.summary import next_command


def parser() -> ArgumentParser:
    parser = command_parser("data")
    actions = parser.add_subcommands(dest="action")
    describe = new_parser(description="Print sizes, units, time step, masks, gaps, conditions and the next command.")
    convert = new_parser(description="Write trajectories in squall's layout, the one of The Well.")
    for part in (describe, convert):
        part.add_argument("path", type=Path, help="a file or folder of any known format")
        add_reading(part)
    convert.add_argument("--out", type=Path, required=True, help="the HDF5 file to write; refused if it exists")
    actions.add_subcommand("describe", describe, help=describe.description)
    actions.add_subcommand("convert", convert, help=convert.description)
    return parser


def run(arguments: Namespace, console: Console) -> int:
    action = arguments.action
    options = dict(vars(arguments[action]))
    path, out = options.pop("path"), options.pop("out", None)
    given = reading(options)
    source = squall.data.open(path, **given)
    if action == "convert":
        with console.status("writing"):
            print(squall.data.convert(source, out))
        return 0
    words = [
        f" --{n} {shlex.join(map(str, v)) if isinstance(v, list) else shlex.quote(str(v))}" for n, v in given.items()
    ]
    print(squall.data.summary(source))
    print(f"{'next':<11} {next_command(path, source, ''.join(words))}")
    return 0
