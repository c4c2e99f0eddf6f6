"""Each process keeps a share of parameters, gradients and moments (FSDP2); saved states are whole."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
else:  # slow to import
    DeviceMesh = Any

__all__ = ["all_finite", "gathered", "is_sharded", "refuse_unshardable", "shard", "spread", "spread_state"]

UNIT = 1_000_000
"""Parameters from which a layer is gathered by itself; smaller ones are gathered together, in one message."""


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Leave every process its share of the parameters; those of a layer are gathered for the passes through it.

    Layers are the elements of `nn.ModuleList` and `nn.Sequential`. Other parameters are gathered for the passes through
    the whole model, which may use them without calling the module that holds them.
    """
    from torch.distributed.fsdp import fully_shard

    layers = _layers(model)
    inner_first = [module for module in reversed(list(model.modules())) if module in layers]
    for module in (*inner_first, model):
        if module is model or sum(p.numel() for p in module.parameters() if not is_sharded(p)) >= UNIT:
            module.register_forward_hook(_not_a_view)
            fully_shard(module, mesh=mesh, reshard_after_forward=True)


def _layers(model: nn.Module) -> set[nn.Module]:
    shared = len([*model.named_parameters(remove_duplicate=False)]) > len([*model.parameters()])
    if shared:  # a layer would hide its parameters from the others
        return set()
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList | nn.Sequential)]
    return {layer for stack in stacks for layer in stack if type(layer).forward is not nn.Module.forward}


def _not_a_view(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """FSDP2 looks for the backward pass at the output, where an operation in place on a view would hide it."""
    return output.clone() if isinstance(output, Tensor) and output._base is not None else output


def refuse_unshardable(model: nn.Module) -> None:
    """Refuse a model that `fully_shard` cannot take.

    Raises:
        ValueError: with the first parameter that it cannot take.
    """
    dtype = next((p.dtype for p in model.parameters()), None)
    for name, p in model.named_parameters():
        reasons = {
            "is complex": p.is_complex(),
            "is a scalar": p.dim() == 0,
            "is not contiguous": not p.is_contiguous(),
            f"is {p.dtype} where others are {dtype}": p.dtype != dtype,
        }
        if reason := next((reason for reason, holds in reasons.items() if holds), None):
            raise ValueError(
                f"device.strategy is 'fsdp', but the parameter '{name}' {reason}, which PyTorch's fully_shard cannot "
                "take: use 'ddp', where each process holds the whole model"
            )


def is_sharded(x: Any) -> bool:
    """Whether a process holds a share of a tensor."""
    return hasattr(x, "device_mesh")


def gathered(state: Any, keep: bool) -> Any:
    """A state with whole tensors on the CPU, which all processes ask for together; empty ones where `keep` is false."""
    if isinstance(state, dict):
        return {name: gathered(value, keep) for name, value in state.items()}
    if not is_sharded(state):
        return state
    whole = state.full_tensor()
    return whole.cpu() if keep else whole.new_empty(0, device="cpu")


def spread(whole: Any, like: Any) -> Any:
    """This process's share of a tensor that all of them hold; the tensor itself where `like` is whole."""
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def spread_state(whole: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """A whole state for `load_state_dict` of a model, sharded or not."""
    own = model.state_dict()
    return {name: spread(x, own.get(name)) for name, x in whole.items()}


def all_finite(x: Any) -> bool:
    """Of a tensor in shares, the same answer in every process."""
    bad = (~x.to_local().isfinite()).any().float()
    distributed.all_reduce(bad, distributed.ReduceOp.MAX, group=x.device_mesh.get_group())
    return not bad
