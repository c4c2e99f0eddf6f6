"""Physical systems: each has an equation, an energy, random first states, and a scheme that keeps what it conserves."""

from collections.abc import Mapping
from types import MappingProxyType

from squall._process.extras import explain_missing_extra

with explain_missing_extra():
    from squall.systems.base import System
    from squall.systems.cahn_hilliard import CahnHilliard
    from squall.systems.implicit import ConvergenceError
    from squall.systems.korteweg_de_vries import KortewegDeVries
    from squall.systems.shallow_water import ShallowWater

SYSTEMS: Mapping[str, type[System]] = MappingProxyType(
    {system.name: system for system in (CahnHilliard, KortewegDeVries)}
)
"""The systems with an energy and a scheme of squall, by name."""

__all__ = ["SYSTEMS", "CahnHilliard", "ConvergenceError", "KortewegDeVries", "ShallowWater", "System"]
