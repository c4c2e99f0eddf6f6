"""Tables for the terminal and for Markdown."""

from typing import Any

from rich.table import Table

from squall.report.comparison import Comparison, Group, Spread, metrics
from squall.study.results import Place

__all__ = ["comparison_table", "evaluation_table", "markdown", "number"]


def number(value: float | None, missing: str = "diverged") -> str:
    """Three digits; a missing number is said, not left out."""
    if value is None:
        return missing
    if isinstance(value, int):
        return str(value)
    rounded = float(f"{value:.3g}")
    return f"{rounded:g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{rounded:.2e}"


def evaluation_table(found: dict[str, Any]) -> Table:
    """What `evaluation.json` holds: one column per checkpoint, and what costs nothing."""
    columns = {f"{kind} (step {item['step']})": item for kind, item in found["checkpoints"].items()}
    baselines = next(iter(columns.values()))["baselines"]
    seconds = found["dt"] * found["steps"]
    count = next(iter(columns.values()))["rollout"]["trajectories"]
    table = Table(
        title=f"{count} test trajectories, {found['steps']} steps by {found['integrator']} to t = {seconds:g}",
        caption=f"mean squared errors; one step: {_unit(found['standardized'])}; smaller is better",
    )
    table.add_column("")
    for name in (*columns, *baselines):
        table.add_column(name, justify="right")
    for label, path in metrics(found["fields"]).items():
        cells = [_cell(item, path) for item in columns.values()] + [
            _cell(item, path[1:]) for item in baselines.values()
        ]
        if any(cell for cell in cells):
            table.add_row(label, *cells)
    return table


def _missing(place: Place) -> str:
    """What it means that there is no number."""
    return "not found" if place[:1] == ("growth",) else "diverged"


def _cell(values: Any, path: Place) -> str:
    missing = _missing(path)
    for name in path:
        if not isinstance(values, dict) or name not in values:
            return ""
        values = values[name]
    return number(values, missing)


def comparison_table(comparison: Comparison) -> Table:
    """One column per group, median [smallest, largest] over its seeds; the best median in bold."""
    table = Table(
        title=f"{_weights(comparison)}:\nmedian \\[smallest, largest] over seeds",
        caption=f"Mean squared errors; one step: {_unit(comparison.standardized)}.\n"
        "Smaller is better, the best in bold.\n"
        + "\n".join(_free(name, values) for name, values in comparison.baselines.items()),
    )
    table.add_column("", no_wrap=True)
    for group in comparison.groups:
        table.add_column(f"{group.label}\n{_seeds(group)}", justify="right")
    for row in _rows(comparison):
        table.add_row(*row)
    return table


def _unit(standardized: bool) -> str:
    unit = ", each field in units of its standard deviation" if standardized else ""
    return f"of the rate (u' − u)/dt{unit}"


def _free(name: str, values: dict[str, float]) -> str:
    """What a prediction that costs nothing reaches, in words."""
    errors = ", ".join(f"{metric} {number(values[metric])}" for metric in ("states", "energy") if metric in values)
    return f"For nothing, by {name}: {errors}."


def markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table."""
    names = [f"{group.label} ({_seeds(group)})" for group in comparison.groups]
    rows = [[_unmarked(cell) for cell in row] for row in _rows(comparison)]
    lines = [["", *names], ["---"] * (1 + len(names)), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([table, *(_free(name, values) for name, values in comparison.baselines.items())]) + "\n"


def _unmarked(cell: str) -> str:
    """Rich's markup as Markdown."""
    return cell.replace("[bold]", "**").replace("[/bold]", "**").replace("\\[", "[")


def _weights(comparison: Comparison) -> str:
    """Which weights are compared, in words."""
    return {"best": "weights that roll out best on the validation trajectories", "last": "last weights"}[
        comparison.checkpoint
    ]


def _seeds(group: Group) -> str:
    return "1 seed" if len(group.seeds) == 1 else f"{len(group.seeds)} seeds"


def _rows(comparison: Comparison) -> list[list[str]]:
    rows = []
    for label in comparison.places:
        spreads = [group.spread(label) for group in comparison.groups]
        if not any(spreads):
            continue
        medians = [spread.median for spread in spreads if spread is not None and spread.median is not None]
        best = min(medians, default=None) if len(set(medians)) > 1 else None
        missing = _missing(comparison.places[label])
        cells = [_spread_cell(spread, best, missing) for spread in spreads]
        rows.append([label, *cells])
    return rows


def _spread_cell(spread: Spread | None, best: float | None, missing: str) -> str:
    if spread is None:
        return ""
    median = number(spread.median, missing)
    if best is not None and spread.median == best:
        median = f"[bold]{median}[/bold]"
    low, high = spread.range
    if low == high:
        return median
    return f"{median} \\[{number(low, missing)}, {number(high, missing)}]"
