"""From which times rollouts start: trajectories in whole, or pieces of them that touch no gap."""

from squall.data import DataError, Source, Subset, Windows, windows

STARTS = 8
"""Pieces that are wanted at least, where their length is left to squall."""


def pieces(source: Source, history: int = 1, steps: int | None = None, stride: int | None = None) -> Source:
    """The trajectories to roll out and compare with.

    Args:
        source: the truth.
        history: states that the model sees; lead time counts from the last of them.
        steps: of a rollout; whole trajectories if left out. Where they have gaps, or the source is a part in time of
            one trajectory, half of it, or less until there are eight pieces, which may overlap.
        stride: distance of the starts in states; pieces of given `steps` do not overlap if left out.

    Returns:
        the source itself, or pieces of `history + steps` states.

    Raises:
        DataError: where no piece is long enough or without gaps, or `stride` is for whole trajectories.
    """
    total = source.shape[1]
    if stride is not None and stride < 1:
        raise DataError(f"stride is {stride}, but must be at least 1")
    gaps = source.valid is not None and not bool(source.valid.all())
    if history + (steps or 1) > total:
        raise DataError(
            f"{source.name}: a rollout of {steps or 1} step(s) from {history} state(s) does not fit into the {total} "
            "states of a trajectory: ask for fewer steps, or a model with less history"
        )
    if steps is not None:
        if steps < 1:
            raise DataError(f"steps is {steps}, but must be at least 1")
        whole = stride is None and history + steps == total and not gaps
        return source if whole else windows(source, history + steps, stride)
    part_of_one = isinstance(source, Windows) and not isinstance(source, Subset) and source.trajectories == 1
    if part_of_one or gaps:
        return _many(source, history, stride)
    if stride is not None:
        raise DataError(f"stride is {stride}, but rollouts over whole trajectories start once: give steps too")
    return source


def _many(source: Source, history: int, stride: int | None) -> Source:
    """Pieces of half a trajectory, or of less until there are enough; the shortest where there are never enough."""
    total, wanted = source.shape[1], max(STARTS, source.trajectories)
    length = max(history + 1, total // 2)
    while True:
        apart = max(1, (total - length) // (STARTS - 1)) if stride is None else stride
        try:
            cut = windows(source, length, apart)
        except DataError:
            if length <= history + 1:
                raise
        else:
            if cut.trajectories >= wanted or length <= history + 1:
                return cut
        length = max(history + 1, int(0.8 * length))


def without_history(source: Source, history: int) -> Source:
    """The states from the one on that a rollout starts from."""
    if history == 1:
        return source
    every = range(source.trajectories)
    return Windows(source, every, [history - 1] * len(every), source.shape[1] - history + 1)
