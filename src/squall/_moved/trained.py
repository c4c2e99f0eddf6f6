"""Moved to `squall.runs.trained`."""

import warnings

from squall.runs.trained import *  # noqa: F403

warnings.warn("squall.trained has moved to squall.runs.trained", DeprecationWarning, stacklevel=2)
