"""Work that a GPU records once and replays."""

import warnings
from collections.abc import Callable

import torch

WARM_UP = 3
"""How often work is done as it is, before it is recorded: libraries set themselves up in their first calls."""


class Replayed:
    """Work on memory that stays where it is; on a CUDA device recorded as a graph once, then replayed.

    A replay starts all kernels of the work at once, where Python would take longer to start them than they run. What
    Python itself does in the work is done at the recording only.

    Args:
        work: reads and writes tensors that it knows, always the same ones.
        device: where they are.
    """

    def __init__(self, work: Callable[[], object], device: torch.device) -> None:
        self._work, self._device = work, device
        self._left = WARM_UP if device.type == "cuda" else -1
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self) -> None:
        """Do the work once."""
        if self._left == 0:
            self._record()
        if self._graph is not None:
            self._graph.replay()
        elif self._left > 0 and self._stream is not None:
            self._left -= 1
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                self._work()
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        else:
            self._work()

    def _record(self) -> None:
        self._left = -1
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._work()
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph could be recorded, so every step is started anew: {error}", stacklevel=3)
            return
        self._graph = graph
