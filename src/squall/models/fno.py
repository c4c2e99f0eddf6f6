"""FNO: products with learned weights in Fourier space."""

import warnings
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import nn

from squall._process.extras import explain_missing_extra
from squall._types import State
from squall.models.grid_network import AnyFloats, GridNetwork, Output


@final
class FNO(GridNetwork):
    r"""The Fourier neural operator of the package neuraloperator, on a grid of one to three dimensions.

    .. math:: x \mapsto g\big(W x + \mathcal{F}^{-1}(R \, \mathcal{F} x) + b\big)

    is the heart of a layer: g is GELU, W acts point by point and R on the lowest Fourier modes. A network of width 1
    follows in every layer, one lifts the channels before the first layer and one projects them after the last.

    It takes other grid sizes than it was trained on, also odd ones and ones with fewer points than modes. On a periodic
    axis a shift of u shifts the output alike. Axes that are not periodic are padded with zeros before the layers and
    cut after them; the network is given no coordinates (they can be conditions).

    The weights R are kept as pairs of real numbers and applied in the precision of the data. So float64, `torch.vmap`,
    odd grid sizes and tensor-only checkpoints work, which they do not in neuraloperator 2.0.

    Args:
        channels: number of fields.
        dimensions: of space, 1 to 3.
        modes: Fourier modes kept on every axis, negative wave numbers included, or one number per axis.
        width: channels of the layers.
        layers: number of Fourier layers.
        boundary: `periodic`, `wall` or `open`, for all axes of space or one name per axis.
        padding: fraction of the points of an axis, if it is not periodic, to add at both of its ends.
        conditions: number of further input channels, such as forcings or static fields; a scalar is a constant field.
        out_channels: channels of the output; `channels` if left out.
        history: number of states in the input.
        generator: draws the weights, the same in float32 and float64; PyTorch's default one if left out.

    The call takes states (batch, history · channel, \*space) and conditions (batch, condition, \*space), all
    dimensionless or normalized, and returns (batch, out channel, \*space).
    States and conditions may come as one tensor, (batch, history · channel + condition, \*space).

    Raises:
        ImportError: without neuraloperator.
        ValueError: for a size outside its range; in a call, for an input that is missing or of another shape.
        TypeError: in a call, for a state of another dtype than the weights.

    Reference:
        Li et al., Fourier Neural Operator for Parametric Partial Differential Equations, ICLR 2021,
        https://arxiv.org/abs/2010.08895.

    Example:
        >>> model = FNO(2, modes=8, boundary=("periodic", "wall"))  # doctest: +SKIP
        >>> model(torch.zeros(5, 2, 32, 21)).shape  # doctest: +SKIP
        torch.Size([5, 2, 32, 21])
    """

    def __init__(
        self,
        channels: int,
        *,
        dimensions: int = 2,
        modes: int | Sequence[int] = 16,
        width: int = 32,
        layers: int = 4,
        boundary: str | Sequence[str] = "periodic",
        padding: float = 0.125,
        conditions: int = 0,
        out_channels: int | None = None,
        history: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        modes = (modes,) * dimensions if isinstance(modes, int) else tuple(modes)
        sizes = {"width": width, "layers": layers, "modes": min(modes, default=0)}
        super().__init__(channels, dimensions, boundary, conditions, out_channels, history, **sizes)
        if "pole" in self.boundary:
            raise ValueError("FNO: boundary 'pole' is of the U-Net; give 'open' for latitude")
        if len(modes) != dimensions:
            raise ValueError(f"FNO: modes has {len(modes)} number(s), {modes}, for {dimensions} axes of space")
        if not 0 <= padding <= 1:
            raise ValueError(f"FNO: padding is {padding}, but must be a fraction of the points of an axis, 0 to 1")
        network = _neuraloperator()
        with self._drawn_from(generator):
            self.network = network(
                modes,
                in_channels=self.in_channels,
                out_channels=self.out_channels,
                hidden_channels=width,
                n_layers=layers,
                positional_embedding=None,
                domain_padding=[0.0 if name == "periodic" else float(padding) for name in self.boundary],
                conv_module=SpectralConvolution,
            )
        self.register_state_dict_post_hook(_tensors_only)

    def forward(self, u: State, conditions: AnyFloats | None = None) -> Output:
        return self.network(self._input(u, conditions))


class SpectralConvolution(nn.Module):
    r"""y = F⁻¹(R F x) + b, as neuraloperator's SpectralConv, whose place it takes in a layer.

    Args:
        inputs: channels of x.
        outputs: channels of y.
        modes: on every axis; wave numbers −⌊m/2⌋ to ⌈m/2⌉ − 1, and 0 to ⌊m/2⌋ on the last axis.
        options: of SpectralConv that FNO leaves at their defaults.
    """

    def __init__(self, inputs: int, outputs: int, modes: Sequence[int], **options: Any) -> None:
        super().__init__()
        self.modes = (*modes[:-1], modes[-1] // 2 + 1)
        scale = (2 / (inputs + outputs)) ** 0.5
        self.weight = nn.Parameter(torch.randn(inputs, outputs, *self.modes, 2) * scale / 2**0.5)
        self.bias = nn.Parameter(torch.randn(outputs, *(1 for _ in modes)) * scale)

    def forward(self, x: State, output_shape: None = None) -> Output:
        x = x.to(self.weight.dtype)  # under autocast there is no transform in half precision
        size, axes = x.shape[2:], tuple(range(2, x.dim()))
        x_hat, weight = torch.fft.rfftn(x, dim=axes, norm="forward"), torch.view_as_complex(self.weight)
        full = x_hat.shape[2:]
        wave_numbers = []
        for axis, points, modes in zip(axes, full, self.modes, strict=True):
            kept, last = min(points, modes), axis == axes[-1]
            first = 0 if last else -(kept // 2)
            weight = weight.narrow(axis, first if last else first + modes // 2, kept)
            wave_numbers.append(torch.arange(first, first + kept, device=x.device) % points)
            x_hat = x_hat.index_select(axis, wave_numbers[-1])
        y_hat = torch.einsum("bi...,io...->bo...", x_hat, weight)
        for axis, points, index in zip(axes, full, wave_numbers, strict=True):
            zeros = y_hat.new_zeros(*y_hat.shape[:axis], points, *y_hat.shape[axis + 1 :])
            y_hat = zeros.index_copy(axis, index, y_hat)
        return torch.fft.irfftn(y_hat, s=size, dim=axes, norm="forward") + self.bias

    def transform(self, x: State, output_shape: None = None) -> State:
        """The skip connection of a layer, on the same grid."""
        return x


def _neuraloperator() -> Any:
    with explain_missing_extra(), warnings.catch_warnings():  # its import changes the warning filters
        from neuralop.models import FNO as network
    return network


def _tensors_only(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:  # neuraloperator adds the arguments of its constructor, which no file of tensors can hold.
    state.pop("_metadata", None)
