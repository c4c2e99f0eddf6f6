import pytest
import torch
from problems import Stops, model, separating
from torch import nn

from squall._types import Score, Validation
from squall.data import InMemory, Transitions
from squall.integrators import discrete_gradient, euler, implicit_midpoint, midpoint, next_state, rollout
from squall.losses import ImbalanceAwareLoss, MeanSquaredError
from squall.training.loop import Recorder, TrainingDiverged, TrainingSettings, train
from squall.training.settings import adam
from squall.training.state import load_optimizer

DT = 0.05


def decay() -> Transitions:
    """Trajectories of u_t = −u by Euler's method."""
    first = torch.randn(24, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Transitions(InMemory(rollout(euler, lambda u: -u, first, DT, 20), dt=DT))


def linear(seed: int = 0, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 8))


@pytest.mark.parametrize("residual", ["rate", "state"])
@pytest.mark.parametrize("loss", [MeanSquaredError, ImbalanceAwareLoss])
def test_training_learns_the_rate(residual, loss):
    transitions = decay()
    settings = TrainingSettings(200, 32, 2e-2, residual)
    result = train(linear(), transitions, settings, loss=loss())
    u, u_next = transitions.fetch(range(len(transitions)))
    error = (result.model(u.float()) - (u_next - u) / DT).square().mean()
    assert result.finished
    assert error < 0.05 * (u_next - u).div(DT).square().mean()


def test_an_interrupted_training_ends_with_the_same_bits():
    settings = TrainingSettings(30, 16, log_every=3, validate_every=10, checkpoint_every=5)
    whole = train(linear(dropout=0.3), decay(), settings, integrator=midpoint)
    recorder = Stops(4, 11, 12)
    for seed in (0, 9, 9, 9):  # what is resumed brings its own weights
        part = train(linear(seed, dropout=0.3), decay(), settings, integrator=midpoint, recorder=recorder)
    assert part.finished
    assert [checkpoint.step for checkpoint in recorder.saves if checkpoint.step % 5][:3] == [4, 11, 12]
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, part.model.state_dict()[name]), name


def test_different_seeds_train_different_models():
    weights = [
        train(linear(), decay(), TrainingSettings(3, 16, seed=seed)).model.state_dict()["0.weight"] for seed in range(2)
    ]
    assert not torch.equal(*weights)


def test_the_callers_randomness_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train(linear(dropout=0.5), decay(), TrainingSettings(2, 4))
    assert torch.equal(torch.rand(1), expected)


def test_the_rate_is_the_difference_of_the_data_before_it_is_rounded():
    """In float32 the difference of these states would be wrong by 6 %."""
    seen = []

    class Spy(MeanSquaredError):
        def forward(self, prediction, target, **options):
            seen.append(target)
            return super().forward(prediction, target, **options)

    u = (1.0 + 1e-6 * torch.arange(4, dtype=torch.float64)).reshape(1, 4, 1, 1).expand(1, 4, 1, 8)
    train(linear(), Transitions(InMemory(u, dt=1e-6)), TrainingSettings(1, 3), loss=Spy())
    torch.testing.assert_close(seen[0], torch.ones(3, 1, 8), rtol=1e-6, atol=0)


def test_a_model_of_the_next_state_is_trained_as_it_is():
    settings = TrainingSettings(300, 32, 3e-2, "state")
    result = train(nn.Linear(8, 8), decay(), settings, integrator=next_state, loss=MeanSquaredError())
    torch.testing.assert_close(result.model.weight, (1 - DT) * torch.eye(8), atol=0.02, rtol=0)


@pytest.mark.parametrize("residual", ["rate", "state"])
def test_an_implicit_step_takes_the_next_state_from_the_data(residual):
    """One evaluation a step, at the middle of both states, of which the truth is a zero of the loss."""
    first = torch.randn(24, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = rollout(implicit_midpoint, lambda u: -3 * u, first, 0.5, 20)
    rate, seen = nn.Linear(8, 8, dtype=torch.float64), []
    with torch.no_grad():
        rate.weight.copy_(-3 * torch.eye(8))
        rate.bias.zero_()
    rate.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    settings = TrainingSettings(2, 16, 1e-12, residual, log_every=1)
    transitions = Transitions(InMemory(truth, dt=0.5))
    result = train(rate, transitions, settings, loss=MeanSquaredError(), integrator=implicit_midpoint)
    assert len(seen) == 2
    assert max(line["loss"] for line in result.history) < 1e-24


def test_an_implicit_step_trains_through_several_steps_and_goes_on_to_the_same_bits():
    def trained(recorder: Recorder):
        settings = TrainingSettings(6, 8, unroll=2, recompute=True, checkpoint_every=3)
        network, data = model(0, dtype=torch.float32), Transitions(separating(2, 70), unroll=2)
        return train(network, data, settings, integrator=discrete_gradient, recorder=recorder), network

    whole, expected = trained(Recorder())
    recorder = Stops(4)
    trained(recorder)
    part, found = trained(recorder)
    assert whole.finished
    assert part.finished
    assert all(map(torch.equal, expected.state_dict().values(), found.state_dict().values()))
    assert not torch.equal(next(found.parameters()), next(model(0, dtype=torch.float32).parameters()))


def test_residuals_are_divided_by_the_scale_of_their_channel():
    state = torch.tensor([1.0, 1000.0]).reshape(1, 1, 2, 1) * torch.arange(5.0).reshape(1, 5, 1, 1)
    seen = []

    class Spy(MeanSquaredError):
        def forward(self, prediction, target, **options):
            seen.append(target)
            return super().forward(prediction, target, **options)

    train(
        nn.Linear(1, 1),
        Transitions(InMemory(state, dt=1.0)),
        TrainingSettings(1, 4),
        loss=Spy(),
        scale=(1.0, 1000.0),
    )
    torch.testing.assert_close(seen[0], torch.ones(4, 2, 1))


def test_the_best_is_what_validation_scores_best():
    scores = iter([Score(0, 3.0), Score(0, 1.0), Score(1, 0.1), Score(0, 2.0)])
    improved = []

    class Watch(Recorder):
        def improved(self, checkpoint, validation):
            improved.append((checkpoint.step, validation.score.error))

    result = train(
        linear(),
        decay(),
        TrainingSettings(8, 4, validate_every=2),
        validate=lambda model: Validation(next(scores), {"error": 0.0}),
        recorder=Watch(),
    )
    assert improved == [(2, 3.0), (4, 1.0)]
    assert result.best is not None
    assert result.best.step == 4


def test_metrics_have_a_line_per_log_step_with_the_report_of_the_loss():
    lines = train(linear(), decay(), TrainingSettings(10, 4, log_every=4)).history
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert {"loss", "temperature", "effective_fraction", "seconds"} <= lines[0].keys()


@pytest.mark.parametrize("loss", [MeanSquaredError, ImbalanceAwareLoss])
def test_divergence_stops_with_the_step(loss):
    optimizer_of = torch.optim.SGD
    model = linear()
    with pytest.raises(TrainingDiverged, match=r"diverged at step \d+.*smaller learning rate") as caught:
        train(
            model,
            decay(),
            TrainingSettings(100, 16),
            loss=loss(),
            optimizer=optimizer_of(model.parameters(), 1e12),
        )
    assert 1 <= caught.value.step <= 100


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "training.steps is 0, but must be at least 1"),
        ("batch", -3, "training.batch is -3"),
        ("learning_rate", float("nan"), "training.learning_rate is nan"),
        ("learning_rate", 0.0, "must be a positive number"),
        ("seed", -1, "training.seed is -1"),
    ],
)
def test_settings_that_cannot_be_are_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**{name: value})


def test_a_model_that_changes_the_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 1, 8\) to \(4, 1, 3\), but must keep the shape"):
        train(nn.Linear(8, 3), decay(), TrainingSettings(1, 4), integrator=next_state)


def test_the_old_name_of_the_integrator_still_works_and_warns():
    settings = TrainingSettings(2, 4)
    with pytest.warns(DeprecationWarning, match="`step` is now named `integrator`"):
        old = train(linear(), decay(), settings, step=midpoint)
    new = train(linear(), decay(), settings, integrator=midpoint)
    for name, weight in new.model.state_dict().items():
        assert torch.equal(weight, old.model.state_dict()[name]), name


def steps_of_adam(weight: nn.Parameter, states: list | None = None, steps: int = 3) -> torch.Tensor:
    """A few steps on a quadratic, from where a saved state ended."""
    optimizer = adam([weight], TrainingSettings(learning_rate=0.1), torch.device("cpu"))
    if states:
        load_optimizer(optimizer, states[-1])
    for _ in range(steps):
        optimizer.zero_grad()
        (weight * torch.arange(weight.numel()).reshape(weight.shape)).square().sum().backward()
        optimizer.step()
    if states is not None:
        states.append(optimizer.state_dict())
    return weight.detach().clone()


LAYOUTS = {
    "plain": lambda x: x.clone(memory_format=torch.contiguous_format),
    "transposed": lambda x: x.mT.contiguous().mT,
    "channels last": lambda x: x.clone(memory_format=torch.channels_last),
    "a slice": lambda x: torch.stack([x, x + 100], -1)[..., 0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_is_the_same_whatever_the_layout_of_a_weight(layout: str) -> None:
    first = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = steps_of_adam(nn.Parameter(first.clone()))
    torch.testing.assert_close(steps_of_adam(nn.Parameter(LAYOUTS[layout](first))), expected)


@pytest.mark.parametrize("after", LAYOUTS)
@pytest.mark.parametrize("before", LAYOUTS)
def test_an_optimiser_goes_on_in_another_layout(before: str, after: str) -> None:
    first = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    unbroken = steps_of_adam(nn.Parameter(first.clone()), steps=6)
    states: list = []
    half = steps_of_adam(nn.Parameter(LAYOUTS[before](first)), states)
    torch.testing.assert_close(steps_of_adam(nn.Parameter(LAYOUTS[after](half)), states), unbroken)


def test_a_state_of_an_optimiser_that_was_not_fused_goes_on() -> None:
    first = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    states: list = []
    half = steps_of_adam(nn.Parameter(first.clone()), states)
    states[-1]["param_groups"][0]["fused"] = None
    again = steps_of_adam(nn.Parameter(half), states)
    assert states[-1]["param_groups"][0]["fused"]
    torch.testing.assert_close(again, steps_of_adam(nn.Parameter(first.clone()), steps=6))
