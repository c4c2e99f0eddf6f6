"""Moved to `squall.training.batched`."""

import warnings

from squall.training.batched import *  # noqa: F403

warnings.warn("squall.ensemble has moved to squall.training.batched", DeprecationWarning, stacklevel=2)
