"""Laws of the options of a training: unrolled steps, masks and areas, noise, accumulation, averages, schedules."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from problems import Stops
from torch import nn

from squall._types import Score, Validation
from squall.data import InMemory, Transitions
from squall.integrators import euler, midpoint, next_state, rollout
from squall.losses import ImbalanceAwareLoss, MeanSquaredError
from squall.losses.rivals import RBA
from squall.models.normalized import Normalized
from squall.training import Member, Recorder, TrainingSettings, UniformSampler, train, train_together
from squall.training.batches import Batches
from squall.training.settings import learning_rate_at
from squall.training.sharded import refuse_unshardable
from squall.training.unrolled import Unrolled

DT = 0.1


def source(trajectories: int = 6, points: int = 8, **about) -> InMemory:
    """Trajectories of u_t = −u + sin(u at the left)."""
    first = torch.randn(trajectories, 2, points, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    states = rollout(euler, lambda u: torch.sin(u).roll(1, -1) - u, first, DT, 10)
    return InMemory(states, dt=DT, **about)


def pointwise(inputs: int = 2, outputs: int = 2, seed: int = 0, dropout: float = 0.0) -> nn.Module:
    """A network that acts on every point of a 1-D grid by itself."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv1d(inputs, 8, 1), nn.Tanh(), nn.Dropout(dropout), nn.Conv1d(8, outputs, 1))


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())


def size_of_first_weight(model: nn.Module) -> Validation:
    return Validation(Score(0, next(model.parameters()).abs().sum().item()), {})


# Unrolled steps


@pytest.mark.parametrize("integrator", [euler, midpoint, next_state])
@pytest.mark.parametrize("residual", ["rate", "state"])
@pytest.mark.parametrize("recompute", [False, True])
def test_unrolled_gradients_are_those_of_autograd_through_a_rollout_by_hand(integrator, residual, recompute):
    settings = TrainingSettings(unroll=3, batch=4, residual=residual, recompute=recompute)
    model, transitions = pointwise().double(), Transitions(source(), unroll=3)
    batches = Batches(transitions, settings, [0.5, 2.0])
    batch = batches.draw(torch.arange(4))
    loss = MeanSquaredError()
    change = Unrolled(model, integrator, DT, settings)(batch.window)
    loss(*batches.compared(change, batch.window[:, -1], batch.target, batches.unit)).backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    states = transitions.windows(torch.arange(4))
    predicted = rollout(integrator, model, states[:, 0], DT, 3)[:, 1:]
    errors = (predicted - states[:, 1:]) / torch.tensor([0.5, 2.0]).reshape(2, 1)
    (errors / (DT if residual == "rate" else 1)).square().mean().backward()
    for gradient, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gradient", ["step", "pushforward"])
def test_gradients_stop_between_steps_where_they_are_asked_to(gradient):
    settings = TrainingSettings(unroll=3, batch=4, unroll_gradient=gradient)
    model, transitions = pointwise().double(), Transitions(source(), unroll=3)
    batches = Batches(transitions, settings, None)
    batch = batches.draw(torch.arange(4))
    change = Unrolled(model, midpoint, DT, settings)(batch.window)
    MeanSquaredError()(*batches.compared(change, batch.window[:, -1], batch.target, batches.unit)).backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    states = transitions.windows(torch.arange(4))
    u, errors = states[:, 0], []
    for n in range(3):
        u = midpoint(model, u.detach(), DT)
        errors.append((u - states[:, n + 1]) / DT)
    torch.stack(errors[-1:] if gradient == "pushforward" else errors).square().mean().backward()
    for mine, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-9, atol=1e-12)


def test_the_loss_weighs_all_lead_times_together():
    """Weights over batch, lead time and space sum to one: the value is that of the loss of all errors at once."""
    settings = TrainingSettings(unroll=3, batch=4, residual="state")
    model, transitions = pointwise().double(), Transitions(source(), unroll=3)
    batches = Batches(transitions, settings, None)
    batch = batches.draw(torch.arange(4))
    change = Unrolled(model, euler, DT, settings)(batch.window)
    prediction, target = batches.compared(change, batch.window[:, -1], batch.target, batches.unit)
    states = transitions.windows(torch.arange(4))
    by_hand = rollout(euler, model, states[:, 0], DT, 3)[:, 1:]
    assert prediction.shape == (4, 2, 3, 8)
    loss = ImbalanceAwareLoss(1.0)
    torch.testing.assert_close(loss(prediction, target), loss(by_hand, states[:, 1:]))


def test_a_model_sees_its_history_and_the_conditions_of_every_step():
    forcing = torch.randn(6, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    data = source(conditions={"wind": forcing})
    settings = TrainingSettings(unroll=2, batch=3)
    batches = Batches(Transitions(data, unroll=2, history=3), settings, None, ("wind",))
    seen = []

    class Watches(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.zeros_like(x[:, :2])

    batch = batches.draw(torch.tensor([0, 7, 12]))
    Unrolled(Watches(), euler, DT, settings)(batch.window, batch.conditions)
    windows = batches.transitions.windows(torch.tensor([0, 7, 12]))
    trajectories, starts = batches.transitions.locate(torch.tensor([0, 7, 12]))
    for n, x in enumerate(seen):
        assert x.shape == (3, 7, 8)
        assert torch.equal(x[:, 6, 0], forcing[trajectories, starts + 2 + n])
    Unrolled(Watches(), euler, DT, settings)(batch.window, batch.conditions[:, :1])  # one that is constant in time
    assert torch.equal(seen[3][:, 6], seen[2][:, 6])
    assert torch.equal(seen[0][:, :6], windows[:, :3].flatten(1, 2))
    assert torch.equal(seen[1][:, :6], torch.cat([windows[:, 1], windows[:, 2], windows[:, 2]], 1))


# Masks and areas


def test_an_ocean_whose_land_is_nan_trains_the_weights_of_the_ocean_alone():
    ocean = source()
    states = torch.full((6, 11, 2, 12), torch.nan, dtype=torch.float64)
    wet = torch.tensor([0, 1, 3, 4, 6, 7, 8, 11])
    states[..., wet] = ocean.read()
    area = torch.linspace(0.5, 2, 12, dtype=torch.float64)
    whole = InMemory(states, dt=DT, gaps=True, measure=area)
    alone = InMemory(ocean.read(), dt=DT, measure=area[wet])
    trained = []
    for data in (whole, alone):
        model = Normalized(pointwise().double(), [0.1, 0.2], [1.5, 0.7], mask=data.mask).double()
        settings = TrainingSettings(20, 16, 1e-2, unroll=2, input_noise=0.0)
        trained.append(train(model, Transitions(data, unroll=2), settings, scale=[1.5, 0.7]).model)
    for name, weight in trained[1].model.state_dict().items():
        torch.testing.assert_close(trained[0].model.state_dict()[name], weight, rtol=1e-7, atol=1e-9)


def test_a_loss_that_takes_no_mask_is_refused_for_masked_data():
    class Plain(nn.Module):
        def forward(self, prediction, target):
            return (prediction - target).square().mean()

    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 0] = False
    with pytest.raises(ValueError, match="points are masked, but Plain takes no mask"):
        train(pointwise(), Transitions(source(mask=mask)), TrainingSettings(1, 4), loss=Plain())


def test_without_areas_the_loss_counts_all_points_alike():
    trained = []
    for areas, measure in ((True, None), (False, torch.linspace(0.5, 2, 8, dtype=torch.float64))):
        settings = TrainingSettings(5, 16, 1e-2, areas=areas)
        trained.append(train(pointwise(), Transitions(source(measure=measure)), settings).model)
    assert same_weights(*trained)


def test_a_loss_of_several_forecasts_sees_every_transition_once_for_each():
    seen = []

    class Ensemble(nn.Module):
        members = 3

        def forward(self, prediction, target):
            seen.append((prediction.detach().unflatten(0, (3, -1)), target.unflatten(0, (3, -1))))
            return (prediction - target).square().mean()

    settings = TrainingSettings(1, 4, unroll=2)
    train(pointwise(dropout=0.5), Transitions(source(), unroll=2), settings, loss=Ensemble())
    ((prediction, target),) = seen
    assert target.shape == (3, 4, 2, 2, 8)
    assert torch.equal(target, target[:1].expand_as(target))
    assert not torch.equal(prediction[0], prediction[1])  # each has its own draw


def test_a_loss_that_remembers_samples_is_given_their_numbers():
    transitions = Transitions(source())
    loss = RBA((len(transitions), 2, 8))
    train(pointwise(), transitions, TrainingSettings(2, 4), loss=loss)
    touched = loss.memory.flatten(1).any(1).nonzero().flatten()
    drawn = np.concatenate([np.random.default_rng((0, n)).choice(60, 4, replace=False, shuffle=False) for n in (0, 1)])
    assert set(touched.tolist()) == set(drawn.tolist())


def test_trainings_as_one_batch_leave_masked_points_out_and_count_areas_as_each_by_itself():
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 2:5] = False
    transitions = Transitions(source(mask=mask, measure=torch.linspace(1, 2, 8, dtype=torch.float64)))
    settings, sampler = TrainingSettings(8, 12, 1e-2), UniformSampler(len(transitions), 12)
    losses = [MeanSquaredError, ImbalanceAwareLoss, lambda: ImbalanceAwareLoss(0.5)]
    members = [Member(pointwise(seed=i).double(), loss(), sampler) for i, loss in enumerate(losses)]
    train_together(members, transitions, settings)
    for i, loss in enumerate(losses):
        model = train(pointwise(seed=i).double(), transitions, settings, loss=loss()).model
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(members[i].model.state_dict()[name], weight, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("option", [{"unroll": 2}, {"clip": 1.0}, {"average": 0.9}, {"schedule": "cosine"}])
def test_options_of_a_training_by_itself_are_refused_for_many_as_one(option):
    settings = TrainingSettings(2, 4, **option)
    transitions = Transitions(source(), unroll=settings.unroll)
    members = [Member(pointwise(), MeanSquaredError(), UniformSampler(len(transitions), 4)) for _ in range(2)]
    with pytest.raises(ValueError, match=f"training.{next(iter(option))} is set, which only a training by itself has"):
        train_together(members, transitions, settings)


# The step of the optimizer


@pytest.mark.parametrize(
    "loss",
    [
        ImbalanceAwareLoss(),
        ImbalanceAwareLoss(1.0, over="sample"),
        ImbalanceAwareLoss(over="lead"),
        MeanSquaredError(),
    ],
)
def test_a_minibatch_in_parts_has_the_gradient_of_the_whole(loss):
    trained = []
    for parts in (1, 3):
        settings = TrainingSettings(5, 16, 1e-2, accumulate=parts, unroll=2)
        transitions = Transitions(source(), unroll=2)
        trained.append(train(pointwise().double(), transitions, settings, loss=copy.deepcopy(loss)))
    for name, weight in trained[0].model.state_dict().items():
        torch.testing.assert_close(trained[1].model.state_dict()[name], weight, rtol=1e-6, atol=1e-9)
    losses = [result.history[-1]["loss"] for result in trained]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_gradient_above_the_norm_is_scaled_down_to_it():
    """By one step of plain gradient descent with rate 1, the weights move by the norm."""
    model = pointwise().double()
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    train(model, Transitions(source()), TrainingSettings(1, 8, clip=1e-3), optimizer=optimizer)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert moved.norm().item() == pytest.approx(1e-3, rel=1e-4)


def test_the_average_of_the_weights_is_the_exponential_one():
    decay, kept = 0.7, []

    class Watches(Recorder):
        def saved(self, checkpoint):
            kept.append(checkpoint)

    settings = TrainingSettings(4, 8, 1e-2, average=decay, checkpoint_every=1)
    model = train(pointwise().double(), Transitions(source()), settings, recorder=Watches()).model
    plain = []
    for steps in (1, 2, 3, 4):
        shorter = dataclasses.replace(settings, steps=steps, average=0.0)
        plain.append(train(pointwise().double(), Transitions(source()), shorter).model.state_dict())
    average = plain[0]
    for weights in plain[1:]:
        average = {name: decay * x + (1 - decay) * weights[name] for name, x in average.items()}
    for name, x in average.items():
        torch.testing.assert_close(model.state_dict()[name], x)
        torch.testing.assert_close(kept[-1].weights[name], x)
        assert torch.equal(kept[-1].state["trained"][name], plain[-1][name])


def test_validation_looks_at_the_average():
    seen = []

    def watch(model):
        seen.append(copy.deepcopy(model.state_dict()))
        return Validation(Score(0, 1.0), {})

    settings = TrainingSettings(3, 8, 1e-2, average=0.9, validate_every=3)
    result = train(pointwise().double(), Transitions(source()), settings, validate=watch)
    assert all(torch.equal(x, result.model.state_dict()[name]) for name, x in seen[0].items())


def test_schedules_follow_their_formulas():
    cosine = TrainingSettings(steps=100, warmup=20, schedule="cosine")
    assert learning_rate_at(9, cosine) == 0.5
    assert learning_rate_at(60, cosine) == pytest.approx(0.5)
    assert learning_rate_at(99, cosine) == pytest.approx((1 + np.cos(np.pi * 79 / 80)) / 2)
    steps = TrainingSettings(steps=100, schedule="step", decay_every=30, decay_factor=0.5)
    assert [learning_rate_at(n, steps) for n in (0, 29, 30, 60, 99)] == [1, 1, 0.5, 0.25, 0.125]


def test_the_learning_rate_of_a_step_reaches_the_optimizer_and_the_log():
    settings = TrainingSettings(8, 8, 1e-2, schedule="step", decay_every=2, decay_factor=0.5, log_every=1)
    history = train(pointwise(), Transitions(source()), settings).history
    assert [line["learning_rate"] for line in history] == pytest.approx([1e-2 * 0.5 ** (n // 2) for n in range(8)])


def test_weight_decay_shrinks_the_weights_by_its_formula():
    """AdamW with a gradient of zero: w ← (1 − lr · decay) w."""
    model = pointwise()
    before = model[0].weight.detach().clone()
    for parameter in model[0].parameters():
        parameter.register_hook(torch.zeros_like)
    settings = TrainingSettings(3, 8, 0.1, optimizer="adamw", weight_decay=0.5)
    train(model, Transitions(source()), settings)
    torch.testing.assert_close(model[0].weight, before * 0.95**3)


def test_noise_follows_the_seed_and_the_step_and_has_the_given_size():
    settings = TrainingSettings(batch=40, input_noise=0.3)
    data = source(points=64)
    batches = Batches(Transitions(data), settings, None)
    drawn, again = batches.draw(torch.arange(40), 3), batches.draw(torch.arange(40), 3)
    clean = batches.transitions.windows(torch.arange(40))
    assert torch.equal(drawn.window, again.window)
    assert not torch.equal(drawn.window, batches.draw(torch.arange(40), 4).window)
    noise = (drawn.window - clean[:, :1]).std((0, 1, 3))
    std = data.read().transpose(2, 3).flatten(0, 2).std(0)
    torch.testing.assert_close(noise, 0.3 * std, rtol=0.05, atol=0)
    torch.testing.assert_close(drawn.window[:, 0] + DT * drawn.target, clean[:, 1])  # the target is the clean state
    shares = [batches.draw(torch.arange(40), 3, rank, 2).window for rank in range(2)]
    assert torch.equal(torch.stack(shares, 1).flatten(0, 1), drawn.window)


def test_wrong_targets_are_a_given_share_off_by_a_given_size_and_the_same_at_every_step_and_seed():
    options = {"batch": 40, "corrupt_share": 0.1, "corrupt_by": 2.0}
    data, numbers = source(points=64), torch.arange(40)
    batches = Batches(Transitions(data), TrainingSettings(**options), None)
    drawn, clean = batches.draw(numbers), Batches(Transitions(data), TrainingSettings(batch=40), None).draw(numbers)
    std = data.read().transpose(2, 3).flatten(0, 2).std(0, correction=0)
    off = DT * (drawn.target - clean.target) / (2 * std[:, None])
    wrong = off.abs() > 0.5
    torch.testing.assert_close(off[wrong].abs(), torch.ones_like(off[wrong]), rtol=1e-4, atol=0)
    assert off[~wrong].abs().max() < 1e-4
    assert 0.08 < wrong.double().mean() < 0.12
    assert 0.4 < (off[wrong] > 0).double().mean() < 0.6
    assert torch.equal(drawn.window, clean.window)
    later = Batches(Transitions(data), TrainingSettings(**options, seed=3), None).draw(numbers.flip(0), 7)
    assert torch.equal(later.target.flip(0), drawn.target)
    other = Batches(Transitions(data), TrainingSettings(**options, corrupt_seed=1), None).draw(numbers)
    assert not torch.equal(other.target, drawn.target)


def test_a_process_reads_only_the_transitions_of_its_share(monkeypatch):
    transitions, read = Transitions(source()), []
    fetch = transitions.fetch
    monkeypatch.setattr(transitions, "fetch", lambda indices: read.append(list(map(int, indices))) or fetch(indices))
    batches = Batches(transitions, TrainingSettings(batch=7), None)
    for rank in range(3):
        batches.draw(torch.arange(7), 0, rank, 3)
    assert read == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_training_ends_after_validations_without_a_better_score():
    scores = iter([3.0, 2.0, 2.5, 2.5, 1.0])
    settings = TrainingSettings(50, 8, validate_every=2, patience=2)
    result = train(
        pointwise(), Transitions(source()), settings, validate=lambda model: Validation(Score(0, next(scores)), {})
    )
    assert result.finished
    assert result.step == 8
    assert result.best.step == 4


# Resuming

EVERYTHING = TrainingSettings(
    steps=14,
    batch=12,
    learning_rate=1e-2,
    log_every=1,
    validate_every=3,
    checkpoint_every=5,
    unroll=3,
    recompute=True,
    input_noise=0.1,
    optimizer="adamw",
    weight_decay=0.1,
    schedule="cosine",
    warmup=3,
    clip=0.5,
    average=0.9,
    accumulate=2,
    patience=50,
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"unroll_gradient": "step"},
        {"unroll_gradient": "pushforward", "recompute": False, "schedule": "step", "decay_every": 4},
    ],
)
def test_a_killed_training_with_every_option_ends_with_the_same_bits(changes):
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, 2:5] = False
    forcing = torch.randn(6, 11, generator=torch.Generator().manual_seed(1))
    data = source(mask=mask, measure=torch.linspace(1, 2, 8, dtype=torch.float64), conditions={"wind": forcing})
    transitions = Transitions(data, unroll=3, history=2)
    settings = dataclasses.replace(EVERYTHING, **changes)

    def run(seed: int, recorder: Recorder):
        model = pointwise(5, seed=seed, dropout=0.3)
        return train(
            model,
            transitions,
            settings,
            integrator=midpoint,
            recorder=recorder,
            validate=size_of_first_weight,
            conditions=("wind",),
        )

    whole, recorder = run(0, Recorder()), Stops(1, 4, 7, 12)
    for seed in (0, 9, 9, 9, 9):  # what is resumed brings its own weights
        part = run(seed, recorder)
    assert part.finished
    assert same_weights(whole.model, part.model)
    assert whole.best.step == part.best.step
    assert all(torch.equal(x, part.best.weights[name]) for name, x in whole.best.weights.items())
    losses = {line["step"]: line["loss"] for line in whole.history if "loss" in line}
    assert {line["step"]: line["loss"] for line in part.history if "loss" in line}.items() <= losses.items()


def test_patience_is_remembered_by_a_resumed_training():
    settings = TrainingSettings(60, 8, validate_every=2, patience=3, checkpoint_every=100)
    transitions = Transitions(source())

    def ever_worse():
        scores = iter(range(100))
        return lambda model: Validation(Score(0, float(next(scores))), {})

    whole = train(pointwise(), transitions, settings, validate=ever_worse())
    recorder = Stops(4)
    train(pointwise(), transitions, settings, validate=ever_worse(), recorder=recorder)
    part = train(
        pointwise(), transitions, settings, validate=lambda m: Validation(Score(0, 9.0), {}), recorder=recorder
    )
    assert (whole.step, part.step) == (8, 8)
    assert part.finished
    assert same_weights(whole.model, part.model)


# Misuse


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unroll": 0}, "training.unroll is 0, but must be at least 1"),
        ({"unroll_gradient": "step"}, "unroll is 1"),
        ({"recompute": True}, "recompute is true, but unroll is 1"),
        ({"recompute": True, "unroll": 2, "unroll_gradient": "pushforward"}, "pushforward"),
        ({"weight_decay": 0.1}, "choose 'adamw'"),
        ({"schedule": "step"}, "set decay_every"),
        ({"decay_every": 3}, "choose 'step'"),
        ({"warmup": 10_000}, "must be less than steps"),
        ({"accumulate": 300}, "accumulate is 300, but batch is 200"),
        ({"patience": 1, "validate_every": 0}, "validate_every is 0"),
        ({"average": 1.0}, r"must be in \[0, 1\)"),
        ({"clip": float("nan")}, "training.clip is nan"),
        ({"input_noise": -0.1}, "training.input_noise is -0.1"),
        ({"corrupt_share": 1.0}, r"training.corrupt_share is 1.0, but must be in \[0, 1\), such as 0.01"),
        ({"corrupt_share": 0.1, "corrupt_by": 0.0}, "training.corrupt_by is 0.0, but must be a positive number"),
        ({"corrupt_by": 2.0}, "corrupt_share is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**changes)


def test_transitions_of_another_length_than_is_unrolled_are_refused():
    with pytest.raises(ValueError, match=r"have 1 next state\(s\), but training.unroll is 2"):
        train(pointwise(), Transitions(source()), TrainingSettings(1, 4, unroll=2))


@pytest.mark.parametrize("changes", [{}, {"unroll": 2, "unroll_gradient": "pushforward"}])
def test_a_budget_in_each_lead_time_is_refused_where_the_loss_sees_one(changes):
    settings = TrainingSettings(1, 4, **changes)
    with pytest.raises(ValueError, match=f"with training.unroll {settings.unroll} .* loss sees one: unroll several"):
        train(pointwise(), Transitions(source(), settings.unroll), settings, loss=ImbalanceAwareLoss(over="lead"))


def test_accumulation_with_a_loss_that_it_is_not_exact_for_is_refused():
    with pytest.raises(ValueError, match="exact for ImbalanceAwareLoss and MeanSquaredError only, got L1Loss"):
        train(pointwise(), Transitions(source()), TrainingSettings(1, 4, accumulate=2), loss=nn.L1Loss())


def test_patience_without_validation_is_refused():
    with pytest.raises(ValueError, match="nothing validates"):
        train(pointwise(), Transitions(source()), TrainingSettings(1, 4, patience=2))


def test_a_model_that_cannot_be_sharded_is_refused_with_the_parameter():
    refuse_unshardable(nn.Linear(1, 1))
    for odd, reason in (
        (torch.zeros(2, dtype=torch.complex64), "is complex"),
        (torch.tensor(1.0), "is a scalar"),
        (torch.zeros(2, 3).T, "is not contiguous"),
        (torch.zeros(2, dtype=torch.float64), "is torch.float64 where others are torch.float32"),
    ):
        model = nn.Linear(1, 1)
        model.gain = nn.Parameter(odd)
        with pytest.raises(ValueError, match=f"the parameter 'gain' {reason}"):
            refuse_unshardable(model)
