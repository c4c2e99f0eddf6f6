"""
Train two models and compare their rollouts
===========================================

Cahn-Hilliard at a small size: the same HNN++, the same minibatches, two losses. Both are rolled out from test
states that the training never saw.
"""

import matplotlib.pyplot as plt
import torch

import squall

system = squall.CahnHilliard()
draw = torch.Generator().manual_seed(0)
states = system.simulate(system.initial_states(24, draw), steps=300)
source = squall.data.InMemory(states, dt=system.dt, lengths=system.width)
train, validation, test = squall.data.split(source, validation=2, test=4)

models = {}
for name, loss in {"MSE": squall.MeanSquaredError(), "KL budget 0.3": squall.ImbalanceAwareLoss()}.items():
    result = squall.train(
        squall.HNN(system.structure, hidden=32, generator=torch.Generator().manual_seed(1)),
        squall.data.Transitions(train),
        squall.TrainingSettings(steps=800, batch=100, validate_every=200),
        loss=loss,
        validate=squall.RolloutValidation(validation),
    )
    models[name] = result.model
    result.model.load_state_dict(result.best.model_state)  # the weights that rolled out best on validation

# %%
# One-step errors and rollout errors need not agree. Both belong in a comparison, and so do more seeds than one.

for name, model in models.items():
    errors = squall.evaluate(model, test, system=system)
    one = errors.one_step
    print(
        f"{name:14} one step: mean {one['mean']:.2f}, top 1 % {one['top_1_percent']:.1f};   "
        f"rollout: {errors.rollout['states']:.4f}"
    )

# %%
# Truth, and the error of each model, over space and time:

truth = test.read([0])[0, :, 0].numpy()
figure, panels = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained", sharey=True)
extent = (0, test.dt * test.steps, 0, system.width)
panels[0].set(title="truth", ylabel="space x", xlabel="time t")
image = panels[0].imshow(truth.T, aspect="auto", origin="lower", extent=extent, cmap="RdBu_r", vmin=-1, vmax=1)
figure.colorbar(image, ax=panels[0])
for axes, (name, model) in zip(panels[1:], models.items(), strict=True):
    with torch.no_grad():
        prediction = squall.rollout(squall.euler, model, test.read([0])[:, 0].float(), test.dt, test.steps)[
            0, :, 0
        ].numpy()
    error = axes.imshow(
        (prediction - truth).T, aspect="auto", origin="lower", extent=extent, cmap="PuOr", vmin=-0.5, vmax=0.5
    )
    axes.set(title=f"error, {name}", xlabel="time t")
figure.colorbar(error, ax=panels[1:])
plt.show()
