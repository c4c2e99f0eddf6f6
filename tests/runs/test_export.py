"""An exported model: the same rollouts here, in a program without squall, and in Earth2Studio's loop."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_program
from shortcuts import without_shape_checks

import squall
import squall.data
from squall.adapters import earth2studio
from squall.cli import main
from squall.runs.config import ConfigError
from squall.runs.emulator import DESCRIPTION, PROGRAM, WEIGHTS, ExportError

pytestmark = pytest.mark.usefixtures("undrawn")

EXPORT = ("torch._dynamo", "torch.export")
TRAINING = "--data.validation 1 --data.test 1 --training.batch 8 --training.steps 6 --training.validate_every 3"


def train(tmp_path: Path, *options: str, channels: int = 1, space: tuple[int, ...] = (16,)) -> Path:
    path, out = tmp_path / "u.hdf5", tmp_path / "run"
    states = 1 + np.random.default_rng(0).normal(size=(6, 7, channels, *space))
    squall.data.write(path, states, dt=0.01, lengths=space)
    words = ["train", "--data.path", str(path), *TRAINING.split(), "--device.accelerator", "cpu", "--out", str(out)]
    assert main([*words, *options]) == 0
    return out


def initial(emulator: squall.Emulator, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, *emulator.state_shape, generator=torch.Generator().manual_seed(1))


MODELS = {
    "hnn": ({"model.name": "hnn", "model.structure": "laplacian", "model.hidden": "6"}, 1, (16,)),
    "node": ({"model.name": "node", "model.hidden": "6", "integrator": "rk4"}, 2, (8, 6)),
    "unet": (
        {
            "model.name": "squall.models.UNet",
            "model.arguments": "{channels: 2, dimensions: 1, width: 4}",
            "model.predicts": "state",
        },
        2,
        (16,),
    ),
    "fno": (
        {
            "model.name": "squall.models.FNO",
            "model.arguments": "{channels: 1, dimensions: 1, modes: 4, width: 4, layers: 1}",
            "device.precision": "64-true",
        },
        1,
        (15,),
    ),
}

WITHOUT_SQUALL = """
import sys, torch
sys.modules["squall"] = None
step = torch.export.load(sys.argv[1]).module().forward
states = torch.load(sys.argv[2], weights_only=True)
trajectory = [states]
for _ in range(10):
    trajectory.append(step(trajectory[-1]))
torch.save(torch.stack(trajectory, 1), sys.argv[3])
try:
    step(states[..., :-1])
except AssertionError as error:
    print(error)
try:
    import squall
except ImportError:
    print("squall cannot be imported")
"""


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_model_rolls_out_alike_with_and_without_squall(tmp_path, name):
    pytest.importorskip("neuralop") if name == "fno" else None
    options, channels, space = MODELS[name]
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    run, out = train(tmp_path, *words, channels=channels, space=space), tmp_path / "out"
    with without_shape_checks():
        assert main(["export", str(run), "--out", str(out)]) == 0
    trained = squall.open_run(run)
    trained.load()
    (tmp_path / "u.hdf5").unlink()
    shutil.rmtree(run)

    emulator = squall.load(out)
    states = initial(emulator).to(next(emulator.parameters()).dtype)
    expected = trained.predict(states, 10)
    assert torch.equal(emulator.rollout(states, 10), expected)

    torch.save(states, tmp_path / "initial.pt")
    files = (out / PROGRAM, tmp_path / "initial.pt", tmp_path / "result.pt")
    result = run_program(WITHOUT_SQUALL, *files, modules=EXPORT, folder=tmp_path)
    assert "squall cannot be imported" in result.stdout, result.stderr
    assert re.search(rf"Guard failed: u.*== {space[-1]}", result.stdout), result.stdout
    given = torch.load(tmp_path / "result.pt", weights_only=True)
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)


WITH_CONDITIONS = """
import sys, torch
sys.modules["squall"] = None
step = torch.export.load(sys.argv[1]).module().forward
window, conditions = torch.load(sys.argv[2], weights_only=True)
trajectory = [*window.unbind(1)]
for n in range(conditions.shape[1]):
    trajectory.append(step(torch.stack(trajectory[-2:], 1), conditions[:, n]))
torch.save(torch.stack(trajectory[1:], 1), sys.argv[3])
"""


def test_a_model_with_history_conditions_and_a_mask_rolls_out_alike_with_and_without_squall(tmp_path, capsys):
    draw, path, out = np.random.default_rng(0), tmp_path / "u.hdf5", tmp_path / "out"
    conditions = {"sun": draw.normal(size=(4, 9)), "depth": draw.random(16)}
    mask = np.arange(16) > 3
    states = draw.normal(size=(4, 9, 1, 16))
    squall.data.write(path, states, dt=0.1, conditions=conditions, mask=mask)
    model = ["--model.name", "unet", "--model.arguments", "{width: 4}", "--model.predicts", "state"]
    sees = ["--data.history", "2", "--data.inputs", "[sun, depth]", "--data.path", str(path)]
    words = ["train", *model, *sees, *TRAINING.split(), "--device.accelerator", "cpu", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    with without_shape_checks():
        assert main(["export", str(tmp_path / "run"), "--out", str(out)]) == 0
    assert "no model.pt2" not in capsys.readouterr().err
    sun = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    window = torch.randn(3, 2, 1, 16, generator=torch.Generator().manual_seed(1))
    trained = squall.open_run(tmp_path / "run")
    expected = trained.predict(window, 5, {"sun": sun})
    path.unlink()
    shutil.rmtree(tmp_path / "run")

    emulator = squall.load(out)
    depth = torch.tensor(conditions["depth"], dtype=torch.float32).expand(3, 5, 16)
    held = torch.stack([sun[:, :, None].expand(3, 5, 16), depth], 2)
    assert torch.equal(emulator.rollout(window, 5, held), expected)
    masked = ~torch.from_numpy(mask)
    assert torch.equal(expected[:, 5][..., masked], window[:, 1][..., masked])

    torch.save((window, held), tmp_path / "initial.pt")
    files = (out / PROGRAM, tmp_path / "initial.pt", tmp_path / "result.pt")
    result = run_program(WITH_CONDITIONS, *files, modules=EXPORT, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    given = torch.load(tmp_path / "result.pt", weights_only=True)
    torch.testing.assert_close(given, expected, rtol=1e-6, atol=1e-6)

    card = (out / "README.md").read_text()
    assert "their channels are sun, depth" in card
    with pytest.raises(ConfigError, match=r"takes conditions \(batch, steps \(5\) or 1, 2, 16\) of sun, depth; none"):
        emulator.rollout(window, 5)
    with pytest.raises(ConfigError, match=r"must have \(batch, 2, 1, 16\)"):
        emulator.rollout(window[:, 0], 5, held)
    with pytest.raises(ValueError, match="Earth2Studio gives one state"):
        earth2studio(emulator, np.timedelta64(6, "h"))
    (out / "data.npz").write_bytes(b"")
    with pytest.raises(ExportError, match=r"data\.npz"):
        squall.load(out)


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    run = train(folder, "--model.hidden", "4")
    assert main(["evaluate", str(run)]) == 0
    assert main(["export", str(run), "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_the_card_names_data_metrics_limits_and_checksums(exported):
    card = (exported / "README.md").read_text()
    about = json.loads((exported / DESCRIPTION).read_text())
    for title in ("Data", "Training", "Metrics", "Intended use", "Limits", "Use"):
        assert f"\n## {title}\n" in card
    evaluation = json.loads((exported.parent / "run" / "evaluation.json").read_text())
    found = next(x for x in evaluation["checkpoints"].values() if x["step"] == about["checkpoint"]["step"])
    assert f"| rollout: states | {found['rollout']['states']:.3g} |" in card
    assert about["files"][WEIGHTS] in card
    assert evaluation["data"]["sha256"] in card
    assert str(exported.parent) not in card + json.dumps(about), "where the data were is nobody's business"


def test_nothing_is_overwritten(exported, capsys):
    before = {path.name: path.read_bytes() for path in exported.iterdir()}
    assert main(["export", str(exported.parent / "run"), "--out", str(exported)]) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before


def test_states_of_another_grid_are_refused(exported):
    with pytest.raises(ConfigError, match=r"shape \(2, 1, 8\), but must have \(batch, 1, 16\)"):
        squall.load(exported).rollout(torch.zeros(2, 1, 8), 1)


# Folders of strangers


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def change(folder: Path, **values) -> None:
    path = folder / DESCRIPTION
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_program_is_never_opened(copy):
    (copy / PROGRAM).write_bytes(b"anything")
    squall.load(copy)


def test_weights_that_are_not_those_of_the_description_are_refused(copy):
    content = bytearray((copy / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (copy / WEIGHTS).write_bytes(content)
    with pytest.raises(ExportError, match="does not match its checksum"):
        squall.load(copy)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2}, "format 2, but this squall reads 1"),
        ({"files": {}}, "damaged"),
        ({"data": {"dt": 0.1}}, "damaged"),
        ({"normalization": {"mean": [0.0, 1.0], "std": [1.0, 1.0]}}, "cannot take states"),
        ({"config": {"modle": 1}}, "did you mean 'model"),
        ({"state": {"no_such_key": 1}}, "damaged"),
    ],
)
def test_a_description_that_is_damaged_is_an_error(copy, values, message):
    change(copy, **values)
    with pytest.raises(ValueError, match=message):
        squall.load(copy)


def test_a_folder_of_a_stranger_runs_no_code(copy, monkeypatch):
    (copy.parent / "theirs.py").write_text(
        "import pathlib, torch\npathlib.Path('ran').touch()\nModel = torch.nn.Identity"
    )
    monkeypatch.chdir(copy.parent)
    config = json.loads((copy / DESCRIPTION).read_text())["config"]
    config["model"] |= {"name": "theirs.Model", "hidden": 200}
    change(copy, config=config)
    with pytest.raises(ConfigError, match="Its code would run"):
        squall.load(copy)
    assert not Path("ran").exists()
    assert "theirs" not in sys.modules


def test_a_folder_that_is_no_export_is_named(tmp_path):
    with pytest.raises(ExportError, match="`squall export` writes one"):
        squall.load(tmp_path)


# What torch.export cannot take

MODULE = """
import torch
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
    def forward(self, u):
        if u.sum().item() > 1e9:
            return u
        return -self.scale * u
class Noisy(Model):
    def forward(self, u):
        return self.scale * torch.randn_like(u)
class Odd(Model):
    def get_extra_state(self):
        return {"a": {1, 2}}
    def set_extra_state(self, state):
        pass
"""


STOPS = r"torch\.export stops in `if u\.sum\(\)\.item\(\) > 1e9:` \(branching\.py, line 8\)"


@pytest.mark.parametrize(("name", "reason"), [("Model", STOPS), ("Noisy", "differs from")])
def test_a_model_that_cannot_be_exported_keeps_its_weights(tmp_path, monkeypatch, capsys, name, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "branching.py").write_text(MODULE)
    run = train(tmp_path, "--model.name", f"branching.{name}")
    assert main(["export", str(run), "--out", "out"]) == 0
    text = " ".join(capsys.readouterr().err.split())
    assert re.search(f"the weights are written, but no {PROGRAM}: .*{reason}", text), text
    assert sorted(path.name for path in Path("out").iterdir()) == ["README.md", DESCRIPTION, WEIGHTS]
    assert f"There is no {PROGRAM}" in Path("out/README.md").read_text()
    assert squall.load("out", trust=True).rollout(torch.ones(1, 1, 16), 2).shape == (1, 3, 1, 16)
