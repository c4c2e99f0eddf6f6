"""Moved to `squall.training.sampling`."""

import warnings

from squall.training.sampling import *  # noqa: F403

warnings.warn("squall.sampling has moved to squall.training.sampling", DeprecationWarning, stacklevel=2)
