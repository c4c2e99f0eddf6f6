"""What a study says of losses, from hand-made outcomes: nothing is trained."""

import base64
import dataclasses
import html
import math

import pytest
from matplotlib.figure import Figure

from squall.report import evidence
from squall.report.curves import training_figure
from squall.report.page import write_page
from squall.report.sections import sections
from squall.report.study import study_tables
from squall.report.tables import markdown
from squall.runs.config import from_dict, to_dict
from squall.study.definition import Grid, Study
from squall.study.outcome import Outcome
from squall.study.results import GridResults, Results, Row

LOSSES = {
    "MSE": {"name": "mse"},
    "cap 3": {"kl_budget": 1.0, "budget_cap": 3.0},
    "cap 9": {"kl_budget": 1.0, "budget_cap": 9.0},
}
ERRORS = {"MSE": 4.0, "cap 3": 2.0, "cap 9": 1.0}


def outcome(name: str, seed: int, loss: str, error: float, scores=(8.0, 4.0), state="done") -> Outcome:
    """A run with one error everywhere; an infinite one diverged."""
    value = error if math.isfinite(error) else None
    item = {
        "step": 20,
        "rollout": {"states": value, "energy": value},
        "one_step": {"mean": value, "top_1_percent": value},
        "scores": {"spectrum": {"u": {b: {"power_ratio": 0.5, "coherence": 0.9} for b in ("low", "mid", "high")}}},
        "baselines": {},
    }
    config = to_dict(from_dict({"loss": LOSSES[loss], "data": {"path": "data.hdf5"}}))
    history = {"step": [10.0, 20.0], "score": [x if math.isfinite(x) else None for x in scores]}
    return Outcome(name, seed, state, config, {"": {"checkpoints": {"last": item}}}, history)


def grid(axes, error, *, choose=(), seeds=3, scores=lambda *labels: (8.0, 4.0), show=()) -> GridResults:
    """The rows of a grid whose losses are on the second axis; `error` and `scores` give numbers by labels and seed."""
    rows = []
    axes = (*axes, tuple(choose)) if choose else axes

    def add(labels, left):
        if left:
            for label in left[0]:
                add((*labels, label), left[1:])
            return
        runs = [
            outcome("-".join(labels) + str(s), s, labels[1], error(*labels, s), scores(*labels)) for s in range(seeds)
        ]
        rows.append(Row(labels, tuple(runs)))

    add((), axes)
    return GridResults(Grid("g", "", axes, tuple(choose), tuple(show), {}, {}), tuple(rows), {})


SYSTEMS = ("A", "B")
WHOLE = grid((SYSTEMS, tuple(LOSSES)), lambda system, loss, seed: ERRORS[loss] * (1 + seed / 10))


def cells(table, label: str) -> list[str]:
    return next([cell.text for cell in line.cells] for line in table.lines if line.label == label)


def test_ranks_are_means_over_seeds_of_settings_and_a_block_without_a_loss_is_left_out():
    found = evidence.rank_table(WHOLE, "MSE")
    assert found is not None
    assert cells(found[0], "MSE")[0] == "3.00"
    assert cells(found[0], "cap 9")[0] == "1.00"
    assert "over 6 blocks" in found[1]
    assert "left out" not in found[1]
    short = [Row(row.labels, row.outcomes[: 2 if row.labels == ("A", "MSE") else 3]) for row in WHOLE.rows]
    lacking = evidence.rank_table(GridResults(WHOLE.grid, tuple(short), {}), "MSE")
    assert lacking is not None
    assert "over 5 blocks" in lacking[1]
    assert "Blocks that lack a loss are left out: up to 1" in lacking[1]
    gone = [Row(r.labels, ()) if r.labels == ("B", "cap 3") else r for r in WHOLE.rows]
    without = evidence.rank_table(GridResults(WHOLE.grid, tuple(gone), {}), "MSE")
    assert without is not None
    assert cells(without[0], "MSE")[0] == "2.00"
    assert "over 6 blocks" in without[1]
    assert "without a finished run in a setting are left out: cap 3" in without[1]
    assert evidence.rank_table(WHOLE, "no such loss") is None


def test_the_choice_is_made_on_validation_scores_and_not_on_the_test():
    """Rate b has the better test errors, rate a the better validation; a diverged validation is never chosen."""
    rates = ("a", "b", "c")
    scores = {"a": (8.0, 2.0), "b": (8.0, 3.0), "c": (1.0, 1.0)}
    errors = {"a": 5.0, "b": 1.0, "c": 0.5}
    found = grid(
        (SYSTEMS, tuple(LOSSES)),
        lambda system, loss, rate, seed: errors[rate],
        choose=rates,
        scores=lambda system, loss, rate: (math.inf, math.inf) if (rate, loss) == ("c", "MSE") else scores[rate],
    )
    chosen = {row.labels: row.chosen for row in found.chosen.rows}
    assert chosen == {(s, loss): "a" if loss == "MSE" else "c" for s in SYSTEMS for loss in LOSSES}
    assert found.chosen.grid.axes == (SYSTEMS, tuple(LOSSES))
    table, _ = evidence.choice_table(found)
    assert "| A, MSE | **2** | 3 | diverged |" in markdown(table)
    assert WHOLE.chosen is WHOLE


def test_arms_are_set_in_relation_to_the_first_with_the_same_loss():
    found = grid(
        (("A",), tuple(LOSSES), ("clean", "wrong")),
        lambda system, loss, arm, seed: ERRORS[loss] * (3 if arm == "wrong" else 1) * (1 + seed / 10),
    )
    (table,), note = evidence.arms_tables(found)
    assert table.heads[0] == "wrong: one step: mean"
    assert cells(table, "cap 3") == ["3"] * 4
    assert "(3 seeds)" in note


def test_steps_are_those_until_the_best_of_the_baseline_with_the_same_seed():
    scores = {"MSE": (8.0, 4.0), "cap 3": (4.0, 9.0), "cap 9": (5.0, math.inf)}
    found = grid((("A",), tuple(LOSSES)), lambda *labels: 1.0, scores=lambda system, loss: scores[loss])
    (table,), _ = evidence.steps_table(found, "MSE")
    assert cells(table, "MSE") == ["20", "3 of 3", "20"]
    assert cells(table, "cap 3") == ["10", "3 of 3", "20"]
    assert cells(table, "cap 9") == ["never", "0 of 3", "20"]


def test_a_dearer_step_leaves_fewer_steps_in_the_time_of_the_baseline():
    """Scores 8, 4 at steps 10, 20; between validations a score falls like a power, so half-way it is their root."""
    found = grid((("A",), tuple(LOSSES)), lambda *labels: 1.0)
    (table,), note = evidence.steps_table(found, "MSE", {"MSE": 1.0, "cap 3": 4 / 3})
    assert table.heads[3:] == ("steps in MSE's time", "score then, relative to MSE")
    assert cells(table, "MSE")[3:] == ["20", "1"]
    assert cells(table, "cap 3")[3:] == ["15", f"{2**0.5:.2f}"]
    assert cells(table, "cap 9")[3:] == ["", ""]
    assert "1.33333 (cap 3)" in note


def test_spectra_are_shown_where_a_run_has_them():
    found = evidence.spectra_tables(WHOLE)
    assert found is not None
    assert cells(found[0][0], "MSE") == ["0.5"] * 3 + ["0.9"] * 3
    for row in WHOLE.rows:
        for run in row.outcomes:
            assert run.checkpoint("last")["scores"]["spectrum"]
    plain = [Row(r.labels, tuple(Outcome(o.name, o.seed, "missing", o.config) for o in r.outcomes)) for r in WHOLE.rows]
    assert evidence.spectra_tables(GridResults(WHOLE.grid, tuple(plain), {})) is None


def test_bars_join_the_largest_stretches_within_the_critical_difference():
    assert evidence._alike([1.0, 1.5, 2.0, 4.0], 1.2) == [(0, 2)]
    assert evidence._alike([1.0, 2.0, 3.0], 1.1) == [(0, 1), (1, 2)]
    assert evidence._alike([1.0, 2.0, 3.0], 0.5) == []


def test_the_curve_of_a_family_begins_at_mse_and_follows_its_setting():
    figure = evidence.trade_off_figure(WHOLE, "MSE")
    assert figure is not None
    (curve,) = [line for line in figure.axes[0].lines if line.get_color() == "0.7"]
    assert curve.get_xdata() == pytest.approx([1.0, 0.5, 0.25])


def test_the_title_above_one_panel_is_no_wider_than_the_figure():
    alone = grid((("A",), tuple(LOSSES)), lambda system, loss, seed: ERRORS[loss] * (1 + seed / 10))
    for figure in (evidence.trade_off_figure(alone, "MSE"), evidence.spectra_figure(alone)):
        assert figure is not None
        figure.draw_without_rendering()
        (title,) = (text for text in figure.texts if text.get_text() == figure.get_suptitle())
        box = title.get_window_extent()
        assert 0 < box.x0 < box.x1 < figure.bbox.width


def test_trainings_of_one_validation_and_small_growth_factors_are_seen():
    one, many = (
        [
            dataclasses.replace(run, history={"step": [10.0], "rollout_states": [2.0], "growth_factor": [0.7]})
            for run in [WHOLE.rows[0].outcomes[0]] * count
        ]
        for count in (1, 6)
    )
    rows = (Row(("A", "one"), tuple(one)), Row(("A", "many"), tuple(many)))
    errors, growth = training_figure(dataclasses.replace(WHOLE, rows=rows)).axes
    for panel in (errors, growth):
        dots = [line for line in panel.lines if line.get_marker() == "o" and list(line.get_markevery()) == [True]]
        assert len(dots) == len(rows)
    assert growth.get_ylim()[0] < 0.7


def test_pages_are_drawn_with_one_seed_and_with_what_diverged(tmp_path):
    """In the study's tables and on its page each stands below its heading."""
    show = ("table", "ratios", "ranks", "arms", "steps", "spectra")
    found = grid(
        (SYSTEMS, tuple(LOSSES), ("clean", "wrong")),
        lambda system, loss, arm, seed: math.inf if loss == "cap 9" else 1.0,
        seeds=1,
        show=show,
    )
    drawn = [
        evidence.rank_figure(found, "MSE"),
        evidence.trade_off_figure(found, "MSE"),
        evidence.arms_figure(found),
        evidence.steps_figure(found, "MSE"),
        evidence.spectra_figure(found),
    ]
    assert all(isinstance(figure, Figure) for figure in drawn)
    for figure in drawn:
        figure.draw_without_rendering()
    study = Study("s", "", {}, {"g": found.grid}, "MSE", {}, False, {})
    results = Results(study, {"g": found})
    picture = tmp_path / "ranks.png"
    picture.write_bytes(b"a picture")
    text = study_tables(results)
    page = write_page(results, tmp_path / "index.html", {"g-ranks": picture}).read_text()
    for head in ("ranks", "in relation to clean", "steps", "spectra", "ratios"):
        assert f"### g: {head}\n" in text
        assert f"<h3>{head}</h3>" in page
    assert "| cap 9, clean | 1 | 1 | diverged | diverged |" in text
    for section in sections(found, study):
        assert section.note.split(".")[0] in html.unescape(page)
    assert page.count("<img") == 1
    assert f'alt="ranks" src="data:image/png;base64,{base64.b64encode(b"a picture").decode()}"' in page
