"""Does a weighted loss beat the mean squared error in the rollouts of APEBench, by its protocol and its scoring?

    pip install 'squall[train,fast,apebench]'
    python benchmarks/apebench_rollouts.py --data DATA --out results.csv    # Conv, three seeds; 1.5 hours of one core
    python benchmarks/apebench_rollouts.py --data DATA --out results.csv --losses MSE --seeds 0 --steps 200
    python benchmarks/apebench_rollouts.py --out results.csv --table

A run that the CSV holds is not repeated: start the command again after an interruption. DATA is made where it is
missing. The networks have the weights, and the distribution of first weights, of those in APEBench 0.1.1, which a test
compares number by number.

Reference: Koehler et al., APEBench, NeurIPS 2024, https://arxiv.org/abs/2411.00180.
"""

import argparse
import csv
import itertools
import platform
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

import squall
from squall.data import Transitions
from squall.data.apebench import load_scenario, write_scenario
from squall.integrators import next_state
from squall.losses import ImbalanceAwareLoss, KLBudget, MeanSquaredError
from squall.losses.rivals import rival

SCENARIOS = ("diff_burgers", "diff_kdv", "diff_ks")
NETWORKS = ("Conv;34;10;relu", "Res;26;8;relu", "UNet;12;2;relu", "FNO;12;18;4;gelu")
LOSSES = {
    "MSE": MeanSquaredError,
    "budget 0.3": ImbalanceAwareLoss,
    "budget 1, cap 3": lambda: ImbalanceAwareLoss(KLBudget(1.0, cap=3.0)),
    "top 10 %": lambda: rival("top_k", alpha=0.1),
}
PUBLISHED = {
    ("diff_burgers", "Conv;34;10;relu"): 0.025,
    ("diff_burgers", "Res;26;8;relu"): 0.012,
    ("diff_burgers", "UNet;12;2;relu"): 0.065,
    ("diff_burgers", "FNO;12;18;4;gelu"): 0.07,
    ("diff_kdv", "Conv;34;10;relu"): 0.12,
    ("diff_kdv", "Res;26;8;relu"): 0.88,
    ("diff_kdv", "UNet;12;2;relu"): 0.10,
    ("diff_kdv", "FNO;12;18;4;gelu"): 0.21,
    ("diff_ks", "Conv;34;10;relu"): 0.27,
    ("diff_ks", "Res;26;8;relu"): 0.26,
    ("diff_ks", "UNet;12;2;relu"): 0.20,
    ("diff_ks", "FNO;12;18;4;gelu"): 0.54,
}
"""gmean100 of MSE, read off a figure of the paper: one in the last digit more or less."""

KEYS = ("scenario", "network", "loss", "seed", "steps")
SCORES = ("gmean100", "nrmse_1", "nrmse_100", "one_step_mean", "one_step_top_1_percent", "one_step_max")


def network(config: str) -> nn.Module:
    """A network of APEBench for one channel in one dimension, by its configuration there."""
    name, *sizes, activation = config.split(";")
    act = {"relu": functional.relu, "gelu": lambda x: functional.gelu(x, approximate="tanh")}[activation]
    make = {"Conv": ConvNet, "Res": ResNet, "UNet": UNet, "FNO": FNO}[name]
    return make(*map(int, sizes), act)


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Conv1d:
    return nn.Conv1d(inputs, outputs, 3, stride, padding=1, padding_mode="circular")


class ConvNet(nn.Module):
    def __init__(self, width: int, depth: int, act) -> None:
        super().__init__()
        widths = [1, *[width] * depth, 1]
        self.layers = nn.ModuleList(map(convolution, widths[:-1], widths[1:]))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.act(layer(x))
        return self.layers[-1](x)


class Sequence(nn.Module):
    """Lifting, blocks and projection."""

    def __init__(self, width: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.lifting = nn.Conv1d(1, width, 1)
        self.blocks = nn.Sequential(*blocks)
        self.projection = nn.Conv1d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(self.blocks(self.lifting(x)))


class ResNet(Sequence):
    def __init__(self, width: int, blocks: int, act) -> None:
        super().__init__(width, [ResBlock(width, act) for _ in range(blocks)])


class ResBlock(nn.Module):
    def __init__(self, width: int, act) -> None:
        super().__init__()
        self.first, self.second = convolution(width, width), convolution(width, width)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.second(self.act(self.first(x))))


class FNO(Sequence):
    def __init__(self, modes: int, width: int, blocks: int, act) -> None:
        super().__init__(width, [SpectralBlock(modes, width, act) for _ in range(blocks)])


class SpectralBlock(nn.Module):
    def __init__(self, modes: int, width: int, act) -> None:
        super().__init__()
        self.real = nn.Parameter(torch.randn(width, width, modes) / width**2)
        self.imaginary = nn.Parameter(torch.randn(width, width, modes) / width**2)
        self.bypass = nn.Conv1d(width, width, 1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        modes = self.real.shape[-1]
        low = torch.fft.rfft(x)[..., :modes]
        y = torch.einsum("bim,oim->bom", low, torch.complex(self.real, self.imaginary))
        y = functional.pad(y, (0, x.shape[-1] // 2 + 1 - modes))
        return self.act(torch.fft.irfft(y, n=x.shape[-1]) + self.bypass(x))


class UNet(nn.Module):
    def __init__(self, width: int, levels: int, act) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        pairs = list(itertools.pairwise(widths))
        self.lifting = DoubleConvolution(1, width, act)
        self.down = nn.ModuleList(convolution(fine, fine, stride=2) for fine, _ in pairs)
        self.left = nn.ModuleList(DoubleConvolution(fine, coarse, act) for fine, coarse in pairs)
        self.up = nn.ModuleList(UpConvolution(coarse, fine) for fine, coarse in pairs)
        self.right = nn.ModuleList(DoubleConvolution(coarse, fine, act) for fine, coarse in pairs)
        self.projection = nn.Conv1d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.lifting(x), []
        for down, left in zip(self.down, self.left, strict=True):
            skips.append(x)
            x = left(down(x))
        for up, right, skip in zip(reversed(self.up), reversed(self.right), reversed(skips), strict=True):
            x = right(torch.cat((skip, up(x)), 1))
        return self.projection(x)


class DoubleConvolution(nn.Module):
    def __init__(self, inputs: int, outputs: int, act) -> None:
        super().__init__()
        self.first, self.norm_1 = convolution(inputs, outputs), nn.GroupNorm(1, outputs)
        self.second, self.norm_2 = convolution(outputs, outputs), nn.GroupNorm(1, outputs)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm_2(self.second(self.act(self.norm_1(self.first(x))))))


class UpConvolution(nn.Conv1d):
    """Transposed convolution of stride 2 on a periodic axis: zeros between the points, then a convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3)

    def forward(self, x: Tensor) -> Tensor:
        stuffed = torch.stack((x, torch.zeros_like(x)), -1).flatten(-2)
        return super().forward(functional.pad(stuffed, (1, 1), mode="circular"))


@dataclass(frozen=True)
class Epochs:
    """Minibatches that go through all transitions in a new random order in every epoch."""

    population: int
    batch: int
    seed: int

    def __call__(self, step: int) -> Tensor:
        epoch, position = divmod(step, -(-self.population // self.batch))
        order = np.random.default_rng((self.seed, epoch)).permutation(self.population)
        return torch.from_numpy(order[position * self.batch :][: self.batch])


def run(scenario: str, config: str, loss: str, seed: int, steps: int, data: Path) -> dict[str, float]:
    """Train by the protocol and score the rollouts by APEBench's own function."""
    files = [write_scenario(scenario, part, data / f"{scenario}-{part}.hdf5") for part in ("train", "test")]
    train, test = (squall.data.load(squall.data.open(file)) for file in files)
    transitions = Transitions(train)
    settings = squall.TrainingSettings(
        steps=steps,
        batch=20,
        learning_rate=1e-3,
        schedule="cosine",
        warmup=steps // 5,
        residual="state",
        validate_every=0,
        checkpoint_every=steps,
        seed=seed,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network(config)
    started = time.process_time()
    sampler = Epochs(len(transitions), 20, seed)
    squall.train(model, transitions, settings, loss=LOSSES[loss](), integrator=next_state, sampler=sampler)
    seconds = time.process_time() - started
    truth = test.read()
    with torch.no_grad():
        u, rollout = truth[:, 0], []
        for _ in range(truth.shape[1] - 1):
            u = model(u)
            rollout.append(u)
        errors = torch.cat([(model(u[:-1]) - u[1:]).square().flatten() for u in truth]).sort().values
    result = load_scenario(scenario).perform_tests_on_rollout(torch.stack(rollout, 1).numpy(), truth[:, 1:].numpy())
    nrmse = np.asarray(result["mean_nRMSE"][0], dtype=np.float64)
    top = errors[-len(errors) // 100 :]
    scores = [np.exp(np.log(nrmse[:100]).mean()), nrmse[0], nrmse[:100][-1], errors.mean(), top.mean(), errors[-1]]
    return dict(zip(SCORES, map(float, scores), strict=True)) | {"cpu_seconds": seconds}


def read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, object]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [*row])
        if new:
            writer.writeheader()
        writer.writerow(row)


def table(rows: list[dict[str, str]]) -> str:
    """Medians over the seeds, and geometric means of the ratios to MSE, paired by seed."""
    cells: dict[tuple[str, ...], dict[str, dict[int, dict[str, str]]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        cells[row["scenario"], row["network"], row["steps"]][row["loss"]][int(row["seed"])] = row
    lines = [
        "| scenario | network | steps | loss | seeds | gmean100 (lowest to highest) | published | gmean100 / MSE "
        "| mean / MSE | top 1 % / MSE |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (scenario, config, steps), losses in sorted(cells.items()):
        for loss in [name for name in LOSSES if name in losses]:
            runs = losses[loss]
            scores = [float(row["gmean100"]) for row in runs.values()]
            spread = f"{statistics.median(scores):.3g} ({min(scores):.3g} to {max(scores):.3g})"
            published = (
                f"{PUBLISHED.get((scenario, config), float('nan')):.3g}" if (loss, steps) == ("MSE", "10000") else ""
            )
            shared = sorted(runs.keys() & losses["MSE"].keys()) if loss != "MSE" else []
            ratios = [
                f"{np.exp(np.mean([np.log(float(runs[s][key]) / float(losses['MSE'][s][key])) for s in shared])):.2f}"
                if shared
                else ""
                for key in ("gmean100", "one_step_mean", "one_step_top_1_percent")
            ]
            parts = [scenario, config, steps, loss, str(len(runs)), spread, published, *ratios]
            lines.append("| " + " | ".join(parts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the scenarios' data; made where they are missing")
    parser.add_argument("--out", type=Path, required=True, help="CSV of results; runs are added to it")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS[:1])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=[*LOSSES])
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--table", action="store_true", help="print the table of the CSV and end")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(read(arguments.out)))
        return
    if arguments.data is None:
        parser.error("--data is missing: name a folder for the scenarios' data")
    torch.set_num_threads(1)
    versions = {"squall": squall.__version__, "torch": torch.__version__, "machine": platform.machine()}
    cells = [
        (scenario, config, loss, seed, arguments.steps)
        for seed in arguments.seeds
        for config in arguments.networks
        for scenario in arguments.scenarios
        for loss in arguments.losses
    ]
    for cell in cells:
        keys = dict(zip(KEYS, cell, strict=True))
        if any(all(row[key] == str(value) for key, value in keys.items()) for row in read(arguments.out)):
            continue
        scores = run(*cell, arguments.data)
        append(arguments.out, keys | scores | versions)
        print(*cell, f"gmean100 {scores['gmean100']:.4g}, {scores['cpu_seconds']:.0f} CPU seconds", flush=True)


if __name__ == "__main__":
    main()
