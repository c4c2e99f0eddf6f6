"""Tables for the terminal and for Markdown."""

from typing import Any

from rich.table import Table

from squall.report.comparison import METRICS, Comparison, Group, Spread

__all__ = ["comparison_table", "evaluation_table", "markdown", "number"]


def number(value: float | None) -> str:
    """Three digits; a missing number is said, not left out."""
    if value is None:
        return "diverged"
    if isinstance(value, int):
        return str(value)
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def evaluation_table(found: dict[str, Any]) -> Table:
    """What `evaluation.json` holds: one column per checkpoint, and what costs nothing."""
    columns = {f"{kind} (step {item['step']})": item for kind, item in found["checkpoints"].items()}
    baselines = next(iter(columns.values()))["baselines"]
    seconds = found["dt"] * found["steps"]
    count = next(iter(columns.values()))["rollout"]["trajectories"]
    table = Table(
        title=f"{count} test trajectories, {found['steps']} steps by {found['integrator']} to t = {seconds:g}",
        caption="mean squared errors; one step: of the rate (u' − u)/dt; smaller is better",
    )
    table.add_column("")
    for name in (*columns, *baselines):
        table.add_column(name, justify="right")
    for label, path in METRICS.items():
        cells = [_cell(item, path) for item in columns.values()] + [
            _cell(item, path[1:]) for item in baselines.values()
        ]
        if any(cell for cell in cells):
            table.add_row(label, *cells)
    return table


def _cell(values: Any, path: tuple[str, ...]) -> str:
    for name in path:
        if not isinstance(values, dict) or name not in values:
            return ""
        values = values[name]
    return number(values)


def comparison_table(comparison: Comparison) -> Table:
    """One column per group, median [smallest, largest] over its seeds; the best median in bold."""
    table = Table(
        title=f"{_weights(comparison)}: median \\[smallest, largest] over seeds",
        caption="mean squared errors; one step: of the rate (u' − u)/dt; smaller is better, the best in bold",
    )
    table.add_column("")
    for group in comparison.groups:
        table.add_column(f"{group.label}\n{_seeds(group)}", justify="right")
    for name in comparison.baselines:
        table.add_column(name, justify="right")
    for row in _rows(comparison):
        table.add_row(*row)
    return table


def markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown table."""
    names = [f"{group.label} ({_seeds(group)})" for group in comparison.groups]
    lines = [["", *names, *comparison.baselines], ["---"] * (1 + len(names) + len(comparison.baselines))]
    lines += [
        [cell.replace("[bold]", "**").replace("[/bold]", "**").replace("\\[", "[") for cell in row]
        for row in _rows(comparison)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _weights(comparison: Comparison) -> str:
    """Which weights are compared, in words."""
    return {"best": "weights that roll out best on the validation trajectories", "last": "last weights"}[
        comparison.checkpoint
    ]


def _seeds(group: Group) -> str:
    return "1 seed" if len(group.seeds) == 1 else f"{len(group.seeds)} seeds"


def _rows(comparison: Comparison) -> list[list[str]]:
    rows = []
    for label, path in METRICS.items():
        spreads = [group.spread(label) for group in comparison.groups]
        if not any(spreads):
            continue
        medians = [spread.median for spread in spreads if spread is not None and spread.median is not None]
        best = min(medians, default=None) if len(set(medians)) > 1 else None
        cells = [_spread_cell(spread, best) for spread in spreads]
        baselines = [
            _cell(values, path[1:]) if path[0] == "rollout" else "" for values in comparison.baselines.values()
        ]
        rows.append([label, *cells, *baselines])
    return rows


def _spread_cell(spread: Spread | None, best: float | None) -> str:
    if spread is None:
        return ""
    median = number(spread.median)
    if best is not None and spread.median == best:
        median = f"[bold]{median}[/bold]"
    if len(spread.values) == 1:
        return median
    low, high = spread.range
    return f"{median} \\[{number(low)}, {number(high)}]"
