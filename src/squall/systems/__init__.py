"""Physical systems: each has an equation, an energy, random first states, and a scheme that solves it."""

from collections.abc import Mapping
from types import MappingProxyType

from squall._process.extras import explain_missing_extra

with explain_missing_extra():
    from squall.systems.base import System
    from squall.systems.burgers import Burgers
    from squall.systems.cahn_hilliard import CahnHilliard
    from squall.systems.cahn_hilliard_2d import CahnHilliard2D
    from squall.systems.energy import EnergySystem
    from squall.systems.implicit import ConvergenceError
    from squall.systems.korteweg_de_vries import KortewegDeVries
    from squall.systems.kuramoto_sivashinsky import KuramotoSivashinsky
    from squall.systems.majda_mclaughlin_tabak import MajdaMcLaughlinTabak
    from squall.systems.shallow_water import ShallowWater
    from squall.systems.shock_tube import ShockTube
    from squall.systems.spectral import SpectralSystem

ALL = (CahnHilliard, KortewegDeVries, Burgers, KuramotoSivashinsky, MajdaMcLaughlinTabak, CahnHilliard2D, ShockTube)

SYSTEMS: Mapping[str, type[System]] = MappingProxyType({system.name: system for system in ALL})
"""The systems on a grid, by name; `ShallowWater`, on a sphere, has a solver of its own."""

__all__ = [
    "SYSTEMS",
    "Burgers",
    "CahnHilliard",
    "CahnHilliard2D",
    "ConvergenceError",
    "EnergySystem",
    "KortewegDeVries",
    "KuramotoSivashinsky",
    "MajdaMcLaughlinTabak",
    "ShallowWater",
    "ShockTube",
    "SpectralSystem",
    "System",
]
