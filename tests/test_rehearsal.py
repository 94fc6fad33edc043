"""What a GPU user gets, rehearsed on made-up GPUs (``tests/rehearsal``), held against what was found before.

`make rehearsal` sets up what it needs and runs all of it. A difference from a file in ``rehearsal/golden`` is a change
of ours or of vLLM's to look at; ``make rehearsal GOLDEN=1`` writes it down.
"""

import functools
import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".venv-rehearsal"
GOLDEN = ROOT / "tests" / "rehearsal" / "golden"
WRITES = bool(os.environ.get("GOLDEN"))

ENGINES = [("0.33.0", "h200")]
"""vLLM's version, and what the rehearsal is told."""

OURS = {
    "denoiser attention": ("_norm_and_modulate", "_gate_add"),
    "denoiser mamba": ("_norm_and_modulate", "_seeded_conv", "_seeded_scan", "_gate_add"),
    "denoiser experts": ("_norm_and_modulate", "_gate_add"),
    "outside layers": ("_read_piece", "_join_pieces", "_reveal"),
}
"""Kernels of this package that a denoise pass launches, once each, by part of the model."""

pytestmark = pytest.mark.slow


@functools.cache
def rehearse(version, engine):
    folder = FOLDER / version
    if not (folder / "operators.json").is_file():
        pytest.skip(f"vLLM {version}'s CUDA wheel is not unpacked here: make rehearsal")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    command = [sys.executable, "-m", "tests.rehearsal", *engine.split()]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize(("version", "engine"), ENGINES)
def test_rehearsal_finds_what_it_found(version, engine):
    found = rehearse(version, engine)
    path = GOLDEN / f"{version}-{engine.replace(' --', '-').replace(' ', '-')}.json"
    if WRITES:
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found == json.loads(path.read_text(encoding="utf-8")), f"{path.name}: make rehearsal GOLDEN=1, then read it"


@pytest.mark.parametrize(("version", "engine"), ENGINES)
def test_denoise_passes_read_once_and_leave_nothing_off_the_device(version, engine):
    steps = rehearse(version, engine)["steps"]
    for name in ("denoise pass", "mock-AR pass", "draft"):
        step = steps[name]
        reads = {k: n for k, n in step["transfers"].items() if k.startswith("from the device, the host waits")}
        assert reads == {"from the device, the host waits: vllm_twotower/runtime/denoise_loop.py:read_outcome": 1}, name
        assert step["tower"] == "denoise"
        assert step["off the device"] == [], name


@pytest.mark.parametrize(("version", "engine"), ENGINES)
def test_denoise_passes_launch_the_kernels(version, engine):
    steps = rehearse(version, engine)["steps"]
    for name in ("denoise pass", "mock-AR pass", "draft"):
        launches = steps[name]["launches"]
        for part, kernels in OURS.items():
            assert {k: launches[part].get(f"triton {k}") for k in kernels} == dict.fromkeys(kernels, 1), (name, part)
    replayed = steps["verification and replay"]["launches"]
    assert any("triton _replay_state" in part for part in replayed.values()), replayed


@pytest.mark.parametrize(("version", "engine"), ENGINES)
def test_dtypes_are_as_promised(version, engine):
    found = rehearse(version, engine)
    assert found["start"]["Mamba caches"][1].endswith("float32")
    for step in found["steps"].values():
        routers = {kind for name, kind in step["dtypes"].items() if name.endswith("router logits")}
        assert routers <= {"float32"}
