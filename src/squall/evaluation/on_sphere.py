"""Scores that weather people expect of a rollout on the sphere: anomaly correlation, and storms by their centres."""

from collections import defaultdict
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from squall._types import State, Trajectories
from squall.data import Source
from squall.evaluation.points import Points
from squall.evaluation.regimes import quantiles
from squall.evaluation.sphere import SphereGrid
from squall.evaluation.storms import Match, cyclonic, find_storms, match_storms, summary

__all__ = ["SphereTally", "storm_field"]


def storm_field(name: str) -> tuple[str, bool]:
    """The field in which storms are maxima, and whether its sign is turned: "-msl" stands for lows of the pressure."""
    return name.removeprefix("-"), name.startswith("-")


class SphereTally:
    r"""Gathers over chunks of trajectories, with the climatology c, the mean of the truth over trajectories and times,

    .. math:: ACC = \overline{\hat a a} \Big/ \sqrt{\overline{\hat a^2}\;\overline{a^2}}, \qquad a = u - c

    and the storms of a field: maxima of (û − c) or, of the vorticity, of its cyclonic part, that reach the quantile
    `share` of the truth, matched with those of the forecast (see `squall.evaluation.storms`).

    Args:
        source: the truth, on latitudes and longitudes.
        climatology: c.
        sample: some states of the truth, from which the quantile is estimated.
        storms: the field, with a minus where storms are minima; no storms without it.
        share: the quantile.
    """

    def __init__(
        self,
        source: Source,
        climatology: Float[Tensor, "channel latitude longitude"],
        sample: State,
        storms: str | None,
        share: float,
    ) -> None:
        self.source, self.points, self.climatology, self.storms = source, Points(source), climatology, storms
        self.anomalies: list[Float[Tensor, "quantity batch step channel"]] = []
        self.matches: dict[int, list[Match]] = defaultdict(list)
        if storms is not None:
            name, self.turned = storm_field(storms)
            self.channel, self.grid = source.fields.index(name), SphereGrid.of(source)
            weights = None if self.points.weights is None else self.points.weights[self.channel : self.channel + 1]
            self.threshold = quantiles(self._intensity(sample[:, None])[:, 0].unsqueeze(1), [share], weights).item()

    def _intensity(self, states: Trajectories) -> Float[Tensor, "batch step latitude longitude"]:
        field, name = states[:, :, self.channel], self.source.fields[self.channel].lower()
        if name.startswith("vort") or name.split("_")[0] == "vo":  # ERA5's name, with its level: vo_500
            field = cyclonic(field, self.grid)
        else:
            field = field - self.climatology[self.channel].to(field)
        return -field if self.turned else field

    def add(self, truth: Trajectories, prediction: Trajectories) -> None:
        """One chunk of trajectories at the lead times."""
        a, b = ((u - self.climatology.to(u)).flatten(3) for u in (prediction, truth))
        products = [self.points.by_field(x) for x in (a * b, a.square(), b.square())]
        self.anomalies.append(torch.stack(products).cpu())
        if self.storms is not None:
            forecast, true = self._intensity(prediction), self._intensity(truth)
            for lead in range(true.shape[1]):
                for pair in zip(forecast[:, lead], true[:, lead], strict=True):
                    predicted, there = (find_storms(field, self.grid, self.threshold) for field in pair)
                    self.matches[lead].append(match_storms(predicted, there))

    def scores(self) -> dict[str, Any]:
        """Over all lead times: of storms; what there is no storm to say it of is left out."""
        if self.storms is None:
            return {}
        every = [match for matches in self.matches.values() for match in matches]
        scores = {name: value for name, value in summary(every).items() if value is not None}
        return {"storms": {"field": self.storms, "threshold": self.threshold, **scores}}

    def acc(self) -> Float[Tensor, "step channel"]:
        """By lead time and field, (step, channel); the means are over trajectories and the sphere."""
        product, first, second = torch.cat(self.anomalies, 1).mean(1)
        return product / (first * second).sqrt()

    def storm_curves(self) -> dict[str, list[float | None]]:
        """By lead time, by score."""
        by_lead = [summary(self.matches[lead]) for lead in sorted(self.matches)]
        return {name: [scores[name] for scores in by_lead] for name in by_lead[0]} if by_lead else {}
