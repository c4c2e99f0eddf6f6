"""Imbalance-aware learning for neural models of physical systems."""

__version__ = "0.1.0"
