import numpy as np
import pytest

import squall.data
from squall.runs.build import with_inputs_named
from squall.runs.config import ConfigError, RunConfig, can_run_together, difference, flat, from_dict, to_dict


def test_a_configuration_survives_the_way_to_a_file_and_back():
    config = from_dict({"loss": {"temperature": 0.1}, "training": {"steps": 7}, "data": {"validation": 0.2}})
    assert from_dict(to_dict(config)) == config
    assert from_dict({}) == RunConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"training": {"stps": 3}}, "stps.*did you mean 'training.steps'"),
        ({"trainig": {"steps": 3}}, "did you mean 'training.steps'"),
        ({"data": {"pth": "a"}}, "did you mean 'data.path'"),
        ({"training": {"steps": "many"}}, "training.steps"),
        ({"training": {"steps": 0}}, "training.steps is 0, but must be at least 1"),
        ({"loss": {"name": "rms"}}, "imbalance-aware"),
        ({"loss": {"temperature": -1.0}}, "loss.temperature is -1.0"),
        ({"loss": {"temperature": float("nan")}}, "loss.temperature is nan"),
        ({"loss": {"temperature": 1.0, "kl_budget": 0.5}}, "choose one rule"),
        ({"loss": {"name": "mse", "temperature": 1.0}}, "'mse', which has no temperature"),
        ({"loss": {"name": "mse", "cap": 2.0}}, "loss.cap is set, but loss.name is 'mse'"),
        ({"loss": {"relative": 4.0, "budget_cap": 2.0}}, "loss.budget_cap belongs to loss.kl_budget"),
        ({"loss": {"over": "space"}}, "loss.over"),
        ({"loss": {"error": "cubed"}}, "loss.error"),
        ({"device": {"strategy": "fsdp", "precision": "16-mixed"}}, "choose 'bf16-mixed'"),
    ],
)
def test_a_configuration_that_cannot_be_run_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        from_dict(values)


def test_every_key_is_known_by_its_dotted_name():
    assert {"data.path", "model.hidden", "integrator", "loss.kl_budget", "training.seed"} <= set(
        flat(to_dict(RunConfig()))
    )


def test_a_difference_names_the_key_and_both_values():
    ours, theirs = to_dict(RunConfig()), to_dict(from_dict({"training": {"seed": 3}}))
    assert difference(ours, ours) == []
    assert difference(ours, theirs) == ["training.seed: 0 -> 3"]


def test_runs_with_options_of_a_training_by_itself_are_not_trained_together():
    plain = from_dict({})
    assert can_run_together(plain, plain)
    for group in (
        {"training": {"unroll": 2}},
        {"data": {"history": 2}},
        {"data": {"inputs": ["wind"]}},
        {"integrator": "implicit_midpoint"},
    ):
        config = from_dict(group)
        assert not can_run_together(config, config)


def test_all_inputs_are_the_names_of_every_condition_of_the_file(tmp_path):
    conditions = {"viscosity": np.arange(4.0), "depth": np.ones(8), "sun": np.ones((4, 5))}
    squall.data.write(tmp_path / "a.hdf5", np.zeros((4, 5, 1, 8)), dt=0.1, conditions=conditions)
    config = from_dict({"data": {"path": str(tmp_path / "a.hdf5"), "inputs": "all"}})
    assert set(with_inputs_named(config).data.inputs) == {"viscosity", "depth", "sun"}
    named = from_dict({"data": {"path": str(tmp_path / "a.hdf5"), "inputs": ["sun"]}})
    assert with_inputs_named(named) is named
    squall.data.write(tmp_path / "b.hdf5", np.zeros((4, 5, 1, 8)), dt=0.1)
    config = from_dict({"data": {"path": str(tmp_path / "b.hdf5"), "inputs": "all"}})
    with pytest.raises(ConfigError, match="has no parameters, static fields or forcings"):
        with_inputs_named(config)


def test_inputs_are_names_or_all():
    with pytest.raises(ConfigError, match=r"data\.inputs[\s\S]*'all'[\s\S]*viscosity"):
        from_dict({"data": {"inputs": "viscosity"}})
