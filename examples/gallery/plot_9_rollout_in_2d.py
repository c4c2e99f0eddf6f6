"""
A U-Net in two dimensions, rolled out
=====================================

Phase separation in the plane, learned by a small U-Net that predicts the change of the state, trained over two
unrolled steps and rolled out. The model is small and briefly trained: watch where it drifts away.
"""

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation

import squall
from squall.models import UNet
from squall.systems import CahnHilliard2D

system = CahnHilliard2D(points=32)
states = system.simulate(system.initial_states(10, torch.Generator().manual_seed(0)), steps=40)[:, 5:]
source = squall.data.InMemory(states.float(), dt=system.dt, lengths=system.width)
train, _, test = squall.data.split(source, test=1)


class Change(torch.nn.Module):
    """The next state: the present one and a change."""

    def __init__(self):
        super().__init__()
        self.network = UNet(1, width=8, levels=2, generator=torch.Generator().manual_seed(0))

    def forward(self, u):
        return u + self.network(u)


result = squall.train(
    Change(),
    squall.data.Transitions(train, unroll=2),
    squall.TrainingSettings(steps=150, batch=16, learning_rate=3e-3, residual="state", unroll=2, validate_every=0),
    loss=squall.ImbalanceAwareLoss(squall.KLBudget(1.0, cap=3)),
    integrator=squall.next_state,
)

truth = test.read([0])[0, :, 0].numpy()
with torch.no_grad():
    first = torch.from_numpy(truth[:1])[None]
    prediction = squall.rollout(squall.next_state, result.model.eval(), first, test.dt, test.steps)[0, :, 0].numpy()
error, persistence = ((prediction - truth)[-1] ** 2).mean(), ((truth[0] - truth[-1]) ** 2).mean()
print(f"error at the end: {error:.3f}, of persistence: {persistence:.3f}")

figure, panels = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
shown = {"truth": truth, "prediction": prediction, "prediction − truth": prediction - truth}
images = []
for axes, (title, values) in zip(panels, shown.items(), strict=True):
    images.append(axes.imshow(values[0].T, origin="lower", cmap="RdBu_r", vmin=-1, vmax=1))
    axes.set(title=title, xticks=[], yticks=[])
figure.colorbar(images[0], ax=panels, shrink=0.8)


def draw(step):
    for image, values in zip(images, shown.values(), strict=True):
        image.set_data(values[step].T)
    figure.suptitle(f"step {step}")
    return images


animation = FuncAnimation(figure, draw, frames=range(0, test.steps + 1, 2), interval=150)
plt.show()
