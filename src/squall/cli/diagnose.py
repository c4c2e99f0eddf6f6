"""`squall diagnose`: how uneven data, or the errors of a run, are."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

import squall.data
from squall._process.console import results_console
from squall._process.files import refuse_existing, write_text
from squall.cli.options import add_reading, add_trust, command_parser, reading
from squall.evaluation.diagnosis import change
from squall.report import diagnosis, markdown, terminal
from squall.report.figures import save
from squall.runs.diagnose import diagnose_run


def parser() -> ArgumentParser:
    parser = command_parser("diagnose")
    parser.add_argument("path", type=Path, help="a run folder, or a file or folder of any known format")
    parser.add_argument("--out", type=Path, default=Path("diagnosis"), help="a folder for the picture and the tables")
    add_reading(parser)
    parser.add_argument("--data", type=str | None, default=None, help="where the data of a run are, if they were moved")
    add_trust(parser)
    return parser


def run(arguments: Namespace, console: Console) -> int:
    options = dict(vars(arguments))
    path, out, data, trust = (options.pop(name) for name in ("path", "out", "data", "trust"))
    for name in ("diagnosis.png", "diagnosis.md"):
        refuse_existing(out / name, "another folder by --out")
    given = reading(options)
    trained = None
    if (path / "config.yaml").exists():
        if given:
            raise ValueError(f"--{next(iter(given))} is for a data file, but {path} is a run folder")
        with console.status("diagnosing"):
            trained = diagnose_run(path, data, trust=trust)
        source, rows = trained.source, {"squared change": trained.change, "squared error": trained.errors}
    else:
        if data or trust:
            raise ValueError(f"--data and --trust are for a run folder, but {path} has no config.yaml")
        source = squall.data.open(path, **given)
        with console.status("reading"):
            rows = {"squared change": change(source)}
    tables = [diagnosis.diagnosis_table(x, f"Shares of the {name}, {source.name}") for name, x in rows.items()]
    text = diagnosis.advice_text(rows["squared change"], trained and trained.predicts)
    if trained is not None:
        tables += [diagnosis.weights_table(trained.weights)] if trained.weights else []
        text += "\n" + diagnosis.worst_text(trained)
    for table in tables:
        results_console().print(terminal(table))
    print(text)
    print(save(diagnosis.diagnosis_figure(rows, source), out / "diagnosis.png"))
    print(write_text(out / "diagnosis.md", "\n".join([*map(markdown, tables), "```", text, "```", ""])))
    return 0
