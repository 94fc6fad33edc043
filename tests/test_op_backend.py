"""Which form of an op runs."""

import subprocess
import sys

import pytest
import torch

from vllm_twotower import ops
from vllm_twotower.core import KERNELS_VARIABLE
from vllm_twotower.cpu import library as cpu_library
from vllm_twotower.cpu.library import library
from vllm_twotower.ops.backend import Form, form_for
from vllm_twotower.ops.launch import launch, recorded_launches

LOGITS = torch.zeros(1, 8)


ON_A_CPU = Form.REFERENCE if library() is None else Form.CPP


@pytest.mark.parametrize(
    ("choice", "expected"),
    [(None, ON_A_CPU), ("auto", ON_A_CPU), ("reference", Form.REFERENCE), ("triton", Form.TRITON)],
)
def test_choices_on_a_cpu_under_the_interpreter(choice, expected, monkeypatch):
    monkeypatch.delenv(KERNELS_VARIABLE, raising=False)
    if choice is not None:
        monkeypatch.setenv(KERNELS_VARIABLE, choice)
    assert form_for(LOGITS) is expected


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
        with pytest.raises(RuntimeError, match="recorded already"), recorded_launches():
            pass
    assert [one.kernel.__name__ for one in launches] == ["_read_piece", "_join_pieces"]
    assert launches[0].grid == (1, 1)


@pytest.mark.skipif(library() is None, reason="no compiler when the package was installed")
def test_a_library_of_another_version_is_not_called(monkeypatch, caplog):
    monkeypatch.setattr(cpu_library, "INTERFACE_VERSION", -1)
    library.cache_clear()
    try:
        assert library() is None
        assert "is of another version" in caplog.text
        assert form_for(LOGITS) is Form.REFERENCE
    finally:
        library.cache_clear()
