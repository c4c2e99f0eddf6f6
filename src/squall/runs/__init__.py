"""A run: one folder from one configuration, trained, evaluated, rolled out."""

from squall._process.extras import explain_missing_extra

with explain_missing_extra():
    from squall.runs.emulator import Emulator, load
    from squall.runs.export import export_run
    from squall.runs.train import run, run_together
    from squall.runs.trained import TrainedRun, open_run

__all__ = ["Emulator", "TrainedRun", "export_run", "load", "open_run", "run", "run_together"]
