"""`squall compare`: one table and one figure for several evaluated runs."""

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from squall._process.console import results_console
from squall._process.files import refuse_existing, write_text
from squall.cli.options import command_parser
from squall.report import compare, comparison_figure, comparison_note, comparison_table, markdown, terminal
from squall.report.figures import save


def parser() -> ArgumentParser:
    parser = command_parser("compare")
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        help="run folders, also of a packed study; one column for those that differ only by seed",
    )
    parser.add_argument("--checkpoint", type=Literal["best", "last"], default="best", help="which weights")
    parser.add_argument("--out", type=Path, default=Path("comparison"), help="a folder for the figure and the table")
    return parser


def run(arguments: Namespace, console: Console) -> int:
    comparison = compare(arguments.runs, arguments.checkpoint)
    out = arguments.out
    for name in ("comparison.png", "comparison.md"):
        refuse_existing(out / name, "another folder by --out")
    table, note = comparison_table(comparison), comparison_note(comparison)
    results_console().print(terminal(table, note))
    print(save(comparison_figure(comparison), out / "comparison.png"))
    print(write_text(out / "comparison.md", f"{markdown(table)}\n{note}\n"))
    return 0
