"""Does a poor environment cost the work? Commands run in environments that lack something.

    python benchmarks/environments.py                 # all
    python benchmarks/environments.py cp1252 read-only

Every environment trains, evaluates and predicts in one process, and runs a study of two trials with --study. It passes
if all end with 0 and the weights of a plain environment; where it forbids the work, also with 2 and a sentence. A
traceback, another exit code, other weights or more than --limit seconds are faults. One line is printed for each, and
the number of faults is the exit code.
"""

import argparse
import hashlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import squall.data

PROGRAM = """
import sys, threading
sys.path.insert(0, {source!r})
{before}
from squall.cli import main
codes = []
def work():
    for words in {commands!r}:
        codes.append(main(words))
{run}
open({codes!r}, "w").write(" ".join(map(str, codes)))
"""

STUDY = """
name: poor
seeds: 2
base:
  data: {validation: 1, test: 1}
  model: {hidden: 4}
  training: {steps: 3, batch: 8}
  device: {threads: 1, accelerator: cpu}
variants:
  CH: {system: {name: cahn-hilliard, points: 16, trajectories: 6, steps: 10}, model.name: node}
grids:
  all: {axes: [[CH]], show: [table]}
"""

LATE_CLOCK = "import time; real = time.time; time.time = lambda: real() - 10 * 365 * 86400"
SLOW_DISK = "import os, time; real = os.fsync; os.fsync = lambda f: (time.sleep(0.2), real(f))[1]"
NO_LOCKS = """
import fcntl
def flock(*_): raise OSError(37, "No locks available")
fcntl.flock = fcntl.lockf = flock
"""
NO_FSYNC = """
import os
def fsync(_): raise OSError(22, "Invalid argument")
os.fsync = fsync
"""
NO_LINKS = """
import os
def link(*_, **__): raise OSError(1, "Operation not permitted")
os.link = link
"""
NO_NETWORK = """
import socket
class Socket(socket.socket):
    def connect(self, address): raise OSError(101, "Network is unreachable")
socket.socket = Socket
"""
THREAD = "t = threading.Thread(target=work); t.start(); t.join()"


@dataclass(frozen=True)
class Poor:
    """An environment.

    Args:
        variables: set (None: removed) before the start.
        before: Python that runs before squall is imported.
        limit: called in the child before Python starts.
        run: how the work is called.
        streams: "pipe", "closed" or "broken" (nobody reads).
        place: changes the folder of the work: (folder) -> folder.
        prefix: words before the command.
        refused: whether exit code 2 is right.
    """

    variables: dict[str, str | None] = field(default_factory=dict)
    before: str = ""
    limit: Callable[[], object] | None = None
    run: str = "work()"
    streams: str = "pipe"
    place: Callable[[Path], Path] = lambda folder: folder
    prefix: tuple[str, ...] = ()
    refused: bool = False


def encoded(encoding: str) -> Poor:
    return Poor({"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"})


def linked(folder: Path) -> Path:
    (folder / "real").mkdir()
    (folder / "link").symlink_to("real")
    return folder / "link"


def long(folder: Path) -> Path:
    return folder / ("very-long-name-" * 12) / ("very-long-name-" * 12)


def mounted(options: str) -> tuple[str, ...]:
    """Words that run a command with another file system in place, seen by it alone."""
    return ("unshare", "-rm", "sh", "-c", f'mount {options}; exec "$@"', "-")


ENVIRONMENTS: dict[str, Poor] = {
    "plain": Poor(),
    "cp1252": encoded("cp1252"),
    "latin-1": encoded("latin-1"),
    "ascii": encoded("ascii"),
    "utf-16": encoded("utf-16"),
    "LANG unset": Poor({"LANG": None, "LC_ALL": None, "LANGUAGE": None, "PYTHONUTF8": "0"}),
    "LC_ALL=C": Poor({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "comma decimals": Poor(
        {"LC_ALL": "de_DE.UTF-8"},
        before="import locale\nfor name in ('de_DE.UTF-8', ''):\n"
        "    try:\n        locale.setlocale(locale.LC_ALL, name); break\n    except locale.Error: pass",
    ),
    "TERM=dumb": Poor({"TERM": "dumb"}),
    "TERM unset": Poor({"TERM": None, "COLUMNS": "0"}),
    "no home": Poor({"HOME": None, "XDG_STATE_HOME": None, "XDG_CACHE_HOME": None}),
    "home missing": Poor({"HOME": "/nonexistent/home"}),
    "home not to be written": Poor({"HOME": "/proc"}),
    "temporary folder missing": Poor({"TMPDIR": "/nonexistent/tmp"}),
    "PYTHONOPTIMIZE=2": Poor({"PYTHONOPTIMIZE": "2"}),
    "PYTHONHASHSEED=1": Poor({"PYTHONHASHSEED": "1"}),
    "PYTHONWARNINGS=error": Poor({"PYTHONWARNINGS": "error::UserWarning"}),
    "no bytecode": Poor({"PYTHONDONTWRITEBYTECODE": "1"}),
    "MPLBACKEND wrong": Poor({"MPLBACKEND": "nonsense"}),
    "MPLBACKEND of a screen": Poor({"MPLBACKEND": "TkAgg", "DISPLAY": None}),
    "matplotlib without a folder": Poor({"MPLCONFIGDIR": "/nonexistent/mpl"}),
    "OMP_NUM_THREADS=7": Poor({"OMP_NUM_THREADS": "7", "MKL_NUM_THREADS": "7"}),
    "OMP_NUM_THREADS=nonsense": Poor({"OMP_NUM_THREADS": "nonsense"}),
    "one core": Poor(limit=lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})),
    "nice 19": Poor(limit=lambda: os.nice(19)),
    "no locks": Poor(before=NO_LOCKS),
    "no fsync": Poor(before=NO_FSYNC),
    "no hard links": Poor(before=NO_LINKS),
    "slow disk": Poor(before=SLOW_DISK),
    "clock ten years back": Poor(before=LATE_CLOCK),
    "no network": Poor(before=NO_NETWORK),
    "another thread": Poor(run=THREAD),
    "umask 077": Poor(limit=lambda: os.umask(0o077)),
    "SIGPIPE ignored by nobody": Poor(before="import signal; signal.signal(signal.SIGPIPE, signal.SIG_DFL)"),
    "broken pipe": Poor(streams="broken"),
    "closed streams": Poor(streams="closed"),
    "linked folder": Poor(place=linked),
    "very long path": Poor(place=long),
    "names beyond ASCII": Poor(place=lambda folder: folder / "Bö é 日本 ∂u∕∂t"),
    "names with blanks and quotes": Poor(place=lambda folder: folder / 'it\'s a "folder" [x]; $HOME'),
    "64 open files": Poor(limit=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))),
    "small files only": Poor(limit=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)), refused=True),
    "no core dumps, small stack": Poor(limit=lambda: resource.setrlimit(resource.RLIMIT_STACK, (2**20, 2**20))),
    "little address space": Poor(limit=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31)), refused=True),
    "no /dev/shm": Poor(prefix=mounted("-t tmpfs -o size=4k none /dev/shm")),
    "full disk": Poor(
        place=lambda folder: folder / "small", prefix=mounted('-t tmpfs -o size=48k none "$SMALL"'), refused=True
    ),
    "installation not to be written": Poor(prefix=mounted('--bind -o ro "$SOURCE" "$SOURCE"')),
    "data not to be written": Poor(variables={"DATA_MODE": "0444"}),
}


def commands(folder: Path, data: Path, study: Path) -> list[list[str]]:
    run = str(folder / "run")
    train = "--data.validation 1 --data.test 1 --model.hidden 4 --training.batch 8 --training.steps 3"
    device = "--device.accelerator cpu --device.threads 1"
    return [
        ["train", "--data.path", str(data), *train.split(), *device.split(), "--out", run],
        ["evaluate", run],
        ["predict", run, "--initial", str(data), "--steps", "3", "--out", str(folder / "p.nc")],
        ["study", "run", str(study), "--out", str(folder / "study"), "--workers", "1"],
    ]


def run(name: str, poor: Poor, root: Path, limit: float, with_study: bool) -> tuple[str, str]:
    """The codes and weights that an environment ends with, and what it printed."""
    base = root / hashlib.sha256(name.encode()).hexdigest()[:8]
    base.mkdir()
    data, study = base / "u.hdf5", base / "study.yaml"
    squall.data.write(data, np.random.default_rng(0).normal(size=(6, 11, 1, 16)), dt=0.1)
    data.chmod(int(poor.variables.get("DATA_MODE") or "0644", 8))
    study.write_text(STUDY)
    place = poor.place(base)
    place.mkdir(parents=True, exist_ok=True)
    working = base / "working"
    working.mkdir()
    source = str(Path(squall.__file__).parents[1])
    variables = {**os.environ, "SMALL": str(place), "SOURCE": source, **poor.variables}
    environment = {key: value for key, value in variables.items() if value is not None}
    codes = base / "codes"
    chosen = commands(place, data, study)[: 3 + with_study]
    text = PROGRAM.format(source=source, before=poor.before, commands=chosen, run=poor.run, codes=str(codes))
    words = [*poor.prefix, sys.executable, "-c", text]
    options = {"cwd": working, "env": environment, "preexec_fn": poor.limit}
    if poor.streams == "closed":
        words = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "-", *words]
    started = time.monotonic()
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        if poor.streams == "broken":
            for stream in (process.stdout, process.stderr):
                stream.close()  # type: ignore[union-attr]
            process.stdout = process.stderr = None
        try:
            out, err = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            return f"still running after {time.monotonic() - started:.0f} s", ""
    printed = b"".join(x for x in (out, err) if x).decode("utf-8", "replace").replace("\0", "")
    if process.returncode != 0:
        return f"exit {process.returncode}", printed
    weights = sorted(base.glob("**/*.safetensors"))
    digests = {hashlib.sha256(path.read_bytes()).hexdigest()[:8] for path in weights}
    return f"{codes.read_text()} | {' '.join(sorted(digests))}", printed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="some of the environments")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one environment")
    parser.add_argument("--study", action="store_true", help="run a study too")
    arguments = parser.parse_args()
    chosen = {"plain": ENVIRONMENTS["plain"], **{n: ENVIRONMENTS[n] for n in arguments.names or ENVIRONMENTS}}
    faults, expected = 0, ""
    with tempfile.TemporaryDirectory() as folder:
        for name, poor in chosen.items():
            started = time.monotonic()
            found, printed = run(name, poor, Path(folder), arguments.limit, arguments.study)
            expected = expected or found
            told = "squall: " in printed and "2" in found.split("|")[0].split()
            good = "Traceback" not in printed and (found == expected or (poor.refused and told))
            faults += not good
            print(f"{'ok   ' if good else 'FAULT'} {name:<32} {time.monotonic() - started:5.0f} s  {found}", flush=True)
            if not good:
                print("      " + "\n      ".join(printed.strip().splitlines()[-12:]), flush=True)
            shutil.rmtree(Path(folder) / hashlib.sha256(name.encode()).hexdigest()[:8], ignore_errors=True)
    print(f"{len(chosen)} environments, {faults} faults")
    return faults


if __name__ == "__main__":
    sys.exit(main())
