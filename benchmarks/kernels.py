"""What do the loss's CUDA kernels take, as compiled? Needs Triton on Linux, no GPU.

    python benchmarks/kernels.py [--capability 80 90] [--bandwidth 3900] [--clock 1.755] [--processors 132]

Each kernel is compiled for a compute capability, and its machine code counted: registers of a thread, bytes that they
spill, and instructions for one point: those of the loop where there is one, else all, whichever branch is taken. The
floors at n = 1e8 follow: the time to issue so many (four a cycle and multiprocessor, 32 points each), and the time to
move so many bytes. A kernel is as good as its memory where the first is well below the second, and enough programs run
at a time to hide what each waits for.
The defaults are those of an H200, its bandwidth as a copy reaches it.
"""

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from squall.losses import fused_triton as kernels

REGISTERS = 1 << 16
"""Of a multiprocessor."""
THREADS = 128
"""Of a program: Triton's four warps."""
BATCH = {"prediction": "*fp32", "target": "*fp32", "count": "i32"}
DIVISIBLE = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Case:
    """A kernel with the types of its arguments, its constants, and what one program does in a turn of its loop."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, int]
    points: int
    bytes_each: int


def _sweep(once: int, twice: int) -> Case:
    tile = {"rows": kernels.ROWS, "lanes": kernels.LANES}
    types = {**BATCH, "out": "*fp64", "beta": "fp32", "slope": "fp32"}
    constants = {"once": once, "twice": twice, **tile}
    return Case(f"sweep, {once} + {twice}", kernels._sweep, types, constants, kernels.ROWS * kernels.LANES, 8)


def _gradient() -> Case:
    types = {**BATCH, "out": "*fp32", "beta": "fp32", "shift": "fp32", "scale": "fp32"}
    return Case("gradient", kernels._gradient, types, {"block": kernels.BLOCK}, kernels.BLOCK, 12)


CASES = [_sweep(2, 1), _sweep(7, 3), _sweep(10, 4), _sweep(14, 4), _gradient()]


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes."""

    registers: int
    stack: int
    """Bytes that each thread spills."""
    instructions: list[str]
    """Of the loop; of all, where there is none."""

    @property
    def programs(self) -> int:
        """At a time, on one multiprocessor."""
        return REGISTERS // (THREADS * -(-self.registers // 8) * 8)


def compiled(case: Case, capability: int) -> Compiled:
    """By Triton, for a compute capability (90 is 9.0)."""
    names = case.kernel.arg_names
    source = ASTSource(
        case.kernel,
        {name: case.types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in case.constants.items()},
        attrs={(names.index(name),): DIVISIBLE for name, kind in case.types.items() if "*" in kind},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
    usage, code = _dumped(binary, "-res-usage"), _dumped(binary, "-sass")
    registers, stack = (int(_found(rf"{name}:(\d+)", usage)) for name in ("REG", "STACK"))
    return Compiled(registers, stack, _loop(code))


def _dumped(binary: bytes, option: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in what cuobjdump says"
    return match.group(1)


def _loop(code: str) -> list[str]:
    """The instructions of the longest loop, all of them where there is none."""
    lines = [(int(place, 16), text) for place, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+);", code)]
    spans = []
    for place, text in lines:
        target = re.search(r"BRA\S*\s.*?0x([0-9a-f]+)", text)
        if target is not None and int(target.group(1), 16) < place:
            spans.append((int(target.group(1), 16), place))
    if not spans:
        return [text for _, text in lines]
    first, last = max(spans, key=lambda span: span[1] - span[0])
    return [text for place, text in lines if first <= place <= last]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--capability", nargs="+", type=int, default=[80, 90], help="compute capability, without its dot"
    )
    parser.add_argument("--bandwidth", type=float, default=3900, help="GB/s")
    parser.add_argument("--clock", type=float, default=1.755, help="GHz")
    parser.add_argument("--processors", type=int, default=132, help="multiprocessors")
    arguments = parser.parse_args()
    issued = 4 * 32 * arguments.processors * arguments.clock * 1e9
    print("capability  kernel          registers  spilled  programs  instructions  issue, ms  memory, ms")
    for capability in arguments.capability:
        for case in CASES:
            made = compiled(case, capability)
            each = len(made.instructions) * THREADS / case.points
            floors = 1e3 * 1e8 * each / issued, 1e3 * 1e8 * case.bytes_each / (1e9 * arguments.bandwidth)
            print(
                f"{capability:>10}  {case.name:14}  {made.registers:>9}  {made.stack:>7}  {made.programs:>8}"
                f"  {each:>12.1f}  {floors[0]:>9.3f}  {floors[1]:>10.3f}"
            )


if __name__ == "__main__":
    main()
