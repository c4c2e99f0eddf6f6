"""Forward and backward passes written by hand, equal to the plain ones to rounding."""
