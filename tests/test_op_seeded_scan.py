"""Convolution and scan of a canvas: reference and kernel, the kernel under Triton's interpreter, against the recurrence
one token at a time in fp64."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_forms import difference, every_form, every_size, kernels_of, scan_step_by_step
from tests.tolerances import BF16_OP, FP32_OP
from vllm_twotower import ops
from vllm_twotower.cpu.ops import seeded_scan as cpp
from vllm_twotower.ops.seeded_scan import kernel as kernel_module
from vllm_twotower.ops.seeded_scan import reference
from vllm_twotower.ops.seeded_scan.reference import ConvInputs, ScanInputs

kernel = kernels_of(kernel_module, "seeded_conv", "seeded_scan")
FORMS = every_form(kernel, reference, cpp)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
TOLERANCE = {torch.float32: FP32_OP, torch.bfloat16: BF16_OP}
pytestmark = pytest.mark.usefixtures("poisoned_memory", "bf16_rounds_to_nearest")


def step_by_step(x, dt, a, b, c, skip, dt_bias, state):
    y, _ = scan_step_by_step(x, F.softplus(dt.double() + dt_bias.double()), a, b, c, state)
    return y + skip.double()[:, None] * x.double()


def scan_arguments(rows=2, width=16, heads=4, head_dim=8, groups=2, state_size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + width * heads)
    randn = lambda *size: torch.randn(*size, generator=generator).to(dtype)
    return {
        "x_RSHP": randn(rows, width, heads, head_dim),
        "dt_RSH": randn(rows, width, heads),
        "a_H": -randn(heads).float().abs() - 0.1,
        "b_RSGN": randn(rows, width, groups, state_size),
        "c_RSGN": randn(rows, width, groups, state_size),
        "skip_H": randn(heads),
        "dt_bias_H": randn(heads),
        "state_ZHPN": randn(5, heads, head_dim, state_size).float() * 10,
        "slot_R": torch.tensor([4, 1, 3])[:rows],
    }


def expected_scan(case):
    *tensors, slot = case.values()
    return step_by_step(*tensors[:-1], tensors[-1][slot])


@FORMS
@every_size(
    {},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"rows": 1},
    {"rows": 3},
    {"width": 1},
    {"width": 32},
    {"width": 7},
    {"heads": 6},
    {"head_dim": 5},
    {"head_dim": 33},
    {"groups": 1},
    {"groups": 4},
    {"state_size": 3},
    {"state_size": 40},
)
def test_scan_is_the_recurrence_from_the_slots_state(form, sizes):
    case = scan_arguments(**sizes)
    before = case["state_ZHPN"].clone()
    got = form.seeded_scan(ScanInputs(**case))
    assert got.dtype == torch.float32
    assert difference(got, expected_scan(case)) < FP32_OP, "inputs of 16 bits are exact in fp32, and so is the scan"
    assert torch.equal(case["state_ZHPN"], before), "the cache is read-only"
    rounded = form.seeded_scan(ScanInputs(**case), out_dtype=torch.bfloat16)
    assert torch.equal(rounded, got.bfloat16())


@pytest.mark.slow
@DTYPES
@pytest.mark.parametrize("width", [16, 32])
def test_scan_at_the_real_models_layer(dtype, width):
    case = scan_arguments(2, width, 64, 64, 8, 128, dtype)
    got = kernel.seeded_scan(ScanInputs(**case))
    assert difference(got, expected_scan(case)) < FP32_OP
    assert difference(got, reference.seeded_scan(ScanInputs(**case))) < FP32_OP


@FORMS
@pytest.mark.parametrize("dt", [60.0, 19.9, 20.1, -5.0, -12.0, -30.0])
def test_scan_survives_large_states_and_steps(form, dt):
    """States of long contexts reach thousands, large steps underflow every decay, small ones must not be lost in
    1 + exp(dt)."""
    case = scan_arguments()
    case["dt_RSH"] = torch.full((2, 16, 4), dt)
    case["dt_bias_H"] = torch.zeros(4)
    case["state_ZHPN"] *= 1000
    got = form.seeded_scan(ScanInputs(**case))
    assert difference(got, expected_scan(case)) < FP32_OP
    case["state_ZHPN"] *= 0  # what the canvas itself writes, which a large state would hide
    case["skip_H"] = torch.zeros(4)
    assert difference(form.seeded_scan(ScanInputs(**case)), expected_scan(case)) < FP32_OP


@FORMS
def test_scan_reads_projections_and_caches_in_place(form):
    """Strided views of the projection's output and of a cache that holds more than states."""
    case = scan_arguments()
    wide = lambda t, dim: torch.cat([torch.full_like(t, float("nan")), t], dim=dim).narrow(
        dim, t.shape[dim], t.shape[dim]
    )
    views = {**case, **{name: wide(case[name], 1) for name in ("x_RSHP", "dt_RSH", "state_ZHPN")}}
    views["b_RSGN"] = wide(case["b_RSGN"].flatten(2), 2).unflatten(-1, (2, 16))
    assert not views["b_RSGN"].is_contiguous()
    assert torch.equal(form.seeded_scan(ScanInputs(**views)), form.seeded_scan(ScanInputs(**case)))


def test_three_tf32_products_keep_fp32s_accuracy():
    """The interpreter multiplies in fp32; this is the arithmetic of ``PRECISION`` on a GPU, by its definition."""
    assert kernel_module.PRECISION == "tf32x3"

    def tf32(x):
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)  # to the nearest of 10 bits

    generator = torch.Generator().manual_seed(0)
    c, state = torch.randn(16, 128, generator=generator), torch.randn(128, 64, generator=generator) * 1e4
    (c_high, c_low), (h_high, h_low) = ((tf32(t), tf32(t - tf32(t))) for t in (c, state))
    exact = c.double() @ state.double()
    assert difference(c_low @ h_high + c_high @ h_low + c_high @ h_high, exact) < FP32_OP / 20
    assert difference(c_high @ h_high, exact) > FP32_OP, "one TF32 product is not enough"


def conv_arguments(rows=2, width=16, channels=6, taps=4, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(width * channels)
    randn = lambda *size: torch.randn(*size, generator=generator).to(dtype)
    return {
        "x_RSC": randn(rows, width, channels),
        "weight_CK": randn(channels, taps),
        "bias_C": randn(channels) if bias else None,
        "cache_ZKC": randn(5, taps - 1, channels),
        "slot_R": torch.tensor([4, 1, 3])[:rows],
    }


@FORMS
@DTYPES
@every_size(
    {},
    {"rows": 3},
    {"width": 1},
    {"width": 2},
    {"width": 31},
    {"channels": 130},
    {"taps": 2},
    {"bias": False},
)
def test_conv_continues_the_contexts_inputs(form, dtype, sizes):
    case = conv_arguments(**sizes, dtype=dtype)
    before = case["cache_ZKC"].clone()
    whole = torch.cat([case["cache_ZKC"][case["slot_R"]], case["x_RSC"]], dim=1).double().transpose(1, 2)
    bias = None if case["bias_C"] is None else case["bias_C"].double()
    out = F.conv1d(whole, case["weight_CK"].double()[:, None], bias, groups=whole.shape[1])
    got = form.seeded_conv(ConvInputs(**case))
    assert got.dtype == dtype
    assert difference(got, F.silu(out).transpose(1, 2)) < TOLERANCE[dtype]
    assert torch.equal(case["cache_ZKC"], before), "the cache is read-only"


@FORMS
def test_conv_reads_projections_and_caches_in_place(form):
    case = conv_arguments()
    views = dict(case)
    views["x_RSC"] = torch.cat([case["x_RSC"]] * 2, dim=2)[..., :6]
    views["cache_ZKC"] = case["cache_ZKC"].transpose(1, 2).contiguous().transpose(1, 2)  # vLLM's other cache layout
    assert torch.equal(form.seeded_conv(ConvInputs(**views)), form.seeded_conv(ConvInputs(**case)))


@pytest.mark.parametrize(
    ("op", "name", "value", "message"),
    [
        ("conv", "cache_ZKC", torch.zeros(1, 4, 6), r"cache_ZKC has shape \[1, 4, 6\], wanted \[Z, 3, 6\]"),
        ("conv", "x_RSC", torch.zeros(2, 33, 6), "x_RSC has 33 positions per canvas, allowed: 1 to 32"),
        ("conv", "weight_CK", torch.zeros(5, 4), r"weight_CK has shape \[5, 4\], wanted \[6, K\]"),
        ("conv", "bias_C", torch.zeros(6).long(), "bias_C is torch.int64, allowed: torch.float32"),
        ("conv", "slot_R", torch.zeros(2).int(), "slot_R is torch.int32, allowed: torch.int64"),
        ("scan", "x_RSHP", torch.zeros(2, 33, 4, 8), "x_RSHP has 33 positions per canvas, allowed: 1 to 32"),
        ("scan", "dt_RSH", torch.zeros(2, 16, 3), r"dt_RSH has shape \[2, 16, 3\], wanted \[2, 16, 4\]"),
        ("scan", "b_RSGN", torch.zeros(2, 16, 3, 16), "b_RSGN has 3 groups, which do not divide the 4 heads of x_RSHP"),
        ("scan", "c_RSGN", torch.zeros(2, 16, 2, 8), r"c_RSGN has shape \[2, 16, 2, 8\], wanted \[2, 16, 2, 16\]"),
        ("scan", "skip_H", torch.zeros(3), r"skip_H has shape \[3\], wanted \[4\]"),
    ],
)
def test_wrong_inputs_are_named(op, name, value, message):
    case = {"conv": conv_arguments, "scan": scan_arguments}[op]()
    record = {"conv": ConvInputs, "scan": ScanInputs}[op]
    with pytest.raises(ValueError, match=message):
        getattr(ops, f"seeded_{op}")(record(**{**case, name: value}))


def test_the_kernel_wants_a_states_columns_to_lie_together():
    case = scan_arguments()
    case["state_ZHPN"] = torch.zeros(5, 4, 16, 8).mT
    with pytest.raises(
        ValueError, match=r"state_ZHPN has strides \[512, 128, 1, 8\], of which a kernel needs the last"
    ):
        kernel.seeded_scan(ScanInputs(**case))
    assert torch.isfinite(reference.seeded_scan(ScanInputs(**case))).all()
