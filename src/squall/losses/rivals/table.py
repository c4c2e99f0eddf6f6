"""Names become losses here: of the rivals in this folder, or of one's own by its import path."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn

from squall.losses.rivals.amse import AMSE, SphericalAMSE
from squall.losses.rivals.attention import RBA, VRBA
from squall.losses.rivals.binned_spectral import BinnedSpectral
from squall.losses.rivals.channels import ChannelLoss
from squall.losses.rivals.density import DensityWeights
from squall.losses.rivals.ensemble import AlmostFairCRPS
from squall.losses.rivals.extreme_value import ExtremeValue
from squall.losses.rivals.focal import Focal
from squall.losses.rivals.max_pooling import LossMaxPooling
from squall.losses.rivals.regimes import RegimeBudget
from squall.losses.rivals.relative import RelativeH1, RelativeL2
from squall.losses.rivals.tilted import Tilted
from squall.losses.rivals.top_k import TopK

RIVALS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {
        "afcrps": AlmostFairCRPS,
        "amse": AMSE,
        "bsp": BinnedSpectral,
        "channel": ChannelLoss,
        "density": DensityWeights,
        "extreme_value": ExtremeValue,
        "focal": Focal,
        "max_pooling": LossMaxPooling,
        "rba": RBA,
        "regimes": RegimeBudget,
        "relative_h1": RelativeH1,
        "relative_l2": RelativeL2,
        "spherical_amse": SphericalAMSE,
        "term": Tilted,
        "top_k": TopK,
        "vrba": VRBA,
    }
)
"""Every rival by its name. Positional arguments are what it must know of the data, keywords are its options."""

CALL = ("index", "mask", "measure")


def options_of(maker: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The options of a rival: its keyword-only parameters, but for those of the call."""
    parameters = inspect.signature(maker).parameters
    return {name: p for name, p in parameters.items() if p.kind == p.KEYWORD_ONLY and name not in CALL}


def rival(name: str, *data: Any, **options: Any) -> Callable[..., Tensor]:
    """The loss of a name, ready to be called as loss(prediction, target, mask=..., measure=...).

    Args:
        name: one of `RIVALS`, or the import path of a class or a function, such as "my_package.losses.MyLoss".
        data: what a class must know of the training data, in the order of its parameters.
        options: keywords of the class, or of the function.

    Raises:
        ValueError: an unknown name or option, with the known ones.

    Example:
        >>> rival("top_k", alpha=0.3).alpha
        0.3
    """
    maker = RIVALS[name] if name in RIVALS else _imported(name)
    known = options_of(maker)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"loss {name!r} has no option {unknown[0]!r}; known: {', '.join(known) or 'none'}")
    return cast(type[nn.Module], maker)(*data, **options) if inspect.isclass(maker) else partial(maker, **options)


def _imported(path: str) -> Callable[..., Any]:
    module, _, attribute = path.rpartition(".")
    if not module:
        raise ValueError(f"unknown loss {path!r}; known: {', '.join(RIVALS)}; or an import path, package.module.Loss")
    maker = getattr(importlib.import_module(module), attribute, None)
    if not callable(maker):
        raise ValueError(f"{module} has no class or function {attribute!r}")
    return maker
