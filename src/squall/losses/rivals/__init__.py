"""What else people train with: losses to compare with, under one call loss(prediction, target, mask=, measure=)."""

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
from squall.losses.rivals.table import RIVALS, rival
from squall.losses.rivals.tilted import Tilted
from squall.losses.rivals.top_k import TopK

__all__ = [
    "AMSE",
    "RBA",
    "RIVALS",
    "VRBA",
    "AlmostFairCRPS",
    "BinnedSpectral",
    "ChannelLoss",
    "DensityWeights",
    "ExtremeValue",
    "Focal",
    "LossMaxPooling",
    "RegimeBudget",
    "RelativeH1",
    "RelativeL2",
    "SphericalAMSE",
    "Tilted",
    "TopK",
    "rival",
]
