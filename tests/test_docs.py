"""The pages' own commands and programs run as they stand."""

import re
import shlex
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
ADAPTERS = (ROOT / "docs" / "adapters.md").read_text()
README = (ROOT / "README.md").read_text()
SYSTEMS = (ROOT / "docs" / "systems.md").read_text()
MODELS = (ROOT / "docs" / "models.md").read_text()
LONG = (ROOT / "docs" / "long_rollouts.md").read_text()
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text()


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
        *blocks(ADAPTERS, "python"),
        *blocks(README, "python"),
        "".join(blocks(SYSTEMS, "python")),
    ],
    ids=lambda text: text[:20],
)
def test_a_program_runs(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "page", "exec"), {})


def test_the_page_about_evaluation_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for language, text in re.findall(r"```(python|sh)\n(.*?)```", EVALUATION, flags=re.DOTALL):
        if language == "python":
            exec(compile(text, "page", "exec"), names)
        for _, *words in map(shlex.split, text.replace("\\\n", " ").splitlines() if language == "sh" else ()):
            assert main(words) == 0, words
    assert names["found"].rollout["trajectories"] == 9
    assert names["found"].scores["nrmse"]["height"] < 0.1
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


@pytest.mark.parametrize("page", [TRAINING, README], ids=["training", "readme"])
def test_the_commands_of_the_page_are_understood(page, tmp_path, monkeypatch):
    """They run in their order, on small sizes."""
    monkeypatch.chdir(tmp_path)
    for text in blocks(TRAINING, "yaml"):
        (tmp_path / "ch.yaml").write_text(text)
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


def test_links_lead_to_files_of_the_project():
    """In a clean checkout also: a file that git ignores is not there."""
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"
