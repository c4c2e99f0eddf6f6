"""The page of a study, from a folder made by hand: nothing is trained, and nothing that went wrong is left out."""

import base64
import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from squall.report.page import write_page
from squall.study.results import read_results


@pytest.fixture
def page(study_folder):
    return write_page(read_results(study_folder), study_folder / "page.html")


def data_of(page) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def line_of(text: str, label: str, kind: str = "last") -> str:
    """The row of a table with that label, in the first table of a kind of weights that has it."""
    text = text[text.index(f'<div class="kind-{kind}">') :]
    return next(row for row in re.findall(r"<tr.*?</tr>", text, re.DOTALL) if f">{label}</td>" in row)


def test_the_page_is_one_file_that_asks_for_nothing(page):
    text = re.sub(r"(<script[^>]*>).*?</script>", r"\1", page.read_text(), flags=re.DOTALL)
    assert not re.search(r'<(script|link|img|iframe)[^>]*\s(src|href)="(?!data:)', text)
    assert not re.search(r'<a[^>]*href="(?!#)', text)
    assert "@import" not in text
    assert "http" not in text
    assert page.stat().st_size < 10e6
    assert [path.name for path in page.parent.glob(".*")] == []


def test_the_page_shows_how_far_the_study_is(page):
    text = page.read_text()
    assert "a study &lt;of&gt; four ends" in text
    for words in ("3 done", "1 failed", "1 started", "2 missing", "of 7 trials"):
        assert words in text, words
    assert "the loss is not finite" in text
    assert "No p: the study names no baseline for these rows." in text
    assert "c0ffeec0ff" in text


def test_the_table_has_both_weights_and_the_values_by_seed(page):
    row, best = (line_of(page.read_text(), "original", kind) for kind in ("last", "best"))
    assert "0.432" in row
    assert "0.123" not in row
    assert "0.123" in best
    assert "1 of 2" in row
    assert "0.035" in row  # published
    assert "seed 0: 0.432\nseed 1: missing" in html.unescape(row)


def test_what_diverged_failed_or_is_not_finished_is_shown(page):
    text = page.read_text()
    diverged = html.unescape(line_of(text, "T = 100"))
    assert "[0.0567, diverged]" in diverged
    assert "seed 1: the rollout diverged" in diverged
    failed = html.unescape(line_of(text, "T = 0"))
    assert "seed 0: the training diverged" in failed
    assert "seed 0: failed: the training diverged\nseed 1: not finished" in failed


def test_too_few_seeds_for_a_test_are_mentioned(page):
    text = " ".join(page.read_text().split())
    assert "With 1 seed it cannot be below 1, so nothing here can be significant by it; that takes 7 seeds." in text


def test_the_maps_give_back_truth_and_error(page):
    data = data_of(page)
    kept, diverged = data["errors"]["ch-original-seed-0"][0], data["errors"]["ch-t-100-seed-1"][0]
    assert kept["diverged"] is None
    assert diverged["diverged"] == 0.5
    assert len(data["truths"]) == 2  # one per trajectory, shared by all trials
    truth = data["truths"][kept["truth"]]
    assert (len(truth["time"]), len(truth["space"])) == (9, 6)
    q = decoded(kept["bytes"]).reshape(9, 6) / 127
    assert np.allclose(q * np.abs(q) * kept["top"], 0.5)
    assert (decoded(diverged["bytes"]).reshape(9, 6)[4:] == -128).all()


def test_the_error_of_one_step_has_its_map_and_its_regimes(page):
    steps = data_of(page)["grids"]["one-step"]["steps"]
    assert steps["trial"] == "ch-original-seed-0"
    assert [found["top"] for found in steps["maps"]] == [0.25, 0.25]
    assert (decoded(steps["maps"][0]["bytes"]) == 127).all()
    assert (decoded(steps["maps"][0]["regime"]) == 3).all()
    assert re.search(r">100.0 %</td>\s*<td[^>]*>0.25</td>", line_of(page.read_text(), "body"))


def decoded(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.int8).astype(float)


def test_the_script_knows_where_there_is_no_number(page):
    panel = data_of(page)["grids"]["table-1"]["temperature"]["last"][0]
    states = {item["name"]: item["state"] for item in [*panel["points"], *panel["lines"]]}
    assert states == {"T = 0": "diverged", "T = 100": "diverged", "original": ""}
    seeds = data_of(page)["grids"]["table-1"]["fields"][0]["rows"][1]["seeds"]
    assert [seed["state"] for seed in seeds] == ["failed: the training diverged", "not finished"]


def chromium() -> str:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(names)} is on the PATH")
    return found


CATCH = "<script>window.problems = []; addEventListener('error', e => problems.push(e.message));</script>"
PROBE = """<script>addEventListener('load', () => setTimeout(() => {
  const told = {}, table = document.querySelector('table.sortable');
  const labels = () => [...table.tBodies[0].rows].slice(1).map(row => row.cells[0].textContent);
  told.before = labels();
  table.querySelectorAll('thead th button')[3].click();
  told.sorted = labels();
  document.querySelector('input[value=best]').click();
  told.shown = [...document.querySelectorAll('.kind-last td')].some(cell => cell.offsetParent !== null);
  const [, row, seed] = document.querySelectorAll('[data-controls] select');
  row.value = 'T = 100'; row.onchange(); seed.value = '1'; seed.onchange();
  told.fields = document.querySelector('[data-told]').textContent;
  told.plots = document.querySelectorAll('.plot .main-svg').length;
  const titles = document.querySelectorAll("[data-figure=steps] .gtitle");
  told.maps = [...titles].map(title => title.textContent);
  told.problems = problems;
  document.body.replaceChildren();
  const out = document.createElement('pre');
  out.textContent = JSON.stringify(told);
  document.body.append(out);
}, 500));</script>"""


@pytest.mark.slow
def test_a_browser_draws_the_page_and_its_controls_work(page, tmp_path):
    text = page.read_text().replace("<head>", "<head>" + CATCH).replace("</body>", PROBE + "</body>")
    probed = tmp_path / "probed.html"
    probed.write_text(text)
    command = [chromium(), "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND"]  # without a network
    command += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([*command, probed.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert ":CONSOLE" not in done.stderr, done.stderr
    found = re.search(r"<pre>(.*?)</pre>", done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:]
    told = json.loads(html.unescape(found[1]))
    assert told["problems"] == []
    assert told["before"] == ["original", "T = 0", "T = 100", "persistence"]
    assert told["sorted"] == ["original", "persistence", "T = 0", "T = 100"]
    assert told["shown"] is False
    assert "diverged: from t = 0.5 on" in told["fields"]
    assert told["plots"] > 0
    assert told["maps"] == ["squared error", "regime"]
