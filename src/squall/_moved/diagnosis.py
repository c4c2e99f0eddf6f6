"""Moved to `squall.evaluation`."""

import warnings

from squall.evaluation import *  # noqa: F403

warnings.warn("squall.diagnosis has moved to squall.evaluation", DeprecationWarning, stacklevel=2)
