"""The gated norm: every form against the formula in fp64, vLLM's own layer, and what it cannot take."""

import pytest
import torch
from torch.nn.functional import silu

from tests.op_forms import difference, every_form, kernels_of
from tests.tolerances import BF16_OP, FP32_OP
from vllm_twotower import ops
from vllm_twotower.cpu.ops import gated_norm as cpp
from vllm_twotower.ops.gated_norm import kernel as kernel_module
from vllm_twotower.ops.gated_norm import reference

pytestmark = pytest.mark.usefixtures("poisoned_memory", "bf16_rounds_to_nearest")
EPS = 1e-5
kernel = kernels_of(kernel_module, "gated_norm")
TOLERANCE = {torch.float32: FP32_OP, torch.bfloat16: BF16_OP, torch.float16: BF16_OP}
FORMS = every_form(kernel, reference, cpp)


def arguments(tokens=5, groups=3, width=16, dtype=torch.float32):
    """The gate a part of longer rows, as a projection's."""
    generator = torch.Generator().manual_seed(tokens * groups * width)
    randn = lambda *size: torch.randn(*size, generator=generator).to(dtype)
    projected = randn(tokens, groups * width + 7) * 3
    return randn(tokens, groups * width) * 3, projected[:, 5:-2], randn(groups * width), EPS, groups


def in_fp64(x, gate, weight, eps, groups):
    gated = (x.double() * silu(gate.double())).unflatten(-1, (groups, -1))
    return (gated / (gated.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(1) * weight.double()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(("tokens", "groups", "width"), [(7, 3, 16), (1, 1, 1), (3, 5, 33), (2, 8, 512), (0, 2, 4)])
@FORMS
def test_every_form_equals_the_formula(form, tokens, groups, width, dtype):
    case = arguments(tokens, groups, width, dtype)
    got = form.gated_norm(*case)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert got.shape == case[0].shape
    assert tokens == 0 or difference(got, in_fp64(*case)) < TOLERANCE[dtype]


@FORMS
def test_the_gate_at_its_ends(form):
    """silu(-inf) is 0 and silu of a large gate the gate; nothing overflows on the way."""
    x, _, weight, eps, _ = arguments(4, 1, 16)
    for value in (-200.0, 200.0):
        case = (x, torch.full_like(x, value), weight, eps, 1)
        torch.testing.assert_close(form.gated_norm(*case), in_fp64(*case).float(), atol=1e-5, rtol=1e-5)


@FORMS
def test_it_is_vllms_layer_up_to_roundings(form, single_process_group):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.mamba.mamba_mixer2 import Mixer2RMSNormGated

    x, gate, weight, eps, groups = arguments()
    config = VllmConfig()
    with set_current_vllm_config(config), single_process_group(config):
        layer = Mixer2RMSNormGated(x.shape[1], groups, eps=eps)
        layer.weight.data.copy_(weight)
        expected = layer.forward_native(x, gate)
    assert difference(form.gated_norm(x, gate, weight, eps, groups), expected) < FP32_OP


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, torch.zeros(5, 48).double(), "x_TD is torch.float64, allowed: torch.float32"),
        (1, torch.zeros(5, 47), r"gate_TD has shape \[5, 47\], wanted \[5, 48\]"),
        (2, torch.zeros(47), r"weight_D has shape \[47\], wanted \[48\]"),
        (3, float("nan"), "eps=nan: must be 0 or more"),
        (4, 5, "num_groups=5: must divide the 48 columns of x_TD"),
        (4, 0, "num_groups=0: must divide the 48 columns of x_TD"),
    ],
)
def test_wrong_arguments_are_named(index, value, message):
    case = list(arguments())
    case[index] = value
    with pytest.raises(ValueError, match=message):
        ops.gated_norm(*case)


def test_the_kernel_says_what_it_cannot_take():
    x, gate, *rest = arguments()
    with pytest.raises(ValueError, match=r"gate_TD has strides \[1, 5\], of which a kernel needs the last to be 1"):
        kernel.gated_norm(x, gate.t().contiguous().t(), *rest)
    x = torch.zeros(1, 16_385)
    with pytest.raises(ValueError, match="a group of x_TD has 16385 columns, the kernel takes at most 16384"):
        kernel.gated_norm(x, x, x[0], EPS, 1)
