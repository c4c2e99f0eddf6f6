"""The training loop, one training or many as one batch, and which transitions make a minibatch."""

from squall._types import Score, Validation
from squall.training.batched import Member, train_together
from squall.training.loop import Checkpoint, Recorder, TrainingDiverged, TrainingResult, TrainingSettings, train
from squall.training.sampling import Sampler, StiffnessAwareSampler, UniformSampler, stiffness_index

__all__ = [
    "Checkpoint",
    "Member",
    "Recorder",
    "Sampler",
    "Score",
    "StiffnessAwareSampler",
    "TrainingDiverged",
    "TrainingResult",
    "TrainingSettings",
    "UniformSampler",
    "Validation",
    "stiffness_index",
    "train",
    "train_together",
]
