"""Runs evaluated on their test trajectories, one or several as one."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from squall._process.extras import explain_missing_extra
from squall._process.files import refuse_existing, write_beside
from squall._process.messages import first_line
from squall._process.threads import threads
from squall.data import Normalization, Source
from squall.evaluation.pieces import pieces
from squall.evaluation.rollouts import Evaluation, Keep, evaluate, evaluate_each
from squall.evaluation.scores import Scoring
from squall.integrators import Implicit, IntegratorLike, substeps
from squall.models.stacked import Stacked
from squall.runs.build import Experiment, check_energy, integrator
from squall.runs.config import ConfigError, can_run_together
from squall.runs.folder import CheckpointError, Kind, RunFolder, evaluation_suffix, fingerprint
from squall.runs.installed import imported
from squall.runs.trained import TrainedRun, open_run
from squall.training.state import private_randomness


def evaluate_runs(
    paths: Sequence[Path | str],
    *,
    method: str | None = None,
    count: int = 1,
    device: str = "cpu",
    data: str | None = None,
    fields_of: Kind = "best",
    keep: Keep | Sequence[Keep] = Keep(),  # noqa: B008
    trust: bool = False,
    steps: int | None = None,
    stride: int | None = None,
    scoring: Scoring = Scoring(),  # noqa: B008
    netcdf: Path | None = None,
) -> list[dict[str, Any]]:
    """Evaluate the best and the last checkpoint of runs on their test trajectories, and write the results.

    One-step errors of data that squall did not simulate are in units of each field's standard deviation over the
    test trajectories, so that fields of different units can be added, and runs be compared.

    Args:
        paths: the run folders; several are evaluated as one, so they must be runs that could be trained together (see
            `config.can_run_together`). `evaluation.json` and `rollouts.npz` are written into each; with another
            integrator than that of the training their names carry it.
        method: the integrator of the rollouts; that of the training if left out.
        count: how many steps of it cover one dt.
        device: where to compute.
        data: where the data file is now, if it was moved.
        fields_of: which weights' rollouts are kept for figures, where there are both.
        keep: what is kept for figures, of all runs or of each; without fields there is no `rollouts.npz`.
        trust: as `open_run` takes it.
        steps, stride, scoring: as `evaluation.evaluate` takes them.
        netcdf: a file for the fields and the scores by lead time of one run, of the weights `fields_of`.

    Returns:
        for each run what its `evaluation.json` holds.

    Raises:
        CheckpointError: if a run has none.
        ConfigError: for runs that do not belong together, without test trajectories, or an integrator that does not
            apply.
        FileExistsError: if the file `netcdf` is there.
    """
    if not paths:
        return []
    keeps = [keep] * len(paths) if isinstance(keep, Keep) else keep
    kinds = [_kinds(RunFolder(path)) for path in paths]
    runs = _open_alike(paths, data, trust)
    experiment = runs[0].experiment
    test = experiment.split.test
    if test.trajectories == 0:
        raise ConfigError("data.test is 0: there are no test trajectories to evaluate on")
    whole, test = test, pieces(test, experiment.inputs.history, steps, stride)
    if netcdf is not None:
        _refuse_existing(netcdf, runs)
    chosen, suffix = _integrator(experiment, method, count), evaluation_suffix(method, count)
    scale = None if experiment.system is not None else Normalization.fit(test).std
    options = {"integrator": chosen, "system": experiment.system, "scale": scale}
    options |= {"inputs": experiment.inputs, "scoring": scoring, "steps": steps, "stride": stride}
    on = _device(device)
    evaluation_of = partial(_evaluations, on, whole, **options)
    checkpoints: list[dict[str, Any]] = [{} for _ in runs]
    for checkpoint in ("best", "last"):
        having = [i for i in range(len(runs)) if checkpoint in kinds[i]]
        saved = [runs[i].load(checkpoint)[1] for i in having]
        kept = [
            keeps[i] if checkpoint == fields_of or len(kinds[i]) == 1 else replace(keeps[i], fields=()) for i in having
        ]
        with threads(experiment.config.device.threads), private_randomness(experiment.config.training.seed, on):
            evaluations = evaluation_of([runs[i].experiment.model for i in having], kept)
        for i, step, keep, evaluation in zip(having, saved, kept, evaluations, strict=True):
            checkpoints[i][checkpoint] = {"step": step, **evaluation.to_dict()}
            if keep.fields:
                coordinates = {f"axis_{axis}": x for axis, x in enumerate(test.coordinates)}
                runs[i].folder.write_arrays(f"rollouts{suffix}.npz", **evaluation.rollouts.arrays(), **coordinates)
                if netcdf is not None:
                    with write_beside(netcdf) as part:
                        evaluation.to_xarray().to_netcdf(part, engine="h5netcdf")
    results = [{**_about(experiment, test, chosen, scale), "checkpoints": of_run} for of_run in checkpoints]
    for run, result in zip(runs, results, strict=True):
        run.folder.write_json(f"evaluation{suffix}.json", result)
    return results


def conserved_quantities(names: Sequence[str]) -> dict[str, Any]:
    """Conserved quantities by name: a field stands for itself, an import path for its function.

    Raises:
        ConfigError: if a path cannot be imported, or is no function, or two have the same name.
    """
    quantities: dict[str, Any] = {}
    for path in names:
        module, _, name = path.rpartition(".")
        if not module:
            quantities[path] = path
            continue
        try:
            function = imported(path)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise ConfigError(f"the conserved quantity '{path}' cannot be imported: {error}") from error
        if not callable(function):
            raise ConfigError(f"the conserved quantity '{path}' is no function of states")
        if name in quantities:
            raise ConfigError(f"two conserved quantities have the name '{name}': rename one of them")
        quantities[name] = function
    return quantities


def _open_alike(paths: Sequence[Path | str], data: str | None, trust: bool) -> list[TrainedRun]:
    """The runs, with the data of the first: they have to be those of all."""
    first = open_run(paths[0], data, trust=trust)
    runs = [first, *(open_run(path, data, split=first.experiment.split, trust=trust) for path in paths[1:])]
    for run in runs:
        if run is not first and not can_run_together(first.experiment.config, run.experiment.config):
            raise ConfigError(
                f"{run.folder.path} cannot be evaluated together with {first.folder.path}: their data, models, "
                "integrators or other settings differ; evaluate them apart"
            )
    return runs


@explain_missing_extra()
def _refuse_existing(netcdf: Path, runs: Sequence[TrainedRun]) -> None:
    """Before anything is computed."""
    for package in ("xarray", "h5netcdf"):
        importlib.import_module(package)
    if len(runs) > 1:
        raise ConfigError(f"{netcdf} holds one run, but {len(runs)} are evaluated: name one")
    refuse_existing(netcdf)


def _evaluations(
    device: torch.device, test: Source, models: Sequence[nn.Module], keeps: Sequence[Keep], **options: Any
) -> list[Evaluation]:
    """Of one model by itself, of several as one where steps are explicit."""
    if len(models) > 1 and not isinstance(options["integrator"], Implicit):
        return evaluate_each(Stacked(models, device), test, keep=keeps, **options)
    return [evaluate(model.to(device), test, keep=keep, **options) for model, keep in zip(models, keeps, strict=True)]


def _about(
    experiment: Experiment, test: Source, chosen: IntegratorLike, scale: Sequence[float] | None
) -> dict[str, Any]:
    """What an evaluation was made with."""
    about = test.description
    return {
        "integrator": getattr(chosen, "name", "step"),
        "dt": test.dt,
        "steps": test.steps - experiment.inputs.history + 1,
        "trajectories": test.trajectories,
        "fields": list(test.fields),
        "axes": list(about.axes),
        "units": about.units,
        "standardized": scale is not None,
        "system": None if experiment.system is None else experiment.system.name,
        "data": fingerprint(experiment.config.data.path),
    }


def _kinds(folder: RunFolder) -> list[Kind]:
    """The checkpoints worth evaluating, the best first; the last one too if it is another."""
    folder.read_config()
    best, last = folder.checkpoint_steps("best"), folder.checkpoint_steps("last")
    if not last:
        raise CheckpointError(f"{folder.path} has no checkpoint yet: train it with `squall train` first")
    if not best:
        return ["last"]
    return ["best"] if best[0] == last[0] else ["best", "last"]


def _device(name: str) -> torch.device:
    try:
        probe = torch.zeros(1, device=name)
        probe.item()  # as a device without memory, such as meta, cannot
        return probe.device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device is '{name}', which cannot be used here: {first_line(error)}") from error


def _integrator(experiment: Experiment, method: str | None, count: int) -> IntegratorLike:
    if count < 1:
        raise ConfigError(f"substeps is {count}, but must be at least 1")
    if experiment.config.model.predicts == "state" and (method is not None or count > 1):
        raise ConfigError("the model predicts the next state: no other integrator and no substeps apply to it")
    chosen = experiment.integrator if method is None else integrator(method)
    check_energy(chosen, experiment.model)
    return chosen if count == 1 else substeps(chosen, count)
