"""The large study of rivals, on data and models so small that every variant takes a step."""

from importlib.resources import files

import yaml
from in_process import assert_takes_a_step

from squall.runs.simulate import SIMULATED, simulate_to_file
from squall.study.definition import SIZES, read_study

SMALL = {"fno": {"modes": 2, "width": 2, "layers": 1}, "unet": {"width": 2, "levels": 1}}


def test_every_variant_of_the_large_study_of_rivals_takes_a_step(tmp_path):
    study = read_study("rivals")
    for name, options in study.systems.items():
        system = SIMULATED[options["name"]](**{k: v for k, v in options.items() if k not in (*SIZES, "name")})
        simulate_to_file(system, tmp_path / f"{name}.hdf5", trajectories=4, steps=6)
    variants = yaml.safe_load((files("squall.study") / "presets" / "rivals.yaml").read_text())["variants"]
    seen: set[str] = set()
    for trial in study.trials:
        if trial.seed == 0 and not seen >= set(trial.labels):
            seen |= set(trial.labels)
            assert_takes_a_step(trial, tmp_path / f"{trial.system}.hdf5", SMALL[trial.config.model.name])
    assert set(variants) - seen == {"rate 3e-3", "one step", "width 24", "clean"}, "the base by other names"
