"""How noisy the gradients of a training are, from the moments that Adam keeps."""

import math
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor


def gradient_noise(optimizer: Any, members: int = 1) -> list[dict[str, float]]:
    r"""The share of noise in the mean square of a minibatch's gradient g, tr Cov(g) / E|g|², from 0 to 1.

    Let m̂ and v̂ be Adam's moments after t steps, corrected for their start at zero, and c the sum of the squares of the
    weights with which m̂ averages gradients. Over all parameters the share is

    .. math::

        \frac{\sum (\hat v - \hat m^2)}{(1 - c) \sum \hat v}, \qquad
        c = \frac{1 - \beta_1}{1 + \beta_1} \cdot \frac{1 + \beta_1^t}{1 - \beta_1^t}

    With Adam's defaults v̂ looks back over about 1 000 steps, m̂ over 10: gradients that shrink or turn within these
    count as noise.

    Args:
        optimizer: Adam or AdamW; of any other nothing is known.
        members: models stacked along the first axis of every parameter.

    Returns:
        `gradient_noise` of every member; nothing before the second step, with β₁ = 0 or a gradient that is not finite.

    Reference:
        McCandlish, Kaplan, Amodei and OpenAI Dota Team, An Empirical Model of Large-Batch Training, 2018. Their noise
        scale, the minibatch at which noise and mean are equally large, is batch · x / (1 − x).
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # within the one of Fabric
    noise, square = torch.zeros(2, members, dtype=torch.float64)
    for group in optimizer.param_groups:
        first, second = group.get("betas", (0, 0))[:2]
        for state in (optimizer.state.get(p, {}) for p in group["params"]):
            t = float(state.get("step", 0))
            if t < 2 or first == 0 or not {"exp_avg", "exp_avg_sq"} <= state.keys():
                continue
            c = (1 - first) / (1 + first) * (1 + first**t) / (1 - first**t)
            m_square = _sums(_real(state["exp_avg"]).square(), members) / (1 - first**t) ** 2
            v = _sums(_real(state["exp_avg_sq"]), members) / (1 - second**t)
            noise += (v - m_square) / (1 - c)
            square += v
    shares = (noise / square).clamp(0, 1).tolist()
    return [{} if math.isnan(share) else {"gradient_noise": share} for share in shares]


def _real(x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
    return torch.view_as_real(x) if x.is_complex() else x


def _sums(x: Any, members: int) -> Shaped[Tensor, " {members}"]:
    """Per member; of a sharded tensor over all processes."""
    if members == 1:
        total: Any = x.sum()
        return getattr(total, "full_tensor", lambda: total)().reshape(1).cpu()
    return x.reshape(members, -1).sum(1).cpu()
