"""The pages' own commands and programs run as they stand."""

import importlib
import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml

import squall
import squall.data
from squall.cli import main
from squall.runs.config import from_dict
from squall.runs.evaluate import evaluate_runs
from squall.study.definition import read_study

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).parents[1]
TRAINING = (ROOT / "docs" / "training.md").read_text()
README = (ROOT / "README.md").read_text()
SYSTEMS = (ROOT / "docs" / "systems.md").read_text()
MODELS = (ROOT / "docs" / "models.md").read_text()
LONG = (ROOT / "docs" / "long_rollouts.md").read_text()
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text()
INDEX = (ROOT / "docs" / "index.md").read_text()
START = (ROOT / "docs" / "start.md").read_text()
LOSS = (ROOT / "docs" / "loss.md").read_text()
RIVALS = (ROOT / "docs" / "rivals.md").read_text()
DIAGNOSE = (ROOT / "docs" / "diagnose.md").read_text()

RUN = {
    "README.md": ("python", "sh"),
    "adapters.md": ("python",),
    "diagnose.md": ("sh",),
    "evaluation.md": ("python", "sh"),
    "export.md": ("python", "sh"),
    "index.md": ("python",),
    "long_rollouts.md": ("python", "sh", "yaml"),
    "loss.md": ("python",),
    "models.md": ("python", "yaml"),
    "one_line.md": ("python",),
    "own_data.md": ("python",),
    "rivals.md": ("python", "sh"),
    "sphere.md": ("python", "yaml"),
    "start.md": ("python", "sh"),
    "study.md": ("python", "yaml"),
    "systems.md": ("python",),
    "training.md": ("python", "sh", "yaml"),
}
"""The blocks that a test runs, by page and language; some of these tests lie with those of a room."""

NOT_RUN = {
    ("AGENTS.md", "sh"): "targets of the Makefile, this test among them",
    ("CONTRIBUTING.md", "sh"): "targets of the Makefile, this test among them",
    ("adapters.md", "sh"): "install packages; .ci/peers installs the same",
    ("apebench.md", "sh"): "an hour of simulations",
    ("cluster.md", "sh"): "need a cluster; test_on_slurm.py and test_on_ray.py run the same options",
    ("own_data.md", "sh"): "name a file that the reader has; test_cli.py and the README's run the same",
    ("scale_out.md", "python"): "runs in test_ranks.py with a model of its own",
    ("scale_out.md", "sh"): "test_ranks.py starts the first on two processes; the others need more machines",
    ("sphere.md", "sh"): "name files that the reader has; the test of the page simulates on a smaller grid",
    ("sphere.md", "python notest"): "reads ERA5, which nobody ships",
    ("storms.md", "sh"): "a study of a day",
    ("study.md", "sh"): "a study of an hour; test_study.py runs a smaller preset",
}
"""Why the others are not; their squall commands are parsed."""


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_demo_finds_what_it_imports():
    path = ROOT / "examples" / "demo.py"
    exec(compile(path.read_text(), path, "exec"), {"__name__": "demo", "__file__": str(path)})


@pytest.mark.parametrize(
    "program",
    [
        *blocks(TRAINING, "python"),
        *blocks(LONG, "python"),
        *blocks(LOSS, "python"),
        *blocks(README, "python"),
        *blocks(INDEX, "python"),
        "".join(blocks(SYSTEMS, "python")),
    ],
    ids=lambda text: text[:20],
)
def test_a_program_runs(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "page", "exec"), {})


def run_page(page: str, *small: str) -> dict:
    """What the programs of a page define; its trainings are given further options."""
    names = {}
    for language, text in re.findall(r"```(python|sh)\n(.*?)```", page, flags=re.DOTALL):
        if language == "python":
            exec(compile(text, "page", "exec"), names)
        for first, *words in map(shlex.split, text.replace("\\\n", " ").splitlines() if language == "sh" else ()):
            if first == "squall":
                assert main([*words, *small * (words[0] == "train")]) == 0, words
    return names


def test_the_first_page_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page(START, "--training.steps", "4", "--model.hidden", "8")
    assert names["trajectories"].shape == (3, 21, 1, 64)


def test_the_page_about_evaluation_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run_page(EVALUATION)
    assert names["errors"].rollout["trajectories"] == 9
    assert names["errors"].scores["nrmse"]["height"] < 0.1
    assert names["states"].shape == (3, 101, 1, 64)


def test_the_programs_of_the_models_page_run():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import warns
        pytest.importorskip("neuralop.models", reason="needs pip install 'squall[models]'")
    names = {}
    exec(compile("".join(blocks(MODELS, "python")), "page", "exec"), names)
    assert names["rate"].shape == names["u"].shape
    assert names["next_fields"].shape == names["fields"].shape


def test_the_programs_and_the_configuration_of_the_sphere_page_run(tmp_path, monkeypatch):
    pytest.importorskip("torch_harmonics", reason="pip install 'squall[sphere]'")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "sphere.md").read_text()
    names: dict = {}
    exec(compile("".join(blocks(page, "python")), "page", "exec"), names)
    assert names["error"].shape == (9, 3)
    assert (tmp_path / "storms.gif").exists()
    unet, sfno, ensemble = map(yaml.safe_load, blocks(page, "yaml"))
    assert from_dict(unet).model.name == "unet"
    size = ["--latitudes", "16", "--longitudes", "32", "--step", "900", "--trajectories", "7", "--steps", "4"]
    assert main(["simulate", "shallow-water", "--start", "vortices", "--out", "vortices.nc", *size]) == 0
    sfno["model"]["arguments"] |= {"img_size": [16, 32], "embed_dim": 4}
    sfno["training"] |= {"steps": 2, "batch": 2}
    Path("sfno.yaml").write_text(yaml.safe_dump(sfno))
    assert main(["train", "--config", "sfno.yaml", "--out", "sfno", "--device.accelerator", "cpu"]) == 0
    run = squall.open_run("sfno")
    states = run.predict(run.experiment.split.test.read()[:, 0], 3)
    assert states.shape == (4, 4, 3, 16, 32)
    assert states.isfinite().all()
    ensemble["model"]["arguments"] |= {"width": 4}
    ensemble["training"] |= {"steps": 2, "batch": 2}
    Path("ensemble.yaml").write_text(yaml.safe_dump(ensemble))
    assert main(["train", "--config", "ensemble.yaml", "--out", "ensemble", "--device.accelerator", "cpu"]) == 0
    run = squall.open_run("ensemble")
    members = run.predict(run.experiment.split.test.read()[:1, 0].repeat(8, 1, 1, 1), 3)
    assert (members[0] - members[1]).abs().max() > 0
    scores = [evaluate_runs(["ensemble"], steps=2)[0]["checkpoints"] for _ in range(2)]
    assert scores[0] == scores[1]  # an evaluation draws the noise of its seed


def test_the_configuration_of_the_page_is_one():
    (page,) = blocks(TRAINING, "yaml")
    assert from_dict(yaml.safe_load(page)).loss.temperature == 0.1


@pytest.mark.parametrize("page", [TRAINING, README + DIAGNOSE + RIVALS], ids=["training", "readme, diagnose, rivals"])
def test_the_commands_of_the_page_are_understood(page, tmp_path, monkeypatch):
    """They run in their order, on small sizes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    for text in blocks(TRAINING, "yaml"):
        (tmp_path / "ch.yaml").write_text(text)
    (tmp_path / "my_losses.py").write_text(blocks(RIVALS, "python")[1])
    draw = torch.Generator().manual_seed(0)
    squall.data.write("mine.hdf5", torch.randn(18, 12, 1, 8, 8, generator=draw), dt=0.1)
    Path("mine.hdf5").rename("mine.nc")  # a format is recognised by its content
    small = {
        "simulate": ["--trajectories", "18", "--steps", "12", "--points", "8"],
        "train": ["--training.steps", "2", "--training.batch", "4"],
    }
    commands = [line for text in blocks(page, "sh") for line in text.replace("\\\n", " ").splitlines()]
    ours = [shlex.split(line, comments=True) for line in commands if line.startswith("squall ")]
    assert ours
    for _, command, *words in ours:
        shutil.rmtree("diagnosis", ignore_errors=True)  # of the page before
        assert main([command, *words, *small.get(command, [])]) == 0, (command, words)


def test_the_programs_of_the_export_page_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--trajectories", "8", "--steps", "12", "--points", "16"]
    assert main(["simulate", "cahn-hilliard", "--out", "ch.hdf5", *small]) == 0
    words = "--data.path ch.hdf5 --data.validation 1 --data.test 1 --training.batch 4 --training.steps 2 --out runs/ch"
    assert main(["train", *words.split(), "--device.accelerator", "cpu"]) == 0
    page = (ROOT / "docs" / "export.md").read_text()
    (command,) = blocks(page, "sh")
    assert main(shlex.split(command)[1:]) == 0
    names = {"initial": torch.zeros(2, 1, 16)}
    exec(compile("".join(blocks(page, "python")), "page", "exec"), names)
    assert names["trajectories"].shape == (2, 101, 1, 16)
    assert names["u"].shape == (2, 1, 16)


def test_the_configurations_of_the_models_page_are_some():
    assert [from_dict(yaml.safe_load(text)).model.name for text in blocks(MODELS, "yaml")] == ["unet"]


def test_the_commands_of_the_page_on_long_rollouts_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    for name, trajectories, times in (("waves", 6, 10), ("weather", 1, 60)):
        states = torch.randn(trajectories, times, 1, 16, generator=generator, dtype=torch.float64)
        conditions = {"viscosity": torch.rand(trajectories, generator=generator)} if name == "waves" else None
        squall.data.write(f"{name}.hdf5", states, dt=0.1, conditions=conditions)
    (text,) = blocks(LONG, "yaml")
    Path("waves.yaml").write_text(text)
    small = ["--training.steps", "3", "--training.warmup", "1", "--training.batch", "4"]
    for line in "".join(blocks(LONG, "sh")).splitlines():
        _, command, *words = shlex.split(line)
        assert main([command, *words, *(small if command == "train" else [])]) == 0, line


def test_the_study_of_the_page_is_one(tmp_path):
    page = (ROOT / "docs" / "study.md").read_text()
    (text,) = blocks(page, "yaml")
    (tmp_path / "study.yaml").write_text(text)
    assert len(read_study(tmp_path / "study.yaml").trials) == 2 * 4 * 3
    for program in blocks(page, "python"):
        exec(compile(program, "page", "exec"), {})


def pages() -> dict[str, str]:
    return {page.name: page.read_text() for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))}


def test_every_block_of_every_page_is_run_or_says_why_not():
    fences = {
        name: re.findall(r"^ *```([^\n{]+)\n.*?^ *```", text, re.DOTALL | re.MULTILINE)
        for name, text in pages().items()
    }
    found = {(name, language) for name, languages in fences.items() for language in languages}
    run = {(name, language) for name, languages in RUN.items() for language in languages}
    assert found == run | NOT_RUN.keys()


def test_every_command_of_every_page_is_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ch.yaml", "waves.yaml"):
        Path(name).write_text("integrator: euler")
    for name, text in pages().items():
        lines = "".join(blocks(text, "sh")).replace("\\\n", " ").splitlines()
        for words in (shlex.split(line.replace("-m squall.cli", "squall"), comments=True) for line in lines):
            if "squall" in words and "pip" not in words:
                command, *options = words[words.index("squall") + 1 :]
                parser = importlib.import_module(f"squall.cli.{command}").parser()
                assert parser.parse_args(options), (name, words)


def test_links_lead_to_files_of_the_project():
    """In a clean checkout also: a file that git ignores is not there."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
