"""Mistakes of a user over all commands: a sentence and exit code 2, no traceback, and nothing is written."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

import squall.data
from squall.cli import main

SMALL = "--data.path u.hdf5 --data.validation 1 --data.test 1 --training.batch 8"

MISTAKES = """
simulate nonsense
simulate cahn-hilliard
simulate cahn-hilliard --out u.hdf5
simulate cahn-hilliard --points 8 --out o.hdf5 --dt -1
simulate cahn-hilliard --points 0 --out o.hdf5
simulate cahn-hilliard --points 2.5 --out o.hdf5
simulate cahn-hilliard --points 8 --out o.hdf5 --trajectories 0
simulate cahn-hilliard --points 8 --out o.hdf5 --steps -1
simulate cahn-hilliard --points 8 --out o.hdf5 --seed -1
simulate cahn-hilliard --points 8 --out empty --steps 1
simulate cahn-hilliard --points 8 --out text.txt/x.hdf5 --steps 1 --trajectories 1
simulate cahn-hilliard --points 16 --out o.hdf5 --initial i.npy --seed 2
simulate cahn-hilliard --points 16 --out o.hdf5 --initial wrong.npy
simulate cahn-hilliard --points 16 --out o.hdf5 --initial missing.npy
simulate shallow-water --out o.nc --latitudes 1
simulate shallow-water --out o.nc --steps -1
simulate shallow-water --out new/deep/o.nc --trajectories 1 --steps 2 --latitudes 8 --dt 1e9
simulate shallow-water --out pipe
simulate apebench --out o.hdf5
simulate apebench --scenario diff_kdv --part validation --out o.hdf5
data describe
data describe missing
data describe text.txt
data describe empty
data describe pipe
data describe empty.txt
data describe i.npy --axes nonsense
data describe i.npy --dt nan
data describe u.hdf5 --dt 2
data convert u.hdf5
data convert u.hdf5 --out u.hdf5
data convert u.hdf5 --out empty
data convert u.hdf5 --out pipe
data convert run --out x.hdf5
data convert nan.hdf5 --out new/deep/x.hdf5
diagnose missing
diagnose text.txt
diagnose empty
diagnose pipe
diagnose u.hdf5 --out text.txt
diagnose u.hdf5 --data x --out d
diagnose u.hdf5 --trust --out d
diagnose run --dt 3 --out d
diagnose run --data missing --out d
diagnose exported --out d
train --data.path
train --data.path run --data.validation 1 --data.test 1
train --data.path exported
train --data.path u.hdf5 --data.validation 3 --data.test 3 --training.batch 8
train --data.path u.hdf5 --data.validation -1 --data.test 1 --training.batch 8
train SMALL --training.batch 0
train SMALL --training.steps 1e3
train SMALL --training.step 3
train SMALL --training.learning_rate -1
train SMALL --training.seed -1
train SMALL --training.seed 10000000000000000000
train SMALL --loss.name os.system
train SMALL --loss.temperature -1
train SMALL --loss.budget 99 --loss.temperature 1
train SMALL --device.threads -1
train SMALL --device.threads 100000
train SMALL --device.accelerator tpu
train --data.path https://example.org/u.hdf5
train SMALL --config null.yaml --training.steps 2
train SMALL --device.devices 0
train SMALL --integrator nonsense
train SMALL --logger nonsense
train SMALL --out text.txt
train SMALL --out exported
train SMALL --out run
train SMALL --init missing
train SMALL --init exported
train SMALL --init pipe
train SMALL --init run --out run
train SMALL --init run --model.hidden 5
train --data.path u2.hdf5 --data.validation 1 --data.test 1 --training.batch 8 --init run --model.hidden 4
evaluate empty
evaluate exported
evaluate run run
evaluate run --integrator nonsense
evaluate run --substeps 0
evaluate run --steps 0
evaluate run --steps 1000
evaluate run --stride 0
evaluate run --stride 3
evaluate run --events 2
evaluate run --events {v:1}
evaluate run --conserved nonsense
evaluate run --conserved os.system
evaluate run --conserved ..x
evaluate run --conserved os.getpid posix.getpid
evaluate run --netcdf u.hdf5
evaluate run --device nonsense
evaluate run --data missing
evaluate run --data u2.hdf5
evaluate run --animate mp4
compare run run --out text.txt
compare run exported --out c
compare run --out text.txt/c
compare run --checkpoint first --out c
predict run --initial i.npy
predict run --initial i.npy --out p.txt
predict run --initial i.npy --out u.hdf5
predict run --initial wrong.npy --out p.nc
predict run --initial pipe --out p.nc
predict run --initial u2.hdf5 --out p.nc
predict run --initial i.npy --out p.nc --steps 0
predict run --initial i.npy --out p.nc --data missing
predict run --initial u.hdf5 --out p.nc --start 99
predict run --initial i.npy --out p.nc --forcings u.hdf5
predict run --initial i.npy --out p.nc --axes nonsense
predict run --initial i.npy --out p.nc --animate avi
predict exported --initial i.npy --out p.nc
export run --out text.txt
export run --out e --checkpoint first
export run --out e --data missing
export exported --out e
study run missing.yaml
study run smoke --workers 0
study run smoke --together 0
study run smoke --part 3
study run smoke --part 0/0
study run smoke --grids nonsense
study run smoke --out text.txt
study run smoke --out run
study run smoke --on nonsense
study run smoke --on ray --jobs 2
study run smoke --on ray --resources [1]
study run smoke --on slurm --jobs 0
study run smoke --on slurm --dry-run --workers -1
study run smoke --on slurm --part 9/3
study run smoke --address 1.2.3.4:1
study run smoke --dry-run
study status run
study report pipe
study pack missing
""".strip().splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a run and its export."""
    place = tmp_path_factory.mktemp("mistakes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name, space in (("u", (1, 16)), ("u2", (2, 8, 8))):
            squall.data.write(f"{name}.hdf5", np.random.default_rng(0).normal(size=(6, 11, *space)), dt=0.1)
        squall.data.write("nan.hdf5", np.zeros((2, 3, 1, 16)), dt=0.1)
        with h5py.File("nan.hdf5", "r+") as file:
            file["t0_fields/u"][1, 2] = np.nan
        np.save("i.npy", np.zeros((2, 1, 16)))
        np.save("wrong.npy", np.zeros((2, 3, 5)))
        os.mkfifo("pipe")
        Path("empty").mkdir()
        Path("text.txt").write_text("hello")
        Path("empty.txt").touch()
        Path("null.yaml").write_text("training: null\n")
        words = f"train {SMALL} --training.steps 1 --model.hidden 4 --device.accelerator cpu --out run"
        assert main(words.split()) == 0
        assert main(["export", "run", "--out", "exported"]) == 0
    return place


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_gets_a_sentence_and_changes_nothing(folder, monkeypatch, capsys, line):
    if "shallow-water" in line:
        pytest.importorskip("torch_harmonics")
    if "mp4" in line:
        monkeypatch.setenv("PATH", "")  # no ffmpeg
    monkeypatch.chdir(folder)
    before = {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
    words = line.replace("SMALL", SMALL).replace("{v:1}", "{v:\u00a01}").split()
    assert main([word.replace("\u00a0", " ") for word in words]) == 2
    printed = capsys.readouterr()
    assert "squall: " in printed.err
    assert "Traceback" not in printed.err
    assert before == {path: path.lstat().st_mtime_ns for path in folder.rglob("*")}
