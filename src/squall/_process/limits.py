"""Errors of PyTorch, NumPy and Python that mean "too large for this machine"."""

WORDS = (
    *("allocate memory", "out of memory", "not enough memory", "bad_alloc", "cannot allocate"),
    *("overflow", "too large to convert", "too many elements", "maximum supported dimension", "array is too big"),
    *("unable to allocate", "malloc failed", "can't start new thread", "maximum allowed"),
)
"""Of messages by PyTorch, NumPy, HDF5 and Python, which have no class of error in common."""


def too_large(error: BaseException) -> bool:
    """Whether an error says that something does not fit into the memory or the numbers of the machine.

    >>> too_large(MemoryError()), too_large(RuntimeError("can't allocate memory")), too_large(ValueError())
    (True, True, False)
    """
    if isinstance(error, MemoryError | ArithmeticError):
        return True
    return isinstance(error, RuntimeError | ValueError | TypeError | OSError) and any(
        words in str(error).lower() for words in WORDS
    )
