"""Studies: grids of runs, their folder, runner, results and statistics."""
