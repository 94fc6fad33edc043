"""Router and routed experts: reference and C++ against the formula in fp64, token by token."""

import pytest
import torch

from tests.op_forms import difference, every_form
from tests.tolerances import BF16_OP, FP32_OP
from vllm_twotower import ops
from vllm_twotower.cpu.ops import mixture_of_experts as cpp
from vllm_twotower.ops.mixture_of_experts import reference
from vllm_twotower.ops.mixture_of_experts.reference import Routing

FORMS = every_form(None, reference, cpp)
pytestmark = pytest.mark.usefixtures("poisoned_memory")
TOLERANCE = {torch.float32: FP32_OP, torch.bfloat16: BF16_OP}


def arguments(tokens=7, hidden=24, experts=6, width=10, top_k=2, normalise=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens * hidden + experts)
    randn = lambda *size: torch.randn(*size, generator=generator)
    routing = Routing(randn(experts, hidden).to(dtype), randn(experts) * 0.3, top_k, normalise, 2.5)
    return (
        randn(tokens, hidden).to(dtype),
        routing,
        randn(experts, hidden, width).to(dtype),
        randn(experts, width, hidden).to(dtype),
    )


def in_fp64(x, routing, up, down):
    """``NemotronHMoE``: sigmoid scores, chosen with the bias, weighed without it."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        score = (routing.weight_ED.double() @ row).sigmoid()
        chosen = (score + routing.bias_E.double()).topk(routing.top_k).indices
        share = score[chosen] / (score[chosen].sum() + 1e-20) if routing.normalise else score[chosen]
        for expert, weight in zip(chosen, share * routing.scaling, strict=True):
            out[token] += weight * ((row @ up[expert].double()).relu().square() @ down[expert].double())
    return out


@FORMS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    "sizes",
    [{}, {"tokens": 1}, {"tokens": 33}, {"hidden": 5}, {"width": 1}, {"top_k": 6}, {"experts": 1, "top_k": 1},
     {"experts": 128, "top_k": 6}, {"normalise": False}],
    ids=str,
)  # fmt: skip
def test_every_form_equals_the_formula(form, dtype, sizes):
    case = arguments(**sizes, dtype=dtype)
    got = form.mixture_of_experts(*case)
    assert got.dtype == torch.float32
    assert difference(got, in_fp64(*case)) < TOLERANCE[dtype]


@FORMS
def test_not_a_number_stays_in_its_token(form):
    x, *rest = arguments()
    poisoned = x.clone()
    poisoned[3] = float("nan")
    got, clean = form.mixture_of_experts(poisoned, *rest), form.mixture_of_experts(x, *rest)
    assert got[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6]
    torch.testing.assert_close(got[others], clean[others], atol=FP32_OP, rtol=FP32_OP)


def test_wrong_arguments_are_named():
    x, routing, up, down = arguments()
    with pytest.raises(ValueError, match=r"down_EID has shape \[6, 9, 24\], wanted \[6, 10, 24\]"):
        ops.mixture_of_experts(x, routing, up, down[:, :9].contiguous())
    with pytest.raises(ValueError, match=r"routing.top_k=7: must be in \[1, 6\]"):
        ops.mixture_of_experts(x, Routing(routing.weight_ED, routing.bias_E, 7, True, 1.0), up, down)
