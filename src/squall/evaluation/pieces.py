"""From which times rollouts start: trajectories in whole, or pieces of them that touch no gap."""

from squall.data import DataError, Source, Windows, windows

__all__ = ["pieces", "without_history"]

STARTS = 8
"""Pieces that are wanted at least, where how long they are is left to squall."""


def pieces(source: Source, history: int = 1, steps: int | None = None, stride: int | None = None) -> Source:
    """The trajectories to roll out and compare with.

    Args:
        source: the truth.
        history: states that the model sees; lead time counts from the last of them.
        steps: of a rollout; whole trajectories if left out, or, where they have gaps, as many steps as leave eight
            pieces.
        stride: distance of the starts in states; pieces do not overlap if left out.

    Returns:
        the source itself, or pieces of `history + steps` states.

    Raises:
        DataError: where no piece is long enough or without gaps.
    """
    total = source.shape[1]
    if history + (steps or 1) > total:
        raise DataError(
            f"{source.name}: a rollout of {steps or 1} step(s) from {history} state(s) does not fit into the {total} "
            "states of a trajectory: ask for fewer steps, or a model with less history"
        )
    if steps is not None:
        if steps < 1:
            raise DataError(f"steps is {steps}, but must be at least 1")
        whole = stride is None and history + steps == total and source.valid is None
        return source if whole else windows(source, history + steps, stride)
    return source if source.valid is None else _between_gaps(source, history, stride)


def _between_gaps(source: Source, history: int, stride: int | None) -> Source:
    """The longest pieces of which there are enough; the shortest ones where there are never enough."""
    wanted, length = max(STARTS, source.trajectories), source.shape[1]
    while True:
        try:
            found = windows(source, length, stride)
        except DataError:
            if length <= history + 1:
                raise
        else:
            if found.trajectories >= wanted or length <= history + 1:
                return found
        length = max(history + 1, int(0.8 * length))


def without_history(source: Source, history: int) -> Source:
    """The states from the one on that a rollout starts from."""
    if history == 1:
        return source
    every = range(source.trajectories)
    return Windows(source, every, [history - 1] * len(every), source.shape[1] - history + 1)
