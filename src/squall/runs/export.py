"""A run as a folder that goes to others: weights, a program of one step, a model card."""

import errno
import io
import os
import re
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import nn
from torch.func import functional_call

import squall
from squall._process.files import refuse_existing, write_folder_beside
from squall._types import State
from squall.models.inputs import Held
from squall.runs.config import to_dict
from squall.runs.emulator import BESIDE, DESCRIPTION, PROGRAM, WEIGHTS, Contents, Emulator, checksum, describe_export
from squall.runs.folder import Kind, RunFolder
from squall.runs.trained import open_run

AGREEMENT = 1e-6
"""Largest difference between a step of the program and one of the model, relative to the largest value: eight times the
rounding of float32, as the program may add in another order."""


@dataclass(frozen=True)
class Exported:
    """Where a run was exported to, and why `torch.export` could not take its model, if it could not."""

    path: Path
    refusal: str | None


def export_run(
    path: Path | str, out: Path | str, *, checkpoint: Kind | None = None, data: str | None = None, trust: bool = False
) -> Exported:
    """Write the model of a run into a new folder that needs neither the run nor its data.

    Args:
        path: the run folder.
        out: the new folder.
        checkpoint: which weights; the best on the validation rollouts if there are, else the last.
        data, trust: as `open_run` takes them.

    Raises:
        FileExistsError: if `out` is there already.
        ExportError: if the state of the model cannot be written.
    """
    out = Path(out)
    refuse_existing(out, "another folder")
    trained = open_run(path, data, trust=trust)
    loaded, step = trained.load(checkpoint)
    emulator = trained.emulator.cpu().eval()
    contents, weights = Contents.of(emulator, to_dict(trained.config), trained.normalization)
    files, refusal = {WEIGHTS: weights}, None
    if emulator.condition_channels or emulator.mask is not None:
        files |= {name: (trained.folder.path / name).read_bytes() for name in BESIDE}
    try:
        files[PROGRAM] = _program(emulator)
    except _NotExportable as error:
        refusal = str(error)
    origin = {"squall": squall.__version__, "torch": torch.__version__, "checkpoint": {"kind": loaded, "step": step}}
    about = describe_export(contents, files, **origin)
    card = _card(out.resolve().name, emulator, contents, files, refusal, trained.folder, loaded, step)
    try:
        write_folder_beside(out, files | {DESCRIPTION: about.encode(), "README.md": card.encode()}, replace=False)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise FileExistsError(f"{out} exists now and is not overwritten: choose another folder") from error
    return Exported(out, refusal)


class _NotExportable(Exception):
    """Why `torch.export` cannot take a model."""


def _program(emulator: Emulator) -> bytes:
    """One step as a program for any batch size, compared with the model on two batches."""
    parameter = next(emulator.parameters())
    dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
    generator = torch.Generator().manual_seed(0)
    shapes = [emulator.initial_shape]
    if emulator.condition_channels:
        shapes.append((emulator.condition_channels, *emulator.state_shape[1:]))
    given = [torch.randn(3, *shape, generator=generator, dtype=dtype) for shape in shapes]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter, about the model's own code
        try:
            batch = torch.export.Dim("batch")
            dynamic = {name: {0: batch} for name, _ in zip(("u", "conditions"), given, strict=False)}
            program = torch.export.export(Step(emulator), tuple(x[:2] for x in given), dynamic_shapes=dynamic)
            content = _program_bytes(program)
            for count in (3, 1):
                some = [x[:count] for x in given]
                _compare(program.module().forward(*some), emulator(*some))
        except _NotExportable:
            raise
        except Exception as error:  # of the tracer, the exporter, or the module's own code
            text = next(iter(str(error).strip().splitlines()), "")
            raise _NotExportable(f"torch.export stops{_place(error)}: {type(error).__name__}: {text}") from error
    return content


def _place(error: Exception) -> str:
    """The operator of which an error of the exporter speaks, and the line of the model's own code that calls it."""
    operator = re.search(r"aten\.\w+(?:\.\w+)?|torch\.(?!export|_)\w+[\w.]*\w", str(error))
    named = f" at {operator[0]}" if operator else ""
    others = tuple(os.path.dirname(str(module.__file__)) + os.sep for module in (torch, squall))
    library = os.path.dirname(os.__file__)
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((*others, "<")) and os.path.dirname(frame.filename) != library:
            return f"{named} in `{frame.line}` ({Path(frame.filename).name}, line {frame.lineno})"
    return named


@final
class Step(nn.Module):
    """An emulator with all its tensors at the root: a program looks each one up again in every step, and a path such as
    `model.down.0.norm1.weight` costs as much as a small operation."""

    def __init__(self, emulator: Emulator) -> None:
        super().__init__()
        self.names: dict[str, str] = {}
        for name, tensor in (*emulator.named_parameters(), *emulator.named_buffers()):
            own = self.names[name] = f"{name.replace('.', '_')}_{len(self.names)}"
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(own, tensor)
            else:
                self.register_buffer(own, tensor)
        self.call = partial(functional_call, emulator)  # not a submodule: its tensors are here already

    def forward(self, u: State, conditions: Held | None = None) -> State:
        tensors = {name: getattr(self, own) for name, own in self.names.items()}
        return self.call(tensors, (u, conditions))


def _program_bytes(program: torch.export.ExportedProgram) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def _compare(given: State, expected: State) -> None:
    error = (given - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    if not error <= AGREEMENT:
        raise _NotExportable(
            f"the exported step differs from the model by {error:.1e} of its largest value: it depends on the batch, "
            "on chance or on earlier calls"
        )


# The model card


def _card(
    name: str,
    emulator: Emulator,
    contents: Contents,
    files: Mapping[str, bytes],
    refusal: str | None,
    folder: RunFolder,
    checkpoint: str,
    step: int,
) -> str:
    environment = folder.read_json("environment.json")
    sections = {
        "Data": _about_data(contents.data, environment),
        "Training": _about_training(contents.config, environment, checkpoint, step),
        "Metrics": _metrics(folder, step),
        "Intended use": _intended_use(contents.data),
        "Limits": _limits(contents.data, folder.has("evaluation.json")),
        "Use": _use(emulator, contents, files, refusal),
    }
    text = "\n\n".join(f"## {title}\n\n{body}" for title, body in sections.items())
    return f"---\nlibrary_name: squall\ntags: [emulator, physics, pde]\n---\n\n# {_plain(name)}\n\n{text}\n"


def _plain(text: object) -> str:
    """Text of a data set within a line of Markdown."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", " ".join(str(text).split()))


def _about_data(data: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    unit = data["units"]
    fields = ", ".join(f"{_plain(x)} ({_plain(unit[x])})" if x in unit else _plain(x) for x in data["fields"])
    axes = zip(data["axes"], data["coordinates"], data["boundary"], strict=True)
    grid = "; ".join(f"{_plain(axis)}: {len(x)} points from {x[0]:.6g} to {x[-1]:.6g}, {end}" for axis, x, end in axes)
    counts = ", ".join(f"{part} {count}" for part, count in environment.get("trajectories", {}).items())
    lines = [
        f"Data set: {_plain(data['name'])}",
        f"Fields: {fields}",
        f"Grid: {grid}",
        f"Time step: {data['dt']:.6g} {_plain(unit.get('time', '(unit of the data)'))}",
        f"Trajectories: {counts}",
        f"Checksum of the data file (sha256): {_plain(environment.get('data', {}).get('sha256', 'unknown'))}",
    ]
    if data["parameters"]:
        lines.append("Parameters: " + ", ".join(f"{_plain(k)} = {_plain(v)}" for k, v in data["parameters"].items()))
    return "\n".join(f"- {line}" for line in lines)


def _about_training(config: Mapping[str, Any], environment: Mapping[str, Any], checkpoint: str, step: int) -> str:
    lines = [
        f"Model: {_plain(config['model']['name'])}, {environment.get('parameters', 'unknown')} parameters; it predicts "
        f"the {'next state' if config['model']['predicts'] == 'state' else 'rate du/dt'}",
        f"Integrator: {config['integrator'] if config['model']['predicts'] == 'rate' else 'none'}",
        f"Loss: {config['loss']['name']}",
        f"Weights: {checkpoint} checkpoint, step {step} of {config['training']['steps']}; "
        f"seed {config['training']['seed']}",
        f"squall {squall.__version__}; all settings are in {DESCRIPTION}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _metrics(folder: RunFolder, step: int) -> str:
    checkpoints = folder.read_json("evaluation.json")["checkpoints"] if folder.has("evaluation.json") else {}
    scores = next((x for x in checkpoints.values() if x["step"] == step), None)
    if scores is None:
        return "These weights were not evaluated. `squall evaluate RUN` before the export fills this section."
    rollout, baselines = scores["rollout"], scores.get("baselines", {})
    rows: list[tuple[str, ...]] = [("", "this model", *baselines)]
    for name in ("states", "energy", "mass"):
        if name in rollout:
            rows.append((f"rollout: {name}", *(_number(x.get(name)) for x in (rollout, *baselines.values()))))
    rows += [(f"rollout: VRMSE of {_plain(k)}", _number(x)) for k, x in rollout.get("vrmse", {}).items()]
    rows.append(("rollouts that diverged", f"{rollout['diverged']} of {rollout['trajectories']}"))
    rows += [(f"one step: {name.replace('_', ' ')}", _number(x)) for name, x in scores["one_step"].items()]
    width = len(rows[0])
    lines = ["| " + " | ".join((*row, *[""] * (width - len(row)))) + " |" for row in rows]
    lines.insert(1, "|---" * width + "|")
    return "On the test trajectories; mean squared errors, one step of the rate (u' − u)/dt.\n\n" + "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _intended_use(data: Mapping[str, Any]) -> str:
    return (
        f"An emulator of {_plain(data['name'])}: it maps states on the grid above, in the units of the data, to the "
        f"states {data['dt']:.6g} later. Rollouts repeat this step."
    )


def _limits(data: Mapping[str, Any], evaluated: bool) -> str:
    lines = [
        "Other grids, time steps, boundary conditions and parameters than those above were not tested.",
        "Errors grow along a rollout; lead times beyond those of the test trajectories were not tested.",
        "No quantity is guaranteed to be conserved unless the model is built to conserve it.",
    ]
    if not evaluated:
        lines.insert(0, "The errors of this model are not known.")
    return "\n".join(f"- {line}" for line in lines)


def _use(emulator: Emulator, contents: Contents, files: Mapping[str, bytes], refusal: str | None) -> str:
    history, names = emulator.inputs.history, emulator.inputs.conditions
    axes = ", ".join(map(str, contents.data["axes"]))
    batch = f"initial: (batch, {f'history {history}, ' if history > 1 else ''}channel, {axes})"
    more = ", conditions" if names else ""
    text = (
        f'```python\nimport squall\n\nemulator = squall.load("FOLDER")\n'
        f"trajectories = emulator.rollout(initial, 100{more})  # {batch}\n```\n\n"
        f"This reads {', '.join((DESCRIPTION, *(name for name in files if name != PROGRAM)))}, which hold no code. "
    )
    if names:
        text += (
            f"Conditions: (batch, steps or 1, {emulator.condition_channels}, {axes}), at the time of the last initial "
            f"state and on; their channels are {', '.join(map(_plain, names))}. "
        )
    if emulator.mask is not None:
        text += "Masked points keep their value. "
    sums = "\n".join(f"- {name}: {checksum(content)}" for name, content in files.items())
    if refusal:
        return f"{text}There is no {PROGRAM}: {_plain(refusal)}.\n\nChecksums (sha256):\n\n{sums}"
    given = "states" if history > 1 else "u"
    call = f"u = step({given}{more})" + "  # conditions: (batch, ...) at the time of the state" * bool(names)
    return text + (
        f"Without squall:\n\n```python\nimport torch\n\n"
        f'step = torch.export.load("{PROGRAM}").module().forward\n{call}\n```\n\n'
        f"Open a {PROGRAM} only from a source you trust: PyTorch's reader can run code that the file contains."
        f"\n\nChecksums (sha256):\n\n{sums}"
    )
