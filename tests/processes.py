"""Programs in processes of their own, each forked from one that has imported what is slow to import."""

import atexit
import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

COMPILERS = ("torch._dynamo", "torch.export", "squall.models")
"""What a program imports that compiles or exports a model."""

COMMAND = ("squall.cli.execute", "squall.cli.train", "lightning_fabric")
"""What a command imports that trains."""

SIGNALLED = """
import os, sys
from squall.cli import main
from squall.training.state import Training

number, step, *words = sys.argv[1:]

def log(self, metrics, log=Training.log):
    if self.step >= int(step):
        os.kill(os.getpid(), int(number))
    log(self, metrics)

Training.log = log
sys.exit(main(words))
"""
"""A training that gets a signal when it logs the first step from a given one on."""

SERVER = """
import importlib, json, os, sys, traceback

for module in sys.argv[1:]:
    importlib.import_module(module)
for line in sys.stdin:
    program, arguments, folder = json.loads(line)
    pipes = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        code = 1
        try:
            os.chdir(folder)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, (_, end) in enumerate(pipes, 1):
                os.dup2(end, number)
            sys.argv, sys.dont_write_bytecode = ["program", *arguments], True  # a limit on files would cut it off
            exec(program, {"__name__": "__main__"})
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    for _, end in pipes:
        os.close(end)
    texts = [os.fdopen(begin).read() for begin, _ in pipes]
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), *texts]), flush=True)
"""


@functools.cache
def _server(modules: Sequence[str], process: int) -> subprocess.Popen:
    command = [sys.executable, "-c", SERVER, *modules]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return server


def run_program(
    program: str, *arguments: object, modules: Sequence[str] = ("torch",), folder: Path | str = "."
) -> subprocess.CompletedProcess[str]:
    """Run a program as `python -c` does, in a fork of a process that has imported these modules.

    Its environment is that of the first program with these modules.
    """
    server = _server(tuple(modules), os.getpid())
    print(json.dumps((program, [str(x) for x in arguments], os.path.abspath(folder))), file=server.stdin, flush=True)
    return subprocess.CompletedProcess(program, *json.loads(server.stdout.readline()))


def run_signalled(
    number: int, step: int, words: Sequence[str], folder: Path | str = "."
) -> subprocess.CompletedProcess:
    """The command `squall` with these words, in a process that gets a signal at a step of its training."""
    return run_program(SIGNALLED, int(number), step, *words, modules=COMMAND, folder=folder)
