"""The states after the first tokens of a canvas: reference and kernel, the kernel under Triton's interpreter, against
the recurrence over exactly so many tokens, one at a time in fp64."""

import pytest
import torch
import torch.nn.functional as F

from tests.op_forms import difference, every_form, every_size, kernels_of
from tests.test_op_seeded_scan import scan_arguments
from tests.tolerances import BF16_OP, FP32_OP
from vllm_twotower import ops
from vllm_twotower.core import KERNELS_VARIABLE
from vllm_twotower.ops.seeded_scan.reference import ScanInputs
from vllm_twotower.ops.state_replay import kernel as kernel_module
from vllm_twotower.ops.state_replay import reference

kernel = kernels_of(kernel_module, "state_replay")
FORMS = every_form(kernel, reference)
pytestmark = pytest.mark.usefixtures("poisoned_memory", "bf16_rounds_to_nearest")


def replay_arguments(*, num_tokens, channels=10, taps=3, dtype=torch.float32, **sizes):
    """Inputs whose tokens that do not count are NaN, with one row per number of tokens; every other slot is another's.

    A third of the slots belongs to nobody's row.
    """
    rows = len(num_tokens)
    scan = scan_arguments(1, dtype=dtype, **sizes)
    _, width, heads, head_dim = scan["x_RSHP"].shape
    groups, state_size = scan["b_RSGN"].shape[2:]
    generator = torch.Generator().manual_seed(width * heads + rows)
    randn = lambda *size: torch.randn(*size, generator=generator)
    behind_RS = torch.arange(width) >= torch.tensor(num_tokens)[:, None]

    def fed(*size):
        tensor = randn(rows, width, *size).to(dtype)
        return tensor.masked_fill(behind_RS.view(rows, width, *[1] * len(size)), float("nan"))

    slots = rows + rows // 2 + 1
    scan |= {
        "x_RSHP": fed(heads, head_dim),
        "dt_RSH": fed(heads),
        "b_RSGN": fed(groups, state_size),
        "c_RSGN": torch.full((rows, width, groups, state_size), float("nan"), dtype=dtype),
        "state_ZHPN": randn(slots, heads, head_dim, state_size) * 10,
        "slot_R": torch.randperm(slots, generator=generator)[:rows],
    }
    more = {
        "raw_RSC": fed(channels),
        "conv_cache_ZKC": randn(slots, taps, channels).to(dtype),
        "num_tokens_R": torch.tensor(num_tokens),
    }
    return scan, more


def token_by_token(scan, more):
    """All slots after the recurrence as the Mamba-2 paper writes it, over each row's own tokens; in fp64."""
    states, windows = scan["state_ZHPN"].double().clone(), more["conv_cache_ZKC"].clone()
    for row, (slot, num_tokens) in enumerate(zip(scan["slot_R"].tolist(), more["num_tokens_R"].tolist(), strict=True)):
        for t in range(num_tokens):
            x, dt, b = (scan[name][row, t].double() for name in ("x_RSHP", "dt_RSH", "b_RSGN"))
            step = F.softplus(dt + scan["dt_bias_H"].double())
            b = b.repeat_interleave(x.shape[0] // b.shape[0], 0)
            decay = torch.exp(scan["a_H"].double() * step)[:, None, None]
            states[slot] = decay * states[slot] + (step[:, None] * x)[:, :, None] * b[:, None]
            windows[slot] = torch.cat([windows[slot][1:], more["raw_RSC"][row, t : t + 1].to(windows.dtype)])
    return states, windows


def check(form, scan, more, tolerance=FP32_OP):
    """The rows' states are the recurrence's, their windows exactly; every other bit stays."""
    expected_states, expected_windows = token_by_token(scan, more)
    before = scan["state_ZHPN"].clone()
    assert form.state_replay(ScanInputs(**scan), **more) is None
    got = scan["state_ZHPN"]
    assert difference(got, expected_states) < tolerance
    assert torch.equal(more["conv_cache_ZKC"], expected_windows)
    is_same_Z = torch.ones(len(got), dtype=torch.bool)
    is_same_Z[scan["slot_R"][more["num_tokens_R"] > 0]] = False
    assert bits(got[is_same_Z]) == bits(before[is_same_Z])
    assert not is_same_Z.all()


def bits(tensor):
    """Of every element; 0.0 and -0.0 are different ones."""
    return tensor.contiguous().flatten().view(torch.uint8).tolist()


@FORMS
@pytest.mark.parametrize("width", [1, 2, 7, 16, 32])
def test_every_number_of_tokens(form, width):
    check(form, *replay_arguments(num_tokens=range(width + 1), width=width, heads=2, state_size=4))


@FORMS
@every_size(
    {},
    {"dtype": torch.bfloat16},
    {"dtype": torch.float16},
    {"heads": 6},
    {"head_dim": 5},
    {"head_dim": 33},
    {"groups": 1},
    {"groups": 4},
    {"state_size": 3},
    {"state_size": 72},
    {"taps": 1},
    {"taps": 2},
    {"taps": 4},
    {"channels": 1},
    {"channels": 600},
)
def test_sizes_and_dtypes(form, sizes):
    check(form, *replay_arguments(num_tokens=[16, 0, 5, 2, 1], **sizes))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("width", [16, 32])
def test_the_real_models_layer(dtype, width):
    sizes = {"heads": 64, "head_dim": 64, "groups": 8, "state_size": 128, "channels": 6144}
    check(kernel, *replay_arguments(num_tokens=[width, 3], width=width, dtype=dtype, **sizes))


@FORMS
def test_states_of_16_bits_are_rounded_once(form):
    scan, more = replay_arguments(num_tokens=[16, 0, 5])
    scan["state_ZHPN"] = scan["state_ZHPN"].bfloat16()
    check(form, scan, more, BF16_OP)


@FORMS
def test_a_windows_dtype_is_its_own(form):
    scan, more = replay_arguments(num_tokens=[16, 0, 2, 1])
    more["conv_cache_ZKC"] = more["conv_cache_ZKC"].bfloat16()
    check(form, scan, more)


@FORMS
def test_a_row_of_no_tokens_keeps_every_bit(form):
    """Also those of a negative zero, which adding nothing would change, and of what is no number."""
    scan, more = replay_arguments(num_tokens=[0, 1])
    slot = int(scan["slot_R"][0])
    mine = [scan["state_ZHPN"][slot], more["conv_cache_ZKC"][slot]]
    for tensor in mine:
        tensor.view(-1)[:4] = torch.tensor([-0.0, float("inf"), float("nan"), 1e-45])
    before = [bits(tensor) for tensor in mine]
    form.state_replay(ScanInputs(**scan), **more)
    assert [bits(tensor) for tensor in mine] == before


@FORMS
@pytest.mark.parametrize("dt", [60.0, 19.9, 20.1, -5.0, -12.0, -30.0])
def test_large_states_and_steps(form, dt):
    scan, more = replay_arguments(num_tokens=[16, 0, 5, 1])
    scan["dt_RSH"] = torch.where(scan["dt_RSH"].isnan(), float("nan"), dt)
    scan["dt_bias_H"] = torch.zeros(4)
    scan["state_ZHPN"] *= 1000
    check(form, scan, more)
    scan["state_ZHPN"] *= 0  # what the canvas itself adds, which a large state would hide
    check(form, scan, more)


@FORMS
def test_small_steps_behind_a_large_one(form):
    """The decay between two late tokens is no difference of sums that the large step has rounded."""
    scan, more = replay_arguments(num_tokens=[16])
    scan["dt_RSH"] = torch.full((1, 16, 4), -3.0)
    scan["dt_RSH"][:, 0] = 1e5
    scan["dt_bias_H"], scan["a_H"] = torch.zeros(4), torch.full((4,), -16.0)
    check(form, scan, more)


@FORMS
def test_projections_and_caches_are_used_in_place(form):
    """Strided views of the projection's output, of caches that hold more, and vLLM's other layout of the window."""
    scan, more = replay_arguments(num_tokens=[16, 0, 5, 2, 1])
    expected = token_by_token(scan, more)

    def wide(t, dim):
        return torch.cat([torch.full_like(t, float("nan")), t], dim=dim).narrow(dim, t.shape[dim], t.shape[dim])

    scan |= {name: wide(scan[name], 1) for name in ("x_RSHP", "dt_RSH", "b_RSGN", "state_ZHPN")}
    more["raw_RSC"] = wide(more["raw_RSC"], 2)
    more["conv_cache_ZKC"] = wide(more["conv_cache_ZKC"].transpose(1, 2).contiguous(), 1).transpose(1, 2)
    assert more["conv_cache_ZKC"].stride(1) == 1
    whole = [t._base for t in (scan["state_ZHPN"], more["conv_cache_ZKC"])]
    form.state_replay(ScanInputs(**scan), **more)
    assert difference(scan["state_ZHPN"], expected[0]) < FP32_OP
    assert torch.equal(more["conv_cache_ZKC"], expected[1])
    assert all(w.isnan().sum() == w.numel() // 2 for w in whole), "nothing beside the states is written"


@pytest.mark.parametrize("choice", ["reference", "triton"])
def test_the_public_op_runs_what_is_chosen(choice, monkeypatch):
    monkeypatch.setenv(KERNELS_VARIABLE, choice)
    check(ops, *replay_arguments(num_tokens=[3, 0, 16]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("x_RSHP", torch.zeros(3, 33, 4, 8), "x_RSHP has 33 positions per canvas, allowed: 1 to 32"),
        ("dt_RSH", torch.zeros(3, 16, 3), r"dt_RSH has shape \[3, 16, 3\], wanted \[3, 16, 4\]"),
        ("raw_RSC", torch.zeros(3, 15, 10), r"raw_RSC has shape \[3, 15, 10\], wanted \[3, 16, C\]"),
        ("conv_cache_ZKC", torch.zeros(5, 3, 9), r"conv_cache_ZKC has shape \[5, 3, 9\], wanted \[5, K - 1, 10\]"),
        ("conv_cache_ZKC", torch.zeros(4, 3, 10), r"conv_cache_ZKC has shape \[4, 3, 10\], wanted \[5, K - 1, 10\]"),
        ("num_tokens_R", torch.zeros(3).int(), "num_tokens_R is torch.int32, allowed: torch.int64"),
        ("num_tokens_R", torch.zeros(2).long(), r"num_tokens_R has shape \[2\], wanted \[3\]"),
    ],
)
def test_wrong_inputs_are_named(name, value, message):
    scan, more = replay_arguments(num_tokens=[3, 0, 16])
    changed = scan if name in scan else more
    changed[name] = value
    with pytest.raises(ValueError, match=message):
        ops.state_replay(ScanInputs(**scan), **more)


def test_the_kernel_wants_channels_to_lie_together():
    scan, more = replay_arguments(num_tokens=[3, 0, 16])
    more["raw_RSC"] = torch.zeros(3, 10, 16).mT
    with pytest.raises(ValueError, match=r"raw_RSC has strides \[160, 1, 16\], of which a kernel needs the last"):
        kernel.state_replay(ScanInputs(**scan), **more)
