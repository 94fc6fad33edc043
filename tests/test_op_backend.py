"""Which implementation of an op runs."""

import subprocess
import sys

import pytest
import torch

from benchmarks.launches import recorded_launches
from vllm_twotower import ops
from vllm_twotower.core import KERNELS_VARIABLE
from vllm_twotower.cpu import library as cpu_library
from vllm_twotower.cpu.library import load_library
from vllm_twotower.cpu.ops import use_cpp_ops
from vllm_twotower.ops import backend
from vllm_twotower.ops.backend import OpBackend, find_implementation, select_backend
from vllm_twotower.ops.launch import launch

LOGITS = torch.zeros(1, 8)
ON_A_CPU = OpBackend.CPP if use_cpp_ops() else OpBackend.REFERENCE


@pytest.mark.parametrize(
    ("choice", "expected"),
    [(None, ON_A_CPU), ("auto", ON_A_CPU), ("reference", OpBackend.REFERENCE), ("triton", OpBackend.TRITON)],
)
def test_choices_on_a_cpu_under_the_interpreter(choice, expected, monkeypatch):
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    if choice is not None:
        monkeypatch.setenv(KERNELS_VARIABLE, choice)
    assert select_backend(LOGITS) is expected


@pytest.mark.parametrize("op", [name for name in ops.__all__ if name.islower()])
@pytest.mark.parametrize("choice", ["auto", "reference", "triton"])
def test_every_op_has_an_implementation_for_every_choice(op, choice, monkeypatch):
    """A kernel, a reference, or in C++; experts have no kernel, replays nothing in C++: references run."""
    monkeypatch.setenv(KERNELS_VARIABLE, choice)
    rooms = {"reference": "ops", "triton": "ops", "auto": "cpu" if ON_A_CPU is OpBackend.CPP else "ops"}
    lacking = (choice, op) in (("triton", "mixture_of_experts"), ("auto", "state_replay"))
    found = find_implementation(op, LOGITS)
    assert found.__name__ == op
    assert found.__module__.startswith(f"vllm_twotower.{'ops' if lacking else rooms[choice]}.")
    assert found.__module__.endswith(".kernel") == (choice == "triton" and not lacking)


def test_ops_know_nothing_of_the_cpu_wing():
    code = (
        "import sys, torch, vllm_twotower.ops as ops; ops.canvas_sample(torch.zeros(1, 8), 3);"
        "assert not [m for m in sys.modules if m.startswith('vllm_twotower.cpu')]"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_bad_choice_is_named(monkeypatch):
    monkeypatch.setenv(KERNELS_VARIABLE, "cuda")
    with pytest.raises(ValueError, match="VLLM_TWOTOWER_KERNELS='cuda': set it to one of auto, reference, triton"):
        ops.canvas_sample(LOGITS, 3)


def test_kernels_on_a_cpu_need_the_interpreter(monkeypatch):
    monkeypatch.setenv(KERNELS_VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"tensors on cpu: .* set TRITON_INTERPRET=1 before Python starts"):
        ops.canvas_sample(LOGITS, 3)


def test_references_import_no_triton():
    code = (
        "import sys, torch, vllm_twotower.ops as ops; ops.canvas_sample(torch.zeros(1, 8), 3);"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recorded_launches_do_not_run(monkeypatch):
    monkeypatch.setenv(KERNELS_VARIABLE, "triton")
    with recorded_launches() as launches:
        ops.canvas_sample(LOGITS, 3)
        launch(None, (0, 4), num_warps=1)  # an empty grid is no launch
    assert [one.kernel.__name__ for one in launches] == ["_read_piece", "_join_pieces"]
    assert launches[0].grid == (1, 1)


@pytest.mark.skipif(load_library() is None, reason="no compiler when the package was installed")
def test_a_library_of_another_version_is_not_called(monkeypatch, caplog):
    monkeypatch.setattr(cpu_library, "INTERFACE_VERSION", -1)
    monkeypatch.setitem(backend._implementations, OpBackend.CPP, {})
    load_library.cache_clear()
    try:
        assert not use_cpp_ops()
        assert "is of another version" in caplog.text
        assert select_backend(LOGITS) is OpBackend.REFERENCE
    finally:
        load_library.cache_clear()
