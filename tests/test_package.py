"""The package as such: public names, import directions, sizes."""

import importlib.metadata
import pathlib
import subprocess
import sys

import pytest

import vllm_twotower

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vllm_twotower"


def test_public_names():
    assert vllm_twotower.__all__ == ["Mode", "StepKind", "diffusion_params", "diffusion_stats", "register"]
    assert all(hasattr(vllm_twotower, name) for name in vllm_twotower.__all__)
    assert (PACKAGE / "py.typed").exists()
    assert vllm_twotower.__version__ == importlib.metadata.version("vllm-twotower")
    assert vllm_twotower.__version__ in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("vllm_twotower.core", ["torch", "vllm", "triton"]),
        ("vllm_twotower.config", ["torch", "vllm", "triton"]),
        ("vllm_twotower.registration", ["torch", "vllm", "triton"]),
        ("vllm_twotower.compat", ["torch", "vllm", "triton"]),
        ("vllm_twotower.cli", ["torch", "vllm", "triton"]),
        ("vllm_twotower.decoding.reference", ["vllm", "triton"]),
        ("vllm_twotower.decoding.unmask", ["vllm", "triton"]),
        ("vllm_twotower.decoding.plain_towers", ["vllm", "triton"]),
        ("vllm_twotower.ops", ["vllm"]),
        ("vllm_twotower.models.twotower", ["vllm_twotower.runtime"]),
    ],
)
def test_imports_point_one_way(module, forbidden):
    code = f"import {module}, sys; bad = [m for m in {forbidden!r} if m in sys.modules]; assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sizes():
    subprocess.run([sys.executable, str(ROOT / "tools" / "check_sizes.py")], check=True)
