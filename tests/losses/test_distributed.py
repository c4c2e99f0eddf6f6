"""Two and three gloo processes against one."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

# What every process runs: its rank's uneven shard of one batch, against the whole batch computed alone.
SCRIPT = """
    import sys
    import torch
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.nn.parallel import DistributedDataParallel
    from squall.losses import (
        Accumulation, EffectiveFraction, ImbalanceAwareLoss, KLBudget, LaggedAccumulation, MeanSquaredError, Relative
    )

    torch.set_num_threads(1)
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 13, 3, 8, generator=generator, dtype=torch.float64)
    y[0] *= 10
    bounds = [0, 7, 13] if world == 2 else [0, 9, 9, 13]  # one process of three has nothing
    mine = slice(bounds[rank], bounds[rank + 1])

    def model():
        torch.manual_seed(1)
        return torch.nn.Linear(8, 8, dtype=torch.float64)

    def gradient(module):
        return torch.cat([p.grad.reshape(-1) for p in module.parameters()])

    for over in ("all", "sample", "channel"):
        recipes = [{}, {"temperature": 0.0}, {"trim": 0.05}]
        if world == 2:  # the others share their sums over the processes in the same places
            recipes += [{"temperature": 30.0}, {"temperature": float("inf")}, {"temperature": Relative(4.0)},
                        {"temperature": EffectiveFraction(0.5)}, {"cap": 3.0}, {"mean_share": 0.2},
                        {"temperature": KLBudget(1.0, cap=4)}, {"winsorize": 0.05},
                        {"temperature": KLBudget(9.0, cap=4)}]
        for kwargs in recipes:
            alone = ImbalanceAwareLoss(over=over, group=None, **kwargs)
            sharded = ImbalanceAwareLoss(over=over, **kwargs)
            whole = model()
            expected = alone(whole(x), y)
            expected.backward()
            parallel = DistributedDataParallel(model())
            for _ in range(2):
                parallel.zero_grad()
                value = sharded(parallel(x[mine]), y[mine])
                value.backward()
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
            torch.testing.assert_close(gradient(parallel), gradient(whole), rtol=1e-5, atol=1e-9)
            for name in ("kl", "max_weight", "max_error", "loss"):
                torch.testing.assert_close(sharded.report()[name], alone.report()[name], rtol=1e-4, atol=1e-9)
    # Groups too large to be gathered: their sketches are added up.
    many, goal = torch.randn(2, 13, 3, 900, generator=generator)
    goal[0] *= 10
    area = torch.linspace(0.1, 1, 900)
    sent, all_reduce = [], distributed.all_reduce

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    distributed.all_reduce = counted
    for over in ("all", "sample", "channel"):
        for kwargs in ({}, {"temperature": KLBudget(1.0, cap=5)}, {"temperature": KLBudget(2.0, cap=5)}, {"trim": 0.01},
                       {"winsorize": 0.01}, {"cap": 3.0}, {"temperature": 0.0}, {"mean_share": 0.2}):
            for given in ({}, {"measure": area}):
                a, b = many.clone().requires_grad_(), many[mine].clone().requires_grad_()
                expected = ImbalanceAwareLoss(over=over, group=None, **kwargs)(a, goal, **given)
                expected.backward()
                sent.clear()
                value = ImbalanceAwareLoss(over=over, **kwargs)(b, goal[mine], **given)
                value.backward()
                assert sum(sent) <= 2**16 * (3 if over == "channel" else 1), sum(sent)
                torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
                off = (b.grad / world - a.grad[mine]).norm() / a.grad.norm()
                assert off < 1e-5, (over, kwargs, list(given), off)  # a cap settles to 1e-6 of all weight
    distributed.all_reduce = all_reduce
    mask = torch.zeros(13, 1, 8, dtype=torch.bool)
    mask[:4] = True  # all False on the last process
    value = ImbalanceAwareLoss()(x[mine], y[mine], mask=mask[mine])
    torch.testing.assert_close(value, ImbalanceAwareLoss(group=None)(x, y, mask=mask), rtol=1e-6, atol=0)
    only = mask[mine] if rank == 0 else None  # on some processes only: all of it counts elsewhere
    everywhere = torch.cat([mask[: bounds[1]], torch.ones_like(mask[bounds[1]:])])
    value = ImbalanceAwareLoss()(x[mine], y[mine], mask=only)
    torch.testing.assert_close(value, ImbalanceAwareLoss(group=None)(x, y, mask=everywhere), rtol=1e-6, atol=0)

    for over in ("all", "sample", "channel", "lead"):  # the map under DistributedDataParallel
        whole, parallel = model(), DistributedDataParallel(model())
        ImbalanceAwareLoss(over=over, group=None, reduction="none")(whole(x), y).sum().backward()
        ImbalanceAwareLoss(over=over, reduction="none")(parallel(x[mine]), y[mine]).sum().backward()
        torch.testing.assert_close(gradient(parallel), gradient(whole), rtol=1e-5, atol=1e-9)

    if world == 2:  # micro-batches on every process
        parts = [slice(bounds[rank], bounds[rank] + 2), slice(bounds[rank] + 2, bounds[rank + 1])]
        for temperature in (KLBudget(0.3), 30.0):
            whole = model()
            expected = ImbalanceAwareLoss(temperature, group=None)(whole(x), y)
            expected.backward()
            parallel = DistributedDataParallel(model())
            reported = ImbalanceAwareLoss(temperature)
            both = Accumulation(reported)
            for part in parts:
                both.observe(parallel(x[part]), y[part])
            value = 0
            for part in parts:
                loss = both.loss(parallel(x[part]), y[part])
                loss.backward()
                value += loss.detach()
            torch.testing.assert_close(value, expected.detach(), rtol=1e-6, atol=0)
            assert abs(reported.report()["loss"] / expected.item() - 1) < 1e-6
            torch.testing.assert_close(gradient(parallel), gradient(whole), rtol=1e-5, atol=1e-9)
            settled = ImbalanceAwareLoss(temperature)
            for _ in range(12):  # the lagged temperature of a budget settles
                parallel.zero_grad()
                lagged = LaggedAccumulation(settled)
                for part in parts:
                    lagged.loss(parallel(x[part]), y[part]).backward()
                value = lagged.finish(parallel.parameters())
            assert abs(value / expected.item() - 1) < 1e-6, (value, expected)
            torch.testing.assert_close(gradient(parallel), gradient(whole), rtol=1e-4, atol=1e-8)
    for function in (ImbalanceAwareLoss(), torch.func.grad(ImbalanceAwareLoss())):
        try:
            torch.func.vmap(function)(x[mine], y[mine])
        except ValueError as error:
            assert "pass group=None" in str(error)
        else:
            assert bounds[rank] == bounds[rank + 1]
    # Fully sharded parameters, and a grid of which every process has a part, given as DTensors or as they are.
    whole, sharded = (torch.nn.Sequential(torch.nn.Tanh(), model()) for _ in range(2))
    fully_shard(sharded)
    ImbalanceAwareLoss(group=None)(whole(x), y).backward()
    ImbalanceAwareLoss()(sharded(x[mine]), y[mine]).backward()
    full = torch.cat([p.grad.full_tensor().reshape(-1) for p in sharded.parameters()])
    torch.testing.assert_close(full, gradient(whole), rtol=1e-5, atol=1e-9)
    mesh = init_device_mesh("cpu", (world,))
    area = torch.linspace(0.1, 1, 8, dtype=x.dtype)
    half = torch.arange(13).view(13, 1, 1) % 2 == 0
    for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
        spread = [distribute_tensor(u, mesh, [placement]) for u in (x, y)]
        given = {"mask": half, "measure": distribute_tensor(area, mesh, [Replicate()])}
        for over in ("all", "sample", "channel", "lead", "mse", "map"):
            here, all_of_it = spread[0].detach().requires_grad_(), x.clone().requires_grad_()
            if over == "mse":
                value, expected = MeanSquaredError()(here, spread[1]), (all_of_it - y).square().mean()
            elif over == "map":
                value = ImbalanceAwareLoss(reduction="none")(here, spread[1]).sum().full_tensor()
                expected = ImbalanceAwareLoss(group=None)(all_of_it, y)
            else:
                value = ImbalanceAwareLoss(over=over)(here, spread[1], **given)
                expected = ImbalanceAwareLoss(over=over, group=None)(all_of_it, y, mask=half, measure=area)
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
            value.backward()
            expected.backward()
            assert here.grad.placements == (placement,)
            torch.testing.assert_close(here.grad.full_tensor(), all_of_it.grad, rtol=1e-5, atol=1e-9)
    partial = DTensor.from_local(x, mesh, [Partial()])
    for pair, text in (((spread[0], y), "distribute both alike"), ((partial, partial), "redistribute(placements=...)"),
                       ((distribute_tensor(x, mesh, [Shard(0)]), spread[1]), "redistribute one like the other")):
        try:
            ImbalanceAwareLoss()(*pair)
        except (TypeError, ValueError) as error:
            assert text in str(error), error
        else:
            raise AssertionError("not refused")
    try:
        Accumulation(ImbalanceAwareLoss()).observe(*spread)
    except TypeError as error:
        assert "prediction.to_local()" in str(error)
    else:
        raise AssertionError("not refused")
    local, goal_here = (distribute_tensor(u, mesh, [Shard(2)]).to_local() for u in (x, y))
    for over in ("all", "channel"):
        here, all_of_it = local.clone().requires_grad_(), x.clone().requires_grad_()
        value = ImbalanceAwareLoss(over=over, group=mesh.get_group())(
            here, goal_here, measure=distribute_tensor(area, mesh, [Shard(0)]).to_local()
        )
        expected = ImbalanceAwareLoss(over=over, group=None)(all_of_it, y, measure=area)
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
        expected.backward()
        value.backward()
        part = distribute_tensor(all_of_it.grad, mesh, [Shard(2)]).to_local()
        torch.testing.assert_close(here.grad / world, part, rtol=1e-5, atol=1e-9)

    broken = x.clone()
    broken[0, 0, 0] = float("nan")
    lossy = ImbalanceAwareLoss()
    torch.testing.assert_close(lossy.weights(x[mine], y[mine]), ImbalanceAwareLoss(group=None).weights(x, y)[mine])
    for refuses in (lossy, lossy.weights, Accumulation(lossy).observe, LaggedAccumulation(lossy).loss):
        try:
            refuses(broken[mine], y[mine])
        except ValueError as error:
            assert rank == 0 and "non-finite" in str(error)
        except RuntimeError as error:
            assert rank > 0 and "another process refused" in str(error)
        else:
            raise AssertionError("not refused")
    print("equal")
    distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_processes_give_the_value_and_gradient_of_one(world, tmp_path: Path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, str(rank), str(world), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    for out, err in outputs:
        assert out.strip().endswith("equal"), "\n".join(err for _, err in outputs)
