"""Modulation, norm and gate: the kernels under Triton's interpreter against the references, and those against the
formulas in fp64."""

import pytest
import torch

from tests.op_forms import difference, every_form, kernels_of
from tests.tolerances import BF16_OP, FP32_OP
from vllm_twotower import ops
from vllm_twotower.cpu.ops import adaln as cpp
from vllm_twotower.ops.adaln import kernel as kernel_module
from vllm_twotower.ops.adaln import reference
from vllm_twotower.ops.adaln.reference import UNMODULATED, Modulation

pytestmark = pytest.mark.usefixtures("poisoned_memory", "bf16_rounds_to_nearest")
EPS, LEVELS = 1e-5, 11
OPS = ("modulate_norm", "norm_modulate", "gate_add")
kernel = kernels_of(kernel_module, *OPS)
TOLERANCE = {torch.float32: FP32_OP, torch.bfloat16: BF16_OP, torch.float16: BF16_OP}
FORMS = every_form(kernel, reference, cpp)


def arguments(op, tokens=5, hidden=48, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens * hidden)
    randn = lambda *size: torch.randn(*size, generator=generator).to(dtype)
    row_T = torch.arange(tokens) // 2
    levels = torch.tensor([3, UNMODULATED, 10, 0])[: int(row_T[-1]) + 1]
    modulation = Modulation(randn(LEVELS, 3, hidden), randn(3, hidden), levels, row_T)
    x = randn(tokens, hidden) * 3
    return (x, randn(tokens, hidden), modulation) if op == "gate_add" else (x, randn(hidden), EPS, modulation)


def in_fp64(op, arguments):
    """The formulas of ``docs/model.md#denoiser-pass``, nothing rounded; the neutral modulation written out."""
    *tensors, modulation = arguments
    x, other = tensors[0].double(), tensors[1].double()
    vectors = modulation.vector_L3D.double()[modulation.level_R] + modulation.table_3D.double()
    vectors[modulation.level_R == UNMODULATED] = torch.tensor([0.0, 0.0, 1.0]).double()[:, None]
    shift, scale, gate = vectors[modulation.row_T].unbind(1)
    norm = lambda v: v / (v.square().mean(-1, keepdim=True) + EPS).sqrt() * other
    if op == "gate_add":
        return other + gate * x
    return norm(x * (1 + scale) + shift) if op == "modulate_norm" else norm(x) * (1 + scale) + shift


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("tokens", "hidden"), [(7, 48), (1, 48), (7, 1), (7, 33), (3, 2688)])
@FORMS
def test_every_form_equals_the_formula(form, op, dtype, tokens, hidden):
    case = arguments(op, tokens, hidden, dtype)
    got, expected = getattr(form, op)(*case), getattr(reference, op)(*case)
    assert got.dtype == expected.dtype == dtype
    assert difference(got, expected) < TOLERANCE[dtype]
    assert difference(got, in_fp64(op, case)) < TOLERANCE[dtype]


@pytest.mark.parametrize("op", OPS)
def test_bf16_is_rounded_where_the_reference_rounds(op):
    """Nearly every element has the reference's bits: only the order of the norm's sum may differ."""
    case = arguments(op, 8, 1024, torch.bfloat16)
    same = getattr(kernel, op)(*case) == getattr(reference, op)(*case)
    assert float(same.float().mean()) > (0.999 if op != "gate_add" else 0.99999)


@FORMS
def test_a_row_without_time_conditioning_is_an_ordinary_layer(form):
    x, weight, eps, modulation = arguments("modulate_norm", 4)
    plain = Modulation(
        modulation.vector_L3D * float("nan"), modulation.table_3D, *[torch.full((4,), -1), torch.arange(4)]
    )
    expected = torch.nn.functional.rms_norm(x, (48,), weight, eps)
    torch.testing.assert_close(form.modulate_norm(x, weight, eps, plain), expected, atol=FP32_OP, rtol=FP32_OP)
    torch.testing.assert_close(form.norm_modulate(x, weight, eps, plain), expected, atol=FP32_OP, rtol=FP32_OP)
    torch.testing.assert_close(form.gate_add(x, x, plain), x + x, atol=0, rtol=0)


@FORMS
def test_rows_of_a_wider_tensor_are_read_in_place(form):
    x, weight, eps, modulation = arguments("modulate_norm", 4)
    wide = torch.cat([x, x], dim=1)
    assert torch.equal(
        form.modulate_norm(wide[:, :48], weight, eps, modulation), form.modulate_norm(x, weight, eps, modulation)
    )
    assert torch.equal(form.gate_add(wide[:, 48:], wide[:, :48], modulation), form.gate_add(x, x, modulation))


@pytest.mark.parametrize(
    ("op", "index", "value", "message"),
    [
        ("modulate_norm", 0, torch.zeros(5, 48).double(), "x_TD is torch.float64, allowed: torch.float32"),
        ("modulate_norm", 1, torch.zeros(47), r"weight_D has shape \[47\], wanted \[48\]"),
        ("norm_modulate", 2, float("nan"), "eps=nan: must be 0 or more"),
        ("gate_add", 1, torch.zeros(5, 48).half(), "residual_TD is torch.float16, allowed: torch.float32"),
    ],
)
def test_wrong_arguments_are_named(op, index, value, message):
    case = list(arguments(op))
    case[index] = value
    with pytest.raises(ValueError, match=message):
        getattr(ops, op)(*case)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("vector_L3D", torch.zeros(11, 2, 48), r"modulation.vector_L3D has shape \[11, 2, 48\], wanted \[L, 3, 48\]"),
        ("table_3D", torch.zeros(3, 48).half(), "modulation.table_3D is torch.float16, allowed: torch.float32"),
        ("level_R", torch.zeros(3), "modulation.level_R is torch.float32, allowed: torch.int64"),
        ("row_T", torch.zeros(4).long(), r"modulation.row_T has shape \[4\], wanted \[5\]"),
    ],
)
def test_a_wrong_modulation_is_named(field, value, message):
    x, residual, modulation = arguments("gate_add")
    wrong = Modulation(**{**vars(modulation), field: value})
    with pytest.raises(ValueError, match=message):
        ops.gate_add(x, residual, wrong)


def test_the_kernel_says_what_it_cannot_take():
    case = arguments("norm_modulate")
    with pytest.raises(ValueError, match=r"x_TD has strides \[1, 5\], of which a kernel needs the last to be 1"):
        kernel.norm_modulate(case[0].t().contiguous().t(), *case[1:])
    x = torch.zeros(1, 16_385)
    modulation = Modulation(torch.zeros(1, 3, 16_385), torch.zeros(3, 16_385), *[torch.zeros(1).long()] * 2)
    with pytest.raises(ValueError, match="x_TD has 16385 columns, the kernel takes at most 16384"):
        kernel.gate_add(x, x, modulation)
