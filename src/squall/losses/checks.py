"""What the loss is given, checked: every message says which argument, what came and what to do."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from squall.losses._tracing import is_traced
from squall.losses.errors import GROUPS_ALONG

__all__ = [
    "broadcasts",
    "check_any",
    "check_broadcast",
    "check_errors",
    "check_finite",
    "check_labels",
    "check_not_empty",
    "check_pair",
    "check_weights",
    "combined_measure",
    "warn_unmet",
]


def check_errors(errors: Tensor, over: str) -> Tensor:
    """The errors in float32 or better."""
    _check_over(errors, over)
    _check_floating("errors", errors)
    return _at_least_float32(errors)


def check_pair(prediction: Tensor, target: Tensor, over: str, *, may_be_empty: bool = False) -> tuple[Tensor, Tensor]:
    """Prediction and target in one precision, float32 or better."""
    if hasattr(prediction, "device_mesh") or hasattr(target, "device_mesh"):
        raise TypeError(
            "prediction or target is a DTensor, which only the call of ImbalanceAwareLoss and MeanSquaredError takes: "
            "here give the local parts, prediction.to_local() and target.to_local(), and to the loss the processes "
            "that share them, group=mesh.get_group()"
        )
    plain = prediction.dtype == target.dtype == torch.float32 and over == "all"
    if plain and prediction.shape == target.shape and prediction.numel():
        return prediction, target
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)} and target {tuple(target.shape)}; they must be "
            f"equal (nothing is broadcast: a silent (n, 1) against (n,) would compare all pairs)"
        )
    _check_floating("prediction", prediction)
    _check_floating("target", target)
    _check_over(prediction, over)
    if not may_be_empty:
        check_not_empty(prediction)
    if prediction.dtype == target.dtype == torch.float32:
        return prediction, target
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    return prediction.to(dtype), target.to(dtype)


def check_weights(mask: Tensor | None, measure: Tensor | None, like: Tensor) -> None:
    """A mask that is boolean and a measure that is finite and not negative where it counts, both broadcastable."""
    if mask is not None:
        check_broadcast("mask", mask, like)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be boolean (True: counts), got {mask.dtype}; weights go into measure")
    if measure is not None:
        check_broadcast("measure", measure, like)
        _check_measure(measure if mask is None else torch.where(mask, measure, 0))


def combined_measure(mask: Tensor | None, measure: Tensor | None, like: Tensor) -> Tensor | None:
    """μ of every point: the measure where the mask is True, 0 elsewhere; None where neither is given."""
    check_weights(mask, measure, like)
    if mask is None and measure is None:
        return None
    total = torch.ones((), dtype=like.dtype, device=like.device) if measure is None else measure.detach()
    if mask is not None:
        total = torch.where(mask, total, 0)
    return total.to(like.dtype).expand(like.shape)


def check_any(everything: float) -> None:
    """Raise where no point is left, given Σμ over everything."""
    if not everything > 0:
        raise ValueError(
            "no point is left: mask is False or measure is 0 everywhere, so there is nothing to take a mean over; "
            "skip this batch"
        )


def warn_unmet(missed: int, groups: int, number: float) -> None:
    """Say that a budget cannot be met in some groups."""
    warnings.warn(
        f"the temperature budget {number:.3g} cannot be met in {missed} of {groups} groups: "
        f"too few points, or too many tied at the largest error, which takes all the weight there. Use a smaller "
        f"budget or larger groups.",
        RuntimeWarning,
        stacklevel=2,
    )


def check_finite(
    errors: Tensor, prediction: Tensor | None = None, target: Tensor | None = None, mask: Tensor | None = None
) -> None:
    """Raise where an error is NaN, infinite or negative, with the count and the first index of the culprits.

    Args:
        errors: the pointwise errors.
        prediction, target: what they came from; None where only the errors are known.
        mask: where they count; the errors of the other points have been replaced.
    """
    if errors.numel() == 0 or is_traced(errors):
        return
    least, largest = errors.detach().aminmax()
    if bool((least >= 0) & largest.isfinite()):
        return
    if bool(errors.detach().isfinite().all()):
        bad = errors.detach() < 0
        raise ValueError(f"an error must not be negative, but has {_counted(bad, 'negative')}")
    if prediction is None:
        raise ValueError(f"errors {_culprits(errors)}; mask them, or find where they come from")
    for name, values in (("prediction", prediction), ("target", target)):
        values = values if values is None or mask is None else torch.where(mask, values, 0)
        if values is not None and not bool(values.isfinite().all()):
            raise ValueError(f"{name} {_culprits(values)}; mask them, or find where they come from")
    raise ValueError(
        f"the pointwise error of finite values overflows in {errors.dtype}: it {_culprits(errors)}; "
        f"scale the data, or compute in a wider type"
    )


def _culprits(values: Tensor) -> str:
    return f"has {_counted(~values.isfinite(), 'non-finite')}"


def _counted(bad: Tensor, what: str) -> str:
    first = tuple(bad.nonzero()[0].tolist())
    return f"{int(bad.sum())} {what} values of {bad.numel()}, the first at index {first}"


def check_labels(labels: Tensor, like: Tensor, names: Sequence[str] | None) -> None:
    """Classes of points: integers from 0 that broadcast, with a name each where there are names."""
    check_broadcast("labels", labels, like)
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"labels must be integers from 0, got {labels.dtype}")
    if labels.numel() and int(labels.min()) < 0:
        raise ValueError(f"labels must be integers from 0, but the least is {int(labels.min())}")
    count = int(labels.max()) + 1 if labels.numel() else 0
    if names is not None and len(names) < count:
        raise ValueError(f"names has {len(names)} names, but the labels go up to {count - 1}: give {count}")


def _check_over(values: Tensor, over: str) -> None:
    if over != "all" and over not in GROUPS_ALONG:
        raise ValueError(f"over must be one of {', '.join(map(repr, ('all', *GROUPS_ALONG)))}; got {over!r}")
    if values.dim() <= GROUPS_ALONG.get(over, -1):
        axes = "(batch, channel, lead, *space)" if over == "lead" else "(batch, channel, *space)"
        raise ValueError(f"over={over!r} needs tensors of shape {axes}; got shape {tuple(values.shape)}")


def check_not_empty(values: Tensor) -> None:
    """Raise where there is no element at all."""
    if values.numel() == 0:
        raise ValueError(f"the tensors are empty (shape {tuple(values.shape)}): there is nothing to take a mean over")


def _check_floating(name: str, values: Tensor) -> None:
    if values.is_complex():
        raise TypeError(
            f"{name} is complex ({values.dtype}), and a loss needs real numbers: pass torch.view_as_real of both "
            f"prediction and target, whose squared errors add up to those of the complex numbers"
        )
    if not values.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {values.dtype}; convert it, e.g. {name}.float()")


def broadcasts(values: Tensor, like: Tensor) -> bool:
    """Whether the values broadcast to the shape of `like`."""
    try:
        return torch.broadcast_shapes(values.shape, like.shape) == like.shape
    except RuntimeError:
        return False


def check_broadcast(name: str, values: Tensor, like: Tensor) -> None:
    """Values that broadcast to the shape of `like`."""
    if not broadcasts(values, like):
        raise ValueError(f"{name} has shape {tuple(values.shape)}, which does not broadcast to {tuple(like.shape)}")


def _check_measure(measure: Tensor) -> None:
    if is_traced(measure) or measure.numel() == 0:
        return
    least, largest = measure.detach().aminmax()
    if bool((least >= 0) & largest.isfinite()):
        return
    bad = ~((measure >= 0) & measure.isfinite())
    value = float(measure[tuple(bad.nonzero()[0].tolist())])
    raise ValueError(f"measure must be finite and not negative, but has {_counted(bad, 'other')}: {value}")


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
