"""What a study says of losses: ranks, mean against tail, arms, steps saved and spectra, as tables and figures.

Each takes a grid whose choice, if it has one, is made. Losses are the labels of the axis that has the baseline; what
the other labels name is a setting. Errors are of the last weights unless a metric says otherwise.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from squall._process.messages import counted
from squall.evaluation.scores import BANDS
from squall.report.figures import COLOURS, grid_of_panels, legend_below, title_above, with_intervals
from squall.report.tables import RATIOS, Cell, Line, Table, in_words, number, ratio_cell
from squall.runs.config import flat
from squall.study.outcome import Metric
from squall.study.results import GridResults, Row
from squall.study.statistics import Ranks, Ratio, Summary, mean_ranks, paired_ratio, summarize

__all__ = [
    "arms_figure",
    "arms_tables",
    "choice_table",
    "rank_figure",
    "rank_table",
    "spectra_figure",
    "spectra_tables",
    "steps_figure",
    "steps_table",
    "trade_off_figure",
]

MARKERS = "os^DvPX*<>"

SETTING = {"loss.budget_cap": 1.0, "loss.kl_budget": 0.0, "loss.options.alpha": 1.0, "loss.temperature": math.inf}
"""What the setting of a family of losses is, and where on it plain MSE stands."""


def _styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each distinct name."""
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    return dict(zip(dict.fromkeys(names), pairs, strict=False))


def _losses(settings: Mapping[tuple[str, ...], Mapping[str, Row]]) -> list[str]:
    return list(dict.fromkeys(name for rows in settings.values() for name in rows))


def _seed_counts(counts: Sequence[int]) -> str:
    """How many seeds stand behind numbers."""
    if not counts:
        return "no seed"
    few, many = min(counts), max(counts)
    return counted(many, "seed") if few == many else f"{few} to {many} seeds"


def _finished_seeds(results: GridResults) -> str:
    return _seed_counts([row.finished for row in results.rows])


# What is chosen on validation data


def choice_table(results: GridResults) -> tuple[Table, str]:
    """The median validation score of every label to choose from, the chosen one in bold, and the note below."""
    chosen = {row.labels: row.chosen for row in results.chosen.rows}
    lines = []
    for labels, rows in results.options.items():
        several = sum(row.validation() is not None for row in rows) > 1
        cells = {row.labels[-1]: _score(row, several and row.labels[-1] == chosen[labels]) for row in rows}
        lines.append(Line(", ".join(labels), tuple(cells.get(label, Cell()) for label in results.grid.choose)))
    note = (
        "Best score on the validation trajectories, median over seeds; what is chosen in bold. In parentheses how many "
        "seeds have one, where some lack it; without a score nothing is chosen."
    )
    return Table("", results.grid.choose, tuple(lines)), note


def _score(row: Row, strong: bool) -> Cell:
    summary = row.validation()
    if summary is None:
        return Cell("none")
    detail = f"({summary.count})" if summary.count < len(row.outcomes) else ""
    return Cell(in_words(summary.median), detail, strong=strong)


# Ranks


@dataclass(frozen=True)
class _Ranking:
    """Ranks by the name of a metric, in which settings, of which losses, those left out, and how many blocks lack a
    loss."""

    settings: tuple[tuple[str, ...], ...]
    losses: tuple[str, ...]
    missing: tuple[str, ...]
    ranks: Mapping[str, Ranks]
    lacking: int


def _ranking(results: GridResults, baseline: str | None) -> _Ranking | None:
    named = results.by_loss(baseline)
    settings = {key: rows for key, rows in named.items() if baseline in rows and rows[baseline].finished}
    requested = _losses(settings)
    losses = [loss for loss in requested if all(loss in rows and rows[loss].finished for rows in settings.values())]
    if len(losses) < 2:
        return None
    lacking, ranks = 0, {}
    for name, metric in RATIOS.items():
        blocks = []
        for rows in settings.values():
            values = [rows[loss].values(*metric) for loss in losses]
            seeds = set().union(*values)
            whole = sorted(seed for seed in seeds if all(seed in x for x in values))
            lacking = max(lacking, len(seeds) - len(whole))
            blocks.append(np.array([[x[seed] for x in values] for seed in whole]).reshape(-1, len(losses)))
        if any(map(len, blocks)):
            ranks[name] = mean_ranks(blocks)
    missing = tuple(loss for loss in requested if loss not in losses)
    return _Ranking(tuple(settings), tuple(losses), missing, ranks, lacking) if ranks else None


def rank_table(results: GridResults, baseline: str | None) -> tuple[Table, str] | None:
    """Mean rank of every loss, with its interval, and the note below; None without two losses in one block."""
    ranking = _ranking(results, baseline)
    if ranking is None:
        return None
    best = {name: ranks.mean.min() for name, ranks in ranking.ranks.items()}
    lines = []
    for i, loss in enumerate(ranking.losses):
        cells = [
            Cell(
                f"{r.mean[i]:.2f}",
                f"[{r.low[i]:.2f}, {r.high[i]:.2f}]" if r.low[i] < r.high[i] else "",
                strong=bool(r.mean[i] == best[name]),
            )
            for name, r in ranking.ranks.items()
        ]
        lines.append(Line(loss, tuple(cells)))
    p = tuple(Cell("none" if math.isnan(r.p) else f"{r.p:.2g}") for r in ranking.ranks.values())
    difference = tuple(Cell(f"{r.difference:.2f}") for r in ranking.ranks.values())
    lines += [Line("p of Friedman's test", p, True), Line("critical difference", difference, True)]
    count = next(iter(ranking.ranks.values())).blocks
    settings = "; ".join(", ".join(key) or results.groups[0][0] for key in ranking.settings)
    note = (
        f"Mean rank over {counted(count, 'block')}, 1 is best [95 % bootstrap interval over seeds]; a "
        f"block is a seed of a setting: {settings}. Equal errors share a rank. Mean ranks that differ by less than the "
        "critical difference (Nemenyi, 5 %) are not told apart. The blocks are few systems with several seeds each: "
        "this says nothing of other systems."
    )
    if ranking.lacking:
        note += f" Blocks that lack a loss are left out: up to {ranking.lacking}."
    if ranking.missing:
        note += f" Losses without a finished run in a setting are left out: {', '.join(ranking.missing)}."
    return Table("", tuple(ranking.ranks), tuple(lines)), note


def rank_figure(results: GridResults, baseline: str | None) -> Figure | None:
    """Critical-difference diagrams: mean ranks on a line, losses that are not told apart joined by a bar."""
    ranking = _ranking(results, baseline)
    if ranking is None:
        return None
    figure, panels = grid_of_panels(len(ranking.ranks), 2, 6, 1.1 + 0.2 * len(ranking.losses))
    for panel, (name, ranks) in zip(panels, ranking.ranks.items(), strict=True):
        _diagram(panel, ranking.losses, ranks)
        p = "" if math.isnan(ranks.p) else f", Friedman p = {ranks.p:.2g}"
        panel.set_title(f"{name}: {ranks.blocks} blocks{p}", fontsize=10)
    return figure


def _diagram(panel: Axes, losses: Sequence[str], ranks: Ranks) -> None:
    """Demšar's diagram: the best to the left, names below, their lines drawn apart."""
    count, order = len(losses), np.argsort(ranks.mean, kind="stable")
    bars = _alike(ranks.mean[order].tolist(), ranks.difference)
    half = (count + 1) // 2
    depth = 0.6 * half + 0.35 * len(bars) + 0.6
    panel.set(xlim=(1 - 0.45 * count, count * 1.45), ylim=(-depth, 1.5))
    panel.axis("off")
    panel.plot([1, count], [0, 0], color="black", lw=1)
    for rank in range(1, count + 1):
        panel.plot([rank, rank], [0, 0.15], color="black", lw=1)
        panel.text(rank, 0.25, str(rank), ha="center", va="bottom", fontsize=8)
    shown = min(ranks.difference, count - 1)
    panel.plot([1, 1 + shown], [1.05, 1.05], color="0.3", lw=2, solid_capstyle="butt")
    text = "critical difference" + (f" {ranks.difference:.1f}, wider than the axis" if shown < ranks.difference else "")
    panel.text(1 + shown / 2, 1.12, text, ha="center", va="bottom", fontsize=8, color="0.3")
    for i, (first, last) in enumerate(bars):
        y = -0.3 - 0.35 * i
        ends = ranks.mean[order[first]] - 0.05, ranks.mean[order[last]] + 0.05
        panel.plot(ends, [y, y], color="0.3", lw=3.5, solid_capstyle="butt")
    below = 0.35 * len(bars) + 0.5
    for place, i in enumerate(order):
        left = place < half
        y = -below - 0.6 * (place if left else count - 1 - place)
        x = float(ranks.mean[i])
        end = 0.85 if left else count + 0.15
        panel.plot([x, x, end], [0, y, y], color=COLOURS[0], lw=0.9)
        where = {"ha": "right" if left else "left", "va": "center", "fontsize": 8}
        panel.text(end - 0.06 if left else end + 0.06, y, f"{losses[i]} ({x:.2f})", **where)


def _alike(ranks: Sequence[float], difference: float) -> list[tuple[int, int]]:
    """First and last of every largest stretch of ascending ranks that lie within the critical difference."""
    bars: list[tuple[int, int]] = []
    for first in range(len(ranks)):
        last = max(i for i in range(first, len(ranks)) if ranks[i] - ranks[first] < difference)
        if last > first and (not bars or last > bars[-1][1]):
            bars.append((first, last))
    return bars


# Mean against tail


def trade_off_figure(results: GridResults, baseline: str | None) -> Figure | None:
    """The top 1 % of the one-step error against its mean, both in relation to the baseline, a panel per setting.

    Lines join losses that differ by one setting alone, from the baseline on where it belongs to the family.
    """
    settings = {key: rows for key, rows in results.by_loss(baseline).items() if baseline in rows and len(rows) > 1}
    places = [(RATIOS["one step: mean"], "mean"), (RATIOS["one step: top 1 %"], "top 1 %")]
    drawn = {}
    for key, rows in settings.items():
        other = rows[baseline or ""]
        ratios = {
            name: [paired_ratio(row.values(*metric), other.values(*metric)) for metric, _ in places]
            for name, row in rows.items()
            if name != baseline
        }
        finite = {name: (x, y) for name, (x, y) in ratios.items() if x and y and math.isfinite(x.mean + y.mean)}
        if finite:
            drawn[key] = finite
    if not drawn:
        return None
    styles = _styles(name for name in _losses(settings) if name != baseline)
    figure, panels = grid_of_panels(len(drawn), 3, 4.6, 3.9, below=0.6)
    for panel, (key, ratios) in zip(panels, drawn.items(), strict=True):
        for curve in _curves(settings[key], ratios, baseline or ""):
            panel.plot(*np.array(curve).T, color="0.7", lw=1.2, zorder=1)
        for name, (x, y) in ratios.items():
            colour, marker = styles[name]
            panel.errorbar(
                x.mean, y.mean, _reach(y), _reach(x), fmt=marker, color=colour, ms=6, elinewidth=0.6, label=name
            )
        panel.plot(1, 1, "k+", ms=12, mew=2, label=baseline)
        for line in (panel.axhline, panel.axvline):
            line(1, color="0.6", lw=0.8, ls=":")
        _ratio_axes(panel, [x.mean for x, _ in ratios.values()], [y.mean for _, y in ratios.values()])
        counts = [x.count for x, _ in ratios.values()]
        panel.set_title(f"{', '.join(key) or results.grid.name} ({_seed_counts(counts)})", fontsize=10)
        panel.set(xlabel=f"mean, relative to {baseline}", ylabel=f"top 1 %, relative to {baseline}")
    legend_below(figure, panels)
    title_above(figure, "One-step squared error, last weights: mean against tail; bars: 95 % intervals")
    return figure


def _reach(ratio: Ratio) -> list[list[float]]:
    """How far an interval reaches below and above its mean; nowhere for one pair."""
    if ratio.count < 2:
        return [[0.0], [0.0]]
    return [[ratio.mean - ratio.low], [ratio.high - ratio.mean]]


def _ratio_axes(panel: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    """Logarithmic axes over the means and 1; long intervals of few seeds are cut off."""
    panel.set(xscale="log", yscale="log")
    for values, axis, limits in ((x, panel.xaxis, panel.set_xlim), (y, panel.yaxis, panel.set_ylim)):
        low, high = min(*values, 1.0), max(*values, 1.0)
        room = max(1.25, (high / low) ** 0.15)
        limits(low / room, high * room)
        _plain_ticks(axis, low / room, high * room)


def _plain_ticks(axis: Axis, low: float, high: float) -> None:
    """Few enough ticks, without powers of ten."""
    span = high / low
    if span > 6:
        subs = [1, 2, 5] if span < 1e4 else [1]
    else:
        subs = [1, 1.5, 2, 3, 4, 5, 7] if span > 2.5 else [1, 1.1, 1.2, 1.4, 1.6, 2, 2.5, 3, 4, 5, 6, 7, 8, 9]
    axis.set_major_locator(LogLocator(subs=subs, numticks=99))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, position: number(value))


def _plain_height(panel: Axes) -> None:
    panel.set_yscale("log")
    _plain_ticks(panel.yaxis, *panel.get_ylim())


def _curves(
    rows: Mapping[str, Row], ratios: Mapping[str, tuple[Ratio, Ratio]], baseline: str
) -> Iterator[list[tuple[float, float]]]:
    """Points of the losses that differ by one number of their configuration, in its order, from the baseline on."""
    losses = {name: flat({"loss": dict(rows[name].outcomes[0].config["loss"])}) for name in ratios}
    plain = flat({"loss": dict(rows[baseline].outcomes[0].config["loss"])})["loss.name"] == "mse"
    for key, at_mse in SETTING.items():
        families: dict[str, list[tuple[float, str]]] = {}
        for name, loss in losses.items():
            rest = {k: v for k, v in loss.items() if k not in (key, "loss.options")}
            value = loss.get(key)
            if value is None and key == "loss.budget_cap" and loss["loss.kl_budget"] is not None:
                value = math.inf
            if value is not None:
                families.setdefault(repr(sorted(rest.items())), []).append((float(value), name))
        for members in families.values():
            if len(members) > 1:
                start = [(at_mse, "")] if plain else []
                ordered = sorted([*start, *members], reverse=math.isinf(at_mse))
                yield [(ratios[n][0].mean, ratios[n][1].mean) if n else (1.0, 1.0) for _, n in ordered]


# Arms: the labels of the last axis, such as widths, or clean and wrong targets


def arms_tables(results: GridResults) -> tuple[list[Table], str]:
    """Errors in every arm in relation to those of the same loss in the first, a table per group, and the note below."""
    first, *others = results.grid.axes[-1]
    tables = []
    for title, rows in _without_arms(results):
        heads = [(arm, name) for arm in others for name in RATIOS]
        lines = []
        for name, arms in rows.items():
            ratios = [
                paired_ratio(arms[arm].values(*RATIOS[metric]), arms[first].values(*RATIOS[metric]))
                if arm in arms and first in arms
                else None
                for arm, metric in heads
            ]
            lines.append(Line(name, tuple(map(ratio_cell, ratios))))
        tables.append(Table(title, tuple(f"{arm}: {metric}" for arm, metric in heads), tuple(lines)))
    note = (
        f"Ratios of squared errors to those of the same loss with “{first}”, paired by seed "
        f"({_finished_seeds(results)}). Geometric mean [95 % interval by Student's t on the logarithms]; bold where "
        "the interval is on one side of 1."
    )
    return tables, note


def _without_arms(results: GridResults) -> list[tuple[str, dict[str, dict[str, Row]]]]:
    """By the title of every group: the rows by their labels without the first and the last one, and by the last."""
    groups = []
    for title, rows in results.groups:
        lines: dict[str, dict[str, Row]] = {}
        for row in rows:
            lines.setdefault(", ".join(row.labels[1:-1]) or row.labels[0], {})[row.labels[-1]] = row
        groups.append((title, lines))
    return groups


def arms_figure(results: GridResults) -> Figure:
    """Errors against the arms, a line per loss: median and 95 % interval over seeds."""
    groups, arms = _without_arms(results), results.grid.axes[-1]
    metrics = {name: RATIOS[name] for name in ("one step: mean", "one step: top 1 %", "rollout")}
    styles = _styles(name for _, rows in groups for name in rows)
    figure = Figure(figsize=(4.2 * len(metrics), 3.2 * len(groups) + 0.7), layout="constrained")
    panels = figure.subplots(len(groups), len(metrics), squeeze=False)
    for line, (title, rows) in zip(panels, groups, strict=True):
        for panel, (name, metric) in zip(line, metrics.items(), strict=True):
            lines = {
                loss: [by_arm[arm].summary(*metric) if arm in by_arm else None for arm in arms]
                for loss, by_arm in rows.items()
            }
            _draw_lines(panel, lines, styles)
            panel.set_xticks(range(len(arms)), arms)
            panel.set(title=f"{title}: {name}", xlim=(-0.4, len(arms) - 0.6))
            _plain_height(panel)
    figure.supylabel("squared error, last weights", fontsize=10)
    legend_below(figure, panels.flat)
    title_above(figure, f"Median and 95 % interval over {_finished_seeds(results)}; x: a median that diverged")
    return figure


def _draw_lines(
    panel: Axes, lines: Mapping[str, Sequence[Summary | None]], styles: Mapping[str, tuple[str, str]]
) -> None:
    """Medians and intervals side by side, and a cross at the upper edge where the median diverged."""
    for i, (name, summaries) in enumerate(lines.items()):
        colour, marker = styles[name]
        x = np.arange(len(summaries)) + 0.3 * (i / max(1, len(lines) - 1) - 0.5)
        middle, spread = with_intervals(summaries)
        panel.errorbar(x, middle, spread, color=colour, marker=marker, ms=5, lw=1, elinewidth=0.6, label=name)
        gone = np.array([s is not None and math.isinf(s.median) for s in summaries])
        panel.plot(x[gone], np.full(gone.sum(), 0.97), "x", color=colour, transform=panel.get_xaxis_transform())


# Steps


def steps_table(
    results: GridResults, baseline: str | None, costs: Mapping[str, float] = MappingProxyType({})
) -> tuple[list[Table], str]:
    """When the validation score of every loss first reaches the best of the baseline, paired by seed, and, where the
    costs of a step are known, the score after equal time.

    Args:
        results: the grid.
        baseline: the label of the baseline.
        costs: the time of a training step by label, in units of that of the baseline.
    """
    tables = []
    timed = [name for name in _losses(results.by_loss(baseline)) if name in costs]
    heads = ("steps", "seeds that reach it", f"{baseline} took")
    if timed:
        heads += (f"steps in {baseline}'s time", f"score then, relative to {baseline}")
    for title, settings in _by_group(results, baseline):
        lines = []
        for key, rows in settings.items():
            for name, row in rows.items():
                reached, own = _reached(row, rows[baseline or ""])
                if not reached:
                    continue
                middle = summarize(reached)
                took = middle.median if middle else math.inf
                cells = [
                    Cell(f"{took:.0f}" if math.isfinite(took) else "never"),
                    Cell(f"{sum(map(math.isfinite, reached))} of {len(reached)}"),
                    Cell(f"{np.median(own):.0f}"),
                ]
                if timed:
                    cells += _equal_time(row, rows[baseline or ""], costs.get(name))
                lines.append(Line(", ".join([*key[1:], name]), tuple(cells)))
        tables.append(Table(title, heads, tuple(lines)))
    note = (
        f"Steps until the validation score first is as small as the best of “{baseline}” with the same seed: median "
        "over seeds, “never” where fewer than half of them reach it. Known at validations only."
    )
    if timed:
        note += (
            f" Equal time: a step costs {', '.join(f'{costs[name]:g} ({name})' for name in timed)} in units of a step "
            f"of “{baseline}”, measured apart from the study. The best validation score until then, interpolated "
            "between validations: geometric mean of the paired ratio [95 % interval]."
        )
    return tables, note


def _equal_time(row: Row, baseline: Row, cost: float | None) -> list[Cell]:
    """How many steps of a row fit the time of the baseline's training, and its best score until then."""
    ours, theirs = row.validations(), baseline.validations()
    if cost is None or not ours or not theirs:
        return [Cell(), Cell()]
    steps = {seed: min(course[0][-1], course[0][-1] / cost) for seed, course in theirs.items()}
    ratio = paired_ratio(
        {seed: _best_until(course, steps[seed]) for seed, course in ours.items() if seed in steps},
        {seed: course[1].min() for seed, course in theirs.items()},
    )
    return [Cell(f"{np.median([*steps.values()]):.0f}"), ratio_cell(ratio)]


def _best_until(course: Float[np.ndarray, "2 validation"], step: float) -> float:
    """The best validation score until a step; between validations it falls like a power."""
    steps, best = course[0], np.minimum.accumulate(course[1])
    with np.errstate(invalid="ignore"):
        score = float(np.exp(np.interp(step, steps, np.log(best))))
    return math.inf if math.isnan(score) else score


def _by_group(results: GridResults, baseline: str | None) -> list[tuple[str, dict[tuple[str, ...], Mapping[str, Row]]]]:
    """Settings that have the baseline, by their first label."""
    groups: dict[str, dict[tuple[str, ...], Mapping[str, Row]]] = {}
    for key, rows in results.by_loss(baseline).items():
        if baseline in rows:
            groups.setdefault(key[0] if key else "", {})[key] = rows
    return list(groups.items())


def _reached(row: Row, baseline: Row) -> tuple[list[float], list[float]]:
    """By seed: the step at which a row is as good as the baseline at its best, and that of the baseline."""
    ours, theirs = row.validations(), baseline.validations()
    reached, own = [], []
    for seed in sorted(ours.keys() & theirs.keys()):
        best = theirs[seed][1].min()
        if math.isfinite(best):
            own.append(float(theirs[seed][0][theirs[seed][1].argmin()]))
            reached.append(min((float(step) for step, score in ours[seed].T if score <= best), default=math.inf))
    return reached, own


def steps_figure(results: GridResults, baseline: str | None) -> Figure | None:
    """The best validation score so far against steps, median over seeds, and the baseline's best as a line."""
    settings = {key: rows for _, group in _by_group(results, baseline) for key, rows in group.items()}
    settings = {key: rows for key, rows in settings.items() if any(row.validations() for row in rows.values())}
    if not settings:
        return None
    styles = _styles(_losses(settings))
    figure, panels = grid_of_panels(len(settings), len(settings), 5.2, 4.6)
    for panel, (key, rows) in zip(panels, settings.items(), strict=True):
        for name, row in rows.items():
            courses = list(row.validations().values())
            if not courses or len({len(course[0]) for course in courses}) > 1:
                continue
            best = np.median([np.minimum.accumulate(course[1]) for course in courses], axis=0)
            colour, marker = styles[name]
            panel.plot(
                courses[0][0], np.where(np.isfinite(best), best, np.nan), color=colour, marker=marker, ms=4, label=name
            )
            if name == baseline:
                panel.axhline(best[-1], color=colour, lw=0.8, ls="--")
        counts = [len(row.validations()) for row in rows.values()]
        panel.set_title(f"{', '.join(key)} ({_seed_counts(counts)})", fontsize=10)
        panel.set(xlabel="training step", ylabel="best validation score so far")
        _plain_height(panel)
    legend_below(figure, panels)
    return figure


# Spectra


_QUANTITIES = {"power_ratio": "power", "coherence": "coherence"}


def _spectrum(row: Row, field: str, band: str, quantity: str) -> Summary | None:
    return row.summary(*Metric(("scores", "spectrum", field, band, quantity)))


def _field(results: GridResults) -> str | None:
    """The first field of which a run has a spectrum."""
    for outcome in results.outcomes:
        spectra = outcome.checkpoint("last").get("scores", {}).get("spectrum")
        if spectra:
            return next(iter(spectra))
    return None


def spectra_tables(results: GridResults) -> tuple[list[Table], str] | None:
    """Power ratio and coherence of the rollouts by band, medians over seeds; None where no run has them."""
    field = _field(results)
    if field is None:
        return None
    columns = {f"{name}, {band}": (band, key) for key, name in _QUANTITIES.items() for band in BANDS}
    tables = []
    for title, rows in results.groups:
        lines = []
        for row in rows:
            summaries = [_spectrum(row, field, *column) for column in columns.values()]
            cells = tuple(Cell(in_words(s and s.median)) for s in summaries)
            lines.append(Line(row.name, cells))
        tables.append(Table(title, tuple(columns), tuple(lines)))
    note = (
        f"Spectra of {field} over the rollouts of the last weights, medians over seeds. Power ratio: of prediction to "
        "truth, 1 is best; below it a wave is missing. Coherence: 1 is best; a wave of full power and little coherence "
        "is in the wrong place."
    )
    return tables, note


def spectra_figure(results: GridResults) -> Figure | None:
    """Power ratio and coherence by band, a line per loss; None where no run has them."""
    field = _field(results)
    if field is None:
        return None
    groups = results.groups
    styles = _styles(row.name for _, rows in groups for row in rows)
    figure = Figure(figsize=(4.6 * len(groups), 6.4), layout="constrained")
    panels = figure.subplots(2, len(groups), squeeze=False)
    for column, (title, rows) in enumerate(groups):
        for panel, (quantity, name) in zip(panels[:, column], _QUANTITIES.items(), strict=True):
            _draw_lines(panel, {row.name: [_spectrum(row, field, b, quantity) for b in BANDS] for row in rows}, styles)
            panel.set_xticks(range(len(BANDS)), [f"{band} waves" for band in BANDS])
            panel.set_title(f"{title}: {name} of {field}", fontsize=10)
            panel.axhline(1, color="0.6", lw=0.8, ls=":")
    for panel in panels[0]:
        _plain_height(panel)
    legend_below(figure, panels.flat)
    title_above(figure, f"Rollouts, last weights: median and 95 % interval over {_finished_seeds(results)}")
    return figure
