"""The loss in the trainers of others, with the real packages where they are installed.

Each is trained with `torch.nn.MSELoss`, with the loss at an infinite temperature, which has to end at the same weights,
and with the default loss, which has to end elsewhere.
"""

import math
import sys
import types
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import squall.data
from squall import ImbalanceAwareLoss
from squall.adapters import anemoi, neuraloperator, pina, the_well
from squall.losses import Accumulation

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the packages

Train = Callable[[nn.Module], torch.Tensor]


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randn(2, 12, 1, 16, generator=torch.Generator().manual_seed(0))
    return x, y.pow(3)


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Conv1d(1, 1, 3, padding=1)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat(
        [
            torch.view_as_real(p.detach()).flatten() if p.is_complex() else p.detach().flatten()
            for p in model.parameters()
        ]
    )


def check(train: Train, rtol: float = 0.0) -> None:
    plain, limit, ours = (train(loss) for loss in (nn.MSELoss(), ImbalanceAwareLoss(math.inf), ImbalanceAwareLoss()))
    torch.testing.assert_close(limit, plain, rtol=rtol, atol=rtol)
    assert (ours - plain).abs().max() > 1e-4


def test_neuraloperator(capsys):
    training = pytest.importorskip("neuralop.training")
    x, y = data()
    batches = DataLoader([{"x": a, "y": b} for a, b in zip(x, y, strict=True)], batch_size=4)

    def train(loss: nn.Module) -> torch.Tensor:
        model = Named(network())
        trainer = training.Trainer(model=model, n_epochs=2, device="cpu", verbose=False)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        trainer.train(batches, {}, optimizer, _Constant(optimizer), training_loss=neuraloperator(loss))
        return weights(model)

    check(train)


class Named(nn.Module):
    """Takes the sample's names as keyword arguments, as neuraloperator's models."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, **sample: torch.Tensor) -> torch.Tensor:
        return self.model(x)


class _Constant(torch.optim.lr_scheduler.LambdaLR):
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, lambda epoch: 1.0)


def test_neuraloperator_reports_the_mean_over_samples():
    x, y = data()
    loss = neuraloperator(ImbalanceAwareLoss())
    assert loss.reduction == "sum"
    torch.testing.assert_close(loss(x, x=None, y=y) / 12, ImbalanceAwareLoss()(x, y))


def test_the_well(tmp_path, monkeypatch):
    """The benchmark's own Trainer, on files in its layout: an epoch, and a validation, which reports the MSE."""
    training = pytest.importorskip("the_well.benchmark.trainer.training")
    from the_well.benchmark.metrics import MSE
    from the_well.data import WellDataModule

    monkeypatch.setattr(training, "validation_plots", [])
    u = torch.randn(3, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0)).pow(3).numpy()
    for part in ("train", "valid", "test"):
        squall.data.write(tmp_path / "active_matter" / "data" / part / "u.hdf5", u, dt=1.0)
    options = {"n_steps_input": 1, "n_steps_output": 1, "use_normalization": False, "data_workers": 0}
    files = WellDataModule(str(tmp_path), "active_matter", batch_size=3, **options)
    validated = []

    def train(loss: nn.Module) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Conv2d(1, 1, 3, padding=1)
            call = MSE() if isinstance(loss, nn.MSELoss) else the_well(loss)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            counts = dict.fromkeys(("epochs", "checkpoint_frequency", "val_frequency", "rollout_val_frequency"), 1)
            counts |= {"max_rollout_steps": 1, "short_validation_length": 1, "num_time_intervals": 1}
            trainer = training.Trainer(
                "", "", "", "channels_first_default", model, files, optimizer, call, make_rollout_videos=False,
                device=torch.device("cpu"), **counts,
            )  # fmt: skip
            trainer.train_one_epoch(1, files.train_dataloader())
        validated.append(trainer.validation_loop(files.val_dataloader(), full=True)[0])
        return weights(model)

    check(train, rtol=1e-6)
    assert validated[1] == pytest.approx(validated[0])


@pytest.fixture
def without_timm(monkeypatch):
    """physicsnemo imports all its models at once, some of which take layers from timm, and timm imports torchvision.
    The torchvision of PyPI needs CUDA and does not import beside a CPU build of PyTorch. The FNO uses none of it."""
    layers = {
        "timm": (),
        "timm.layers": ("RmsNorm", "to_2tuple"),
        "timm.layers.attention": ("Attention",),
        "timm.models": (),
        "timm.models.swin_transformer": ("SwinTransformerStage",),
    }
    for name, classes in layers.items():
        module = types.ModuleType(name)
        vars(module).update({each: type(each, (nn.Module,), {}) for each in classes})
        monkeypatch.setitem(sys.modules, name, module)


def test_physicsnemo_needs_no_adapter(without_timm):
    fno = pytest.importorskip("physicsnemo.models.fno", exc_type=ImportError)
    x, y = data()
    sizes = {"latent_channels": 4, "num_fno_layers": 1, "num_fno_modes": 3, "padding": 0, "decoder_layer_size": 4}

    def train(loss: nn.Module) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = fno.FNO(in_channels=1, out_channels=1, dimension=1, **sizes)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
        return weights(model)

    check(train)


def test_pina():
    package = pytest.importorskip("pina")
    from pina.problem.zoo import SupervisedProblem
    from pina.solver import SupervisedSolver

    x, y = (z.reshape(-1, 2) for z in data())

    def train(loss: nn.Module) -> torch.Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Linear(2, 2)
        solver = SupervisedSolver(SupervisedProblem(x, y), model, loss=pina(loss), use_lt=False)
        options = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
        package.Trainer(solver, max_epochs=20, accelerator="cpu", batch_size=None, **options).train()
        return weights(model)

    check(train)
    labelled = (package.LabelTensor(z, ["a", "b"]) for z in (x, y))
    assert pina(ImbalanceAwareLoss())(*labelled) == ImbalanceAwareLoss()(x, y)


def test_anemoi():
    pytest.importorskip("anemoi.training.losses.base", exc_type=ImportError)
    from anemoi.training.losses import MSELoss

    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 2, 1, 20, 4, generator=generator)  # (bs, time, ens, grid, vars)
    area, importance = torch.rand(20, generator=generator), torch.rand(4, generator=generator)
    theirs, limit, ours = MSELoss(), anemoi(ImbalanceAwareLoss(math.inf)), anemoi(ImbalanceAwareLoss())
    for loss in (theirs, limit, ours):
        loss.add_scaler(3, area / area.sum(), name="area")
        loss.add_scaler(4, importance, name="variable")
    for options in ({}, {"squash_mode": "sum"}, {"without_scalers": ["variable"]}, {"squash": False}):
        torch.testing.assert_close(limit(prediction, target, **options), theirs(prediction, target, **options))
    assert ours(prediction, target) > theirs(prediction, target)
    flat = [x.movedim(-1, 1).flatten(2) for x in (prediction, target)]
    measure = (area / area.sum() * importance[:, None]).repeat(1, 2)
    weighed = ImbalanceAwareLoss()(*flat, measure=measure)
    plain = ImbalanceAwareLoss(math.inf)(*flat, measure=measure)
    torch.testing.assert_close(ours(prediction, target) / theirs(prediction, target), weighed / plain)
    with pytest.raises(ValueError, match="the grid is sharded"):
        ours(prediction, target, grid_shard_slice=slice(0, 10))


def loader() -> DataLoader:
    return DataLoader(TensorDataset(*data()), batch_size=4)


def test_lightning_needs_no_adapter():
    lightning = pytest.importorskip("lightning")

    def train(loss: nn.Module) -> torch.Tensor:
        class Module(lightning.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.model, self.loss = network(), loss

            def training_step(self, batch, index):
                return self.loss(self.model(batch[0]), batch[1])

            def configure_optimizers(self):
                return torch.optim.Adam(self.model.parameters(), lr=1e-2)

        module = Module()
        options = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
        lightning.Trainer(max_epochs=2, accelerator="cpu", **options).fit(module, loader())
        return weights(module.model)

    check(train)


def test_accelerate_needs_no_adapter():
    accelerate = pytest.importorskip("accelerate")

    def train(loss: nn.Module) -> torch.Tensor:
        accelerator = accelerate.Accelerator(cpu=True)
        model = network()
        model, optimizer, batches = accelerator.prepare(model, torch.optim.Adam(model.parameters(), lr=1e-2), loader())
        for x, y in batches:
            accelerator.backward(loss(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        return weights(accelerator.unwrap_model(model))

    check(train)


def test_accumulation_in_accelerate_is_exact_with_two_calls():
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    start, (x, y), loss = network(), data(), ImbalanceAwareLoss()
    loss(start(x), y).backward()  # the whole batch at once
    model, batches = accelerator.prepare(network(), loader())
    parts, whole = list(batches), Accumulation(loss)
    with torch.no_grad():
        for a, b in parts:
            whole.observe(model(a), b)
    for a, b in parts:
        with accelerator.accumulate(model):  # whose backward divides by the number of parts
            accelerator.backward(len(parts) * whole.loss(model(a), b))
    torch.testing.assert_close(*([p.grad for p in m.parameters()] for m in (accelerator.unwrap_model(model), start)))


def test_deepxde_needs_no_adapter(monkeypatch):
    monkeypatch.setenv("DDE_BACKEND", "pytorch")
    deepxde = pytest.importorskip("deepxde", exc_type=ImportError)
    x, y = (z.reshape(-1, 2).numpy() for z in data())

    def train(loss: nn.Module) -> torch.Tensor:
        deepxde.config.set_random_seed(0)
        net = deepxde.nn.FNN([2, 4, 2], "tanh", "Glorot normal")
        model = deepxde.Model(deepxde.data.DataSet(X_train=x, y_train=y, X_test=x, y_test=y), net)
        model.compile("adam", lr=1e-2, loss=loss, verbose=0)
        model.train(iterations=5, verbose=0)
        return weights(net)

    check(train)
