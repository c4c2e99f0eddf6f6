"""The results of a study in two files that last: `results.csv` and `results.npz`, beside its `study.yaml`.

`results.csv` has one row per run, checkpoint and integrator: what a person reads and a diff shows. `results.npz` has
all that the report needs: numbers to the last digit, curves to four. It is a zip archive, which `numpy.load` opens as
well:

    runs.json    one entry per run: state, configuration, environment, evaluations, history of the validations. A list
                 of numbers is replaced by {"column": name}: it is that array's row at the run's position. `arrays`
                 names the arrays with the fields and the stiffness indices that the figures show
    *.npy        these columns (NaN pads a shorter row, inf is a number that became NaN or infinite), and the arrays
"""

import csv
import functools
import hashlib
import io
import itertools
import json
import lzma
import math
import zipfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Shaped

from squall._process.files import DAMAGED_ARRAYS, write_beside
from squall.runs.folder import SAMPLING, RunFolderError
from squall.study.outcome import FIELDS, Outcome, metrics

TABLE, PACK = "results.csv", "results.npz"

FORMAT = "squall study results 1"
"""Of runs.json."""

DIGITS = 6
"""Digits that numbers are kept to; single precision holds as many."""

CURVE_BITS = 14
"""Bits of the curves, which are drawn only: four digits. The zeros behind them halve a pack."""

SAVED = ("name", "seed", "state", "config", "evaluations", "history", "environment", "failure")
"""What of an outcome is packed, by attribute."""

WITH_LISTS = ("evaluations", "history")
"""Their lists of numbers become columns of arrays."""

Columns = Callable[[str], np.ndarray]


def write_pack(
    folder: Path, study: str, labels: Mapping[str, str], outcomes: Sequence[Outcome], shown: Collection[str]
) -> list[Path]:
    """Write the pack of a study into its folder; both files are complete before the old ones are replaced.

    Args:
        folder, study: the study's folder and name.
        labels: by the name of each run.
        outcomes: its runs.
        shown: the names of the runs whose fields and stiffness indices are kept.

    Raises:
        RunFolderError: if the folder holds the pack of another study or of runs that are not among these, or a
            `results.csv` without a pack.
    """
    there = {name for name, outcome in read_pack(folder, study).items() if outcome.state != "missing"}
    lost = sorted(there - {outcome.name for outcome in outcomes})
    if lost:
        raise RunFolderError(
            f"{folder / PACK} holds {len(lost)} runs that study.yaml does not ask for, such as {lost[0]}: ask for them "
            "again, or move the pack away"
        )
    if (folder / TABLE).exists() and not (folder / PACK).exists():
        raise RunFolderError(f"{folder / TABLE} exists and is not of a pack: move it, then pack again")
    columns: dict[str, dict[int, list[Any]]] = {}
    arrays: dict[str, np.ndarray] = {}
    digests: dict[str, str] = {}
    runs = []
    for row, outcome in enumerate(outcomes):
        run: dict[str, Any] = {key: getattr(outcome, key) for key in SAVED}
        for key in WITH_LISTS:
            run[key] = _without_lists(run[key], (key,), columns, row)
        for file in (FIELDS, SAMPLING) if outcome.name in shown else ():
            for key, array in (outcome.arrays(file) or {}).items():
                digest = hashlib.sha256(array.tobytes() + f"{array.dtype}{array.shape}".encode()).hexdigest()
                name = digests.setdefault(digest, f"{Path(file).stem}/{outcome.name}/{key}")
                arrays[name] = array
                run.setdefault("arrays", {}).setdefault(file, {})[key] = name
        runs.append(run)
    arrays |= {name: _column(name, rows, len(outcomes)) for name, rows in columns.items()}
    about = {"format": FORMAT, "study": study, "runs": runs}
    with write_beside(folder / TABLE) as table, write_beside(folder / PACK) as pack:
        table.write_text(csv_table(labels, outcomes), encoding="utf-8")
        with zipfile.ZipFile(pack, "w") as archive:
            archive.writestr(_member("runs.json"), json.dumps(about, indent=1, ensure_ascii=False))
            for name, array in arrays.items():
                with archive.open(_member(f"{name}.npy"), "w") as file:
                    np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
    return [folder / TABLE, folder / PACK]


def _member(name: str) -> zipfile.ZipInfo:
    """Without the time of day: the same results are the same bytes."""
    member = zipfile.ZipInfo(name)
    member.compress_type = zipfile.ZIP_LZMA  # slow and small: a pack is written once, and committed
    return member


def _without_lists(values: Any, path: tuple[str, ...], columns: dict[str, dict[int, list[Any]]], row: int) -> Any:
    """The values with every list of numbers moved to its column; lists of lists, such as energies of single
    trajectories, are left out."""
    if isinstance(values, Mapping):
        kept = {key: _without_lists(value, (*path, key), columns, row) for key, value in values.items()}
        return {key: value for key, value in kept.items() if value is not Ellipsis}
    if isinstance(values, list) and values:
        if isinstance(values[0], list):
            return ...
        if all(x is None or isinstance(x, int | float) for x in values):
            name = "/".join(part for part in path if part not in ("", "evaluations", "checkpoints"))
            columns.setdefault(name, {})[row] = values
            return {"column": name}
    return values


def _column(name: str, rows: Mapping[int, list[Any]], count: int) -> Float[np.ndarray, "run n"]:
    """Lists of numbers as the rows of one array; in single precision where that loses nothing."""
    column = np.full((count, max(map(len, rows.values()))), np.nan)
    for row, values in rows.items():
        column[row, : len(values)] = [math.inf if x is None else x for x in values]
    if "/curves/" in name and not name.endswith("/time"):
        mantissa, exponent = np.frexp(column)
        column = np.ldexp(np.round(mantissa * 2**CURVE_BITS), exponent - CURVE_BITS)
    with np.errstate(over="ignore"):
        single = column.astype(np.float32)
    return single if any(np.array_equal(x, column, equal_nan=True) for x in (single, _rounded(single))) else column


def _rounded(column: Float[np.ndarray, "run n"]) -> Float64[np.ndarray, "run n"]:
    """What a stored column stands for."""
    if column.dtype == np.float64:
        return column
    return np.array([float(f"{x:.{DIGITS}g}") for x in column.ravel().tolist()]).reshape(column.shape)


def read_pack(folder: Path, study: str) -> dict[str, Outcome]:
    """The runs of a study's pack by name; none without a pack.

    Raises:
        RunFolderError: if the pack is damaged, or of another study.
    """
    path = folder / PACK
    if not path.exists():
        return {}
    try:
        with path.open("rb") as source, np.load(source, allow_pickle=False) as file:
            about = json.loads(file["runs.json"])
            arrays = {name: file[name] for name in file.files if name != "runs.json"}
        if about["format"] != FORMAT:
            raise RunFolderError(f"{path} has the format '{about['format']}', but this squall reads '{FORMAT}'")
        columns = functools.cache(lambda name: _rounded(arrays[name]))
        if about["study"] != study:
            raise RunFolderError(f"{path} is the pack of the study '{about['study']}', not of '{study}': move it away")
        return {run["name"]: _outcome(run, i, columns, arrays) for i, run in enumerate(about["runs"])}
    except (OSError, lzma.LZMAError, *DAMAGED_ARRAYS) as error:
        if isinstance(error, RunFolderError):
            raise
        raise RunFolderError(f"{path} is damaged ({error}): take it from a copy, or pack the runs anew") from error


def _outcome(
    run: dict[str, Any], row: int, columns: Columns, arrays: Mapping[str, Shaped[np.ndarray, "..."]]
) -> Outcome:
    kept = {file: {key: arrays[name] for key, name in names.items()} for file, names in run.pop("arrays", {}).items()}
    return Outcome(**_with_lists(run, columns, row), arrays=kept.get)


def _with_lists(values: Any, columns: Columns, row: int) -> Any:
    if not isinstance(values, dict):
        return values
    if values.keys() == {"column"}:
        return [None if x == math.inf else x for x in columns(values["column"])[row].tolist() if not math.isnan(x)]
    return {key: _with_lists(value, columns, row) for key, value in values.items()}


def csv_table(labels: Mapping[str, str], outcomes: Sequence[Outcome]) -> str:
    """One row per run, checkpoint and integrator, numbers to six digits; `inf` became NaN or infinite."""
    known = [outcome.evaluations.get("", {}).get("fields", ["u"]) for outcome in outcomes]
    places = metrics(list(dict.fromkeys(itertools.chain.from_iterable(known))))
    head = ["run", "labels", "seed", "state", "checkpoint", "step", "integrator", "commit", "versions", "data sha256"]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*head, "failure", *map(_data, places)])
    for outcome in outcomes:
        about = outcome.environment
        versions = "; ".join(f"{name} {version}" for name, version in about.get("versions", {}).items() if version)
        source = [about.get("commit") or "", versions, about.get("data", {}).get("sha256", "")]
        pairs = [(kind, name) for name, evaluation in outcome.evaluations.items() for kind in evaluation["checkpoints"]]
        for kind, integrator in pairs or [("last", "")]:
            item = outcome.checkpoint(kind, integrator)
            method = outcome.evaluations.get(integrator, {}).get("integrator", integrator)
            words = [outcome.name, labels[outcome.name], outcome.seed, outcome.state]
            words += [kind, item["step"], method] if item else ["", "", ""]
            words += [*source, outcome.failure.get("message", "")]
            numbers = [outcome.value(place, kind, integrator) for place in places.values()]
            writer.writerow([*map(_data, words), *("" if x is None else f"{x:.6g}" for x in numbers)])
    return text.getvalue()


def _data(value: Any) -> str:
    """A cell that a spreadsheet takes for text, not for a formula."""
    text = str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
