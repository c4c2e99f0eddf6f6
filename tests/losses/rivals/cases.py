"""Every rival made for one small batch, and batches to call it with."""

import torch
from torch import Tensor

from squall.losses.rivals import RIVALS

SHAPE = (3, 2, 6, 8)


def fields(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A prediction and a target, float64, of one size but not near each other."""
    generator = torch.Generator().manual_seed(seed)
    prediction, target = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return prediction.requires_grad_(), target


def made(name: str, target: Tensor, **options: object) -> torch.nn.Module:
    """A rival by its name, given what it must know of the data."""
    data = {
        "channel": (target.shape[1],),
        "density": (target,),
        "rba": (target.shape,),
        "vrba": (target.shape,),
        "regimes": (target,),
    }
    if name == "term":
        options = {"temperature": 2.0, **options}
    return RIVALS[name](*data.get(name, ()), **options).double()


def extra(name: str, target: Tensor) -> dict[str, Tensor]:
    """What a call needs besides prediction and target."""
    return {"index": torch.arange(len(target))} if name in ("rba", "vrba") else {}
