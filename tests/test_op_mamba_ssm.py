"""Our Mamba ops beside those of the people who wrote Mamba-2: mamba-ssm's recurrence, causal-conv1d's convolution.

    make oracles

installs both, without CUDA, for these tests only, and runs them. Four forms of one recurrence, written independently of
ours: its chunk scan and its step as Triton kernels (in the interpreter, natively where there is a GPU), its step in
torch, and Listing 1 of the paper; the latter two in fp64.
"""

import contextlib
import math
import os
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from tests.op_forms import NATIVE, difference, every_form, every_size, kernels_of
from tests.test_op_seeded_scan import conv_arguments, scan_arguments
from tests.test_op_state_replay import replay_arguments
from tests.tolerances import BF16_OP, FP32_OP
from vllm_twotower.cpu.ops import seeded_scan as cpp
from vllm_twotower.ops.seeded_scan import kernel as scan_kernels
from vllm_twotower.ops.seeded_scan import reference as scan_reference
from vllm_twotower.ops.seeded_scan.reference import ConvInputs, ScanInputs
from vllm_twotower.ops.state_replay import kernel as replay_kernels
from vllm_twotower.ops.state_replay import reference as replay_reference

os.environ.setdefault("MAMBA_DETERMINISTIC", "1")  # one configuration a kernel: nothing can be tuned in the interpreter
WHY_SKIPPED = "`make oracles` installs mamba-ssm and causal-conv1d for these tests"
causal_conv1d = pytest.importorskip("causal_conv1d.causal_conv1d_interface", reason=WHY_SKIPPED)
chunk_scan = pytest.importorskip("mamba_ssm.ops.triton.ssd_combined", reason=WHY_SKIPPED)
step = pytest.importorskip("mamba_ssm.ops.triton.selective_state_update", reason=WHY_SKIPPED)
listing = pytest.importorskip("mamba_ssm.modules.ssd_minimal", reason=WHY_SKIPPED)

SCAN_FORMS = every_form(kernels_of(scan_kernels, "seeded_conv", "seeded_scan"), scan_reference, cpp)
REPLAY_FORMS = every_form(kernels_of(replay_kernels, "state_replay"), replay_reference)
CHUNK = 16
"""Positions of a chunk of its chunk scan, the fewest that ``tl.dot`` takes: the wider canvases are two chunks."""
KERNEL_TOLERANCE = BF16_OP if NATIVE else FP32_OP
"""Its products are TF32 on a GPU; in the interpreter they are fp32."""

Case = dict[str, torch.Tensor]
"""``ScanInputs`` as a dict, its ``state_ZHPN`` the state of each row."""
Outcome = tuple[torch.Tensor, torch.Tensor]
"""What a recurrence puts out, [R, S, H, P], and the states behind it, [R, H, P, N]."""


@pytest.fixture(autouse=True)
def no_cuda_device(monkeypatch):
    """Its launches choose the tensors' CUDA device, of which a CPU's have none."""
    if not NATIVE:
        monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())


def run_chunk_scan(case: Case) -> Outcome:
    return kernels_of(chunk_scan, "mamba_chunk_scan_combined").mamba_chunk_scan_combined(
        *(case[name] for name in ("x_RSHP", "dt_RSH", "a_H", "b_RSGN", "c_RSGN")),
        chunk_size=CHUNK,
        D=case["skip_H"],
        dt_bias=case["dt_bias_H"],
        initial_states=case["state_ZHPN"],
        dt_softplus=True,
        return_final_states=True,
    )


def run_step_kernel(case: Case) -> Outcome:
    return step_along(kernels_of(step, "selective_state_update").selective_state_update, case)


def run_step_in_torch(case: Case) -> Outcome:
    return step_along(step.selective_state_update_ref, in_double(case))


def step_along(update: Callable[..., torch.Tensor], case: Case) -> Outcome:
    """Its step, one token after the other; it takes a rate, a step size and a bias for every column of a head."""
    state_RHPN = case["state_ZHPN"].clone()
    _, _, head_dim, state_size = state_RHPN.shape
    a_HPN = case["a_H"][:, None, None].expand(-1, head_dim, state_size)
    dt_RSHP, bias_HP, skip_HP = (
        case[name][..., None].expand(*case[name].shape, head_dim) for name in ("dt_RSH", "dt_bias_H", "skip_H")
    )
    put_out = [
        update(
            state_RHPN,
            case["x_RSHP"][:, t],
            dt_RSHP[:, t],
            a_HPN,
            case["b_RSGN"][:, t],
            case["c_RSGN"][:, t],
            D=skip_HP,
            dt_bias=bias_HP,
            dt_softplus=True,
        )
        for t in range(dt_RSHP.shape[1])
    ]
    return torch.stack(put_out, dim=1), state_RHPN


def run_papers_listing(case: Case) -> Outcome:
    """It takes inputs and rates times their step sizes, every head's own projections, and knows no D."""
    x, dt, a, b, c, skip, dt_bias, state = (t for name, t in in_double(case).items() if name != "slot_R")
    dt_RSH = F.softplus(dt + dt_bias)
    b, c = (t.repeat_interleave(x.shape[2] // t.shape[2], dim=2) for t in (b, c))
    scaled = x * dt_RSH[..., None]
    y, after = listing.ssd_minimal_discrete(scaled, a * dt_RSH, b, c, math.gcd(x.shape[1], 8), state[:, None])
    return y + skip[:, None] * x, after


def in_double(case: Case) -> Case:
    return {name: t.double() if t.is_floating_point() else t for name, t in case.items()}


RECURRENCES = pytest.mark.parametrize(
    ("recurrence", "tolerance"),
    [
        pytest.param(run_chunk_scan, KERNEL_TOLERANCE, id="chunk-scan"),
        pytest.param(run_step_kernel, FP32_OP, id="step"),
        pytest.param(run_step_in_torch, FP32_OP, id="step-in-torch"),
        pytest.param(run_papers_listing, FP32_OP, id="listing"),
    ],
)


def started(case: Case) -> Case:
    """A case whose states are each row's own."""
    return {**case, "state_ZHPN": case["state_ZHPN"][case["slot_R"]]}


def first_tokens(case: Case, row: int, count: int) -> Case:
    """One row of a started case, and of that so many tokens."""
    by_token = ("x_RSHP", "dt_RSH", "b_RSGN", "c_RSGN")
    cut = {name: case[name][row : row + 1, :count] for name in by_token}
    return {**case, **cut, "state_ZHPN": case["state_ZHPN"][row : row + 1]}


@SCAN_FORMS
@RECURRENCES
@every_size(
    {},
    {"rows": 3, "width": 1},
    {"width": 7},
    {"width": 32},
    {"width": 19, "heads": 6, "head_dim": 5, "state_size": 3},
    {"heads": 8, "head_dim": 33, "state_size": 40},
    {"heads": 5, "groups": 5},
    {"heads": 3, "groups": 1},
)
def test_scan_is_the_recurrence_of_mambas_authors(form, recurrence, tolerance, sizes):
    case = scan_arguments(**sizes)
    expected, _ = recurrence(started(case))
    assert difference(form.seeded_scan(ScanInputs(**case)), expected) < tolerance


@SCAN_FORMS
@RECURRENCES
def test_scan_with_small_states_has_the_skip_of_mambas_authors(form, recurrence, tolerance):
    """Beside large states a skip weight that is off by a thousandth does not show."""
    case = scan_arguments()
    case.update({name: case[name] / 100 for name in ("b_RSGN", "state_ZHPN")})
    expected, _ = recurrence(started(case))
    assert difference(form.seeded_scan(ScanInputs(**case)), expected) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.usefixtures("bf16_rounds_to_nearest")
def test_scan_is_the_recurrence_at_a_group_of_the_real_models_layer(dtype, width):
    """One of its eight groups: all of them take the interpreter minutes, and no head reads another's. The interpreter
    multiplies matrices of BF16 as if their bits were integers, which the chunk scan would ask of it."""
    case = scan_arguments(1, width, heads=8, head_dim=64, groups=1, state_size=128, dtype=dtype)
    recurrence = run_chunk_scan if NATIVE or dtype is torch.float32 else run_papers_listing
    expected, _ = recurrence(started(case))
    kernel = kernels_of(scan_kernels, "seeded_scan")
    assert difference(kernel.seeded_scan(ScanInputs(**case)), expected) < BF16_OP


@SCAN_FORMS
@every_size(
    {},
    {"rows": 3, "width": 1},
    {"width": 2},
    {"width": 31},
    {"channels": 130},
    {"taps": 2},
    {"taps": 3, "bias": False},
)
def test_conv_is_the_causal_convolution_from_a_cached_window(form, sizes):
    case = conv_arguments(**sizes)
    window_RCK = case["cache_ZKC"][case["slot_R"]].transpose(1, 2)
    x_RCS = case["x_RSC"].transpose(1, 2)
    expected = causal_conv1d.causal_conv1d_ref(
        x_RCS, case["weight_CK"], case["bias_C"], initial_states=window_RCK, activation="silu"
    )
    assert difference(form.seeded_conv(ConvInputs(**case)), expected.transpose(1, 2)) < FP32_OP


@REPLAY_FORMS
@RECURRENCES
@every_size(
    {"width": 16},
    {"width": 32, "groups": 1},
    {"width": 7, "heads": 6, "head_dim": 5, "state_size": 3},
    {"width": 1, "heads": 3, "groups": 3},
)
def test_replay_is_the_recurrence_over_every_number_of_tokens(form, recurrence, tolerance, sizes):
    """Row k has the state after exactly its first k tokens; the others are NaN."""
    counts = range(sizes["width"] + 1)
    scan, more = replay_arguments(num_tokens=counts, **sizes)
    case = started({**scan, "c_RSGN": torch.zeros_like(scan["b_RSGN"])})
    expected = case["state_ZHPN"].double().clone()
    for count in counts[1:]:
        expected[count] = recurrence(first_tokens(case, count, count))[1]
    form.state_replay(ScanInputs(**scan), **more)
    got = scan["state_ZHPN"][scan["slot_R"]]
    for count in counts:
        assert difference(got[count], expected[count]) < tolerance, f"{count} tokens"


@REPLAY_FORMS
@pytest.mark.parametrize("taps", [1, 3, 4])
def test_replay_shifts_the_window_as_the_causal_convolutions_step(form, taps):
    counts = range(17)
    scan, more = replay_arguments(num_tokens=counts, taps=taps)
    windows_RCK = more["conv_cache_ZKC"][scan["slot_R"]].transpose(1, 2)
    weight_CK = torch.zeros(windows_RCK.shape[1], taps + 1)
    for count in counts:
        window_1CK = windows_RCK[count : count + 1]
        for t in range(count):
            causal_conv1d.causal_conv1d_update_ref(more["raw_RSC"][count : count + 1, t], window_1CK, weight_CK)
    form.state_replay(ScanInputs(**scan), **more)
    assert torch.equal(more["conv_cache_ZKC"][scan["slot_R"]].transpose(1, 2), windows_RCK)
