"""The large study of rivals, on data and models so small that every variant takes a step."""

from importlib.resources import files

import torch
import yaml
from shortcuts import without_shape_checks

from squall.runs.build import build
from squall.runs.config import from_dict, to_dict
from squall.runs.simulate import SIMULATED, simulate_to_file
from squall.study.definition import SIZES, read_study
from squall.training import train

SMALL = {"fno": {"modes": 2, "width": 2, "layers": 1}, "unet": {"width": 2, "levels": 1}}


def test_every_variant_of_the_large_study_of_rivals_takes_a_step(tmp_path):
    study = read_study("rivals")
    for name, options in study.systems.items():
        system = SIMULATED[options["name"]](**{k: v for k, v in options.items() if k not in (*SIZES, "name")})
        simulate_to_file(system, tmp_path / f"{name}.hdf5", trajectories=4, steps=6)
    variants = yaml.safe_load((files("squall.study") / "presets" / "rivals.yaml").read_text())["variants"]
    seen: set[str] = set()
    with without_shape_checks():
        for trial in study.trials:
            if trial.seed or seen >= set(trial.labels):
                continue
            seen |= set(trial.labels)
            values = to_dict(trial.config)
            values["data"] |= {"path": str(tmp_path / f"{trial.system}.hdf5"), "validation": 1, "test": 1}
            values["model"]["arguments"] = SMALL[trial.config.model.name]
            values["training"] |= {"steps": 1, "batch": 2, "schedule": "constant"}
            made = build(from_dict(values))
            before = [p.detach().clone() for p in made.model.parameters()]
            train(made.model, made.transitions, made.config.training, loss=made.loss, scale=made.normalization.std)
            after = list(made.model.parameters())
            assert all(p.isfinite().all() for p in after), trial.labels
            assert not all(map(torch.equal, before, after)), trial.labels
    assert set(variants) - seen == {"rate 3e-3", "one step", "width 24", "clean"}, "the base by other names"
