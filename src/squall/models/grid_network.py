"""What the networks on a regular grid share: their sizes, the check of their input, and the draw of their weights."""

import abc
import contextlib
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from squall._types import State
from squall.models.base import check_precision, check_sizes
from squall.models.inputs import Joined
from squall.models.padding import boundary_per_axis

AnyFloats = Float[Tensor, "..."]
"""What a caller gives beside the states, before it is checked."""

Output = Float[Tensor, "batch out *space"]
"""States or rates, with channels of their own."""


class GridNetwork(nn.Module, abc.ABC):
    """A network from the last states of a field, and conditions, to a state or a rate.

    Args:
        channels: number of fields.
        dimensions: of space, 1 to 3.
        boundary: periodic, wall or open, for all axes of space or one name per axis.
        conditions: number of further input channels.
        out_channels: number of channels of the output; `channels` if left out.
        history: number of states in the input.
        film: number of scalars.
        sizes: of the network, by name; each must be at least 1.

    Raises:
        ValueError: for a size outside its range or an unknown boundary.
    """

    def __init__(
        self,
        channels: int,
        dimensions: int,
        boundary: str | Sequence[str],
        conditions: int,
        out_channels: int | None,
        history: int,
        film: int = 0,
        **sizes: int,
    ) -> None:
        super().__init__()
        out_channels = channels if out_channels is None else out_channels
        check_sizes(self, dimensions=dimensions, conditions=conditions, film=film, channels=channels, **sizes)
        check_sizes(self, out_channels=out_channels, history=history)
        self.channels, self.dimensions, self.conditions = channels, dimensions, conditions
        self.out_channels, self.history, self.film = out_channels, history, film
        self.boundary = boundary_per_axis(boundary, dimensions)

    @property
    def in_channels(self) -> int:
        """Channels of all states and conditions together."""
        return self.channels * self.history + self.conditions

    @contextlib.contextmanager
    def _drawn_from(self, generator: torch.Generator | None) -> Iterator[None]:
        """Layers that are made inside draw the same weights on any device, in any default dtype.

        The draw is on the CPU in float32 and follows one number of the generator. The global generator is restored.
        """
        device, dtype = torch.get_default_device(), torch.get_default_dtype()
        source = "cpu" if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=source))
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            torch.set_default_dtype(torch.float32)
            try:
                yield
            finally:
                torch.set_default_dtype(dtype)
        self.to(device, dtype)

    def _input(self, u: State, conditions: AnyFloats | None) -> Joined:
        """States and conditions, checked, as channels of one tensor; `u` may hold both."""
        name, batch = type(self).__name__, u.shape[:1]
        joined = conditions is None and self.conditions > 0 and u.shape[1:2] == (self.in_channels,)
        states = self.in_channels if joined else self.channels * self.history
        if u.dim() != self.dimensions + 2 or u.shape[1] != states:
            each = f"{self.history} states of {self.channels}" if self.history > 1 else f"{self.channels}"
            raise ValueError(
                f"{name}: the state has shape {tuple(u.shape)}, but this model takes (batch, channel, *space) with "
                f"{each} channel(s) and {self.dimensions} axes of space; see its arguments channels, history and "
                "dimensions"
            )
        if not joined:
            self._check(conditions, "conditions", self.conditions, (*batch, self.conditions, *u.shape[2:]))
        check_precision(self, u)
        return u if conditions is None else torch.cat((u, conditions.to(u.dtype)), 1)

    def _check(self, given: AnyFloats | None, name: str, count: int, shape: tuple[int, ...]) -> None:
        """An input that is missing, not expected or of another shape is an error."""
        model = f"{type(self).__name__}: {name}"
        if given is None and count:
            raise ValueError(f"{model} are missing: this model takes {count}, as a tensor of shape {shape}")
        if given is not None and not count:
            raise ValueError(f"{model} were given, but this model takes none; make it with a number of {name}")
        if given is not None and given.shape != shape:
            raise ValueError(f"{model} have shape {tuple(given.shape)}, but must have {shape}")

    def extra_repr(self) -> str:
        names = ("channels", "dimensions", "boundary", "conditions", "film", "out_channels", "history")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
