"""Every kernel compiles for GPUs that are not here, at the real model's shapes, without spilling registers."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "benchmarks.compile_ops"]
TABLE = ROOT / "benchmarks" / "results" / "kernels.md"


@pytest.mark.parametrize("arch", [90, *(pytest.param(a, marks=pytest.mark.slow) for a in (80, 100))])
def test_every_kernel_compiles_without_spills(arch):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [*COMMAND, "--arch", str(arch), "--check"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert kernels(run.stdout) == kernels(TABLE.read_text()) == jitted(), "run python -m benchmarks.compile_ops again"


@pytest.mark.slow
def test_every_kernel_compiles_at_odd_sizes():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [*COMMAND, "--arch", "90", "--odd"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def kernels(table):
    """Names in a table's second column."""
    return set(re.findall(r"^\|[^|]+\| `(\w+)` \|", table, re.MULTILINE))


def jitted():
    """Names of the kernels that the package launches."""
    sources = [path.read_text() for path in (ROOT / "vllm_twotower" / "ops").glob("*/kernel.py")]
    launched = {name for text in sources for name in re.findall(r"(?:launch|_run)\(\s*(_\w+),", text)}
    return launched & {name for text in sources for name in re.findall(r"@triton\.jit\ndef (\w+)\(", text)}
