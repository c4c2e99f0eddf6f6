"""Moved to `squall.runs.config`."""

import warnings

from squall.runs.config import *  # noqa: F403

warnings.warn("squall.config has moved to squall.runs.config", DeprecationWarning, stacklevel=2)
