"""reveal: the kernel under Triton's interpreter against the reference, over every canvas width and many settings."""

from dataclasses import replace

import pytest
import torch

from tests.op_forms import IN_CPP, kernels_of
from vllm_twotower import ops
from vllm_twotower.cpu.ops import reveal as cpp
from vllm_twotower.decoding.noise_level import all_noise_levels
from vllm_twotower.ops.reveal import kernel as kernel_module
from vllm_twotower.ops.reveal.reference import CanvasRules, MaskedCanvases
from vllm_twotower.ops.reveal.reference import reveal as reference

kernel = kernels_of(kernel_module, "reveal").reveal
pytestmark = pytest.mark.usefixtures("poisoned_memory")
FIELDS = tuple(MaskedCanvases.__dataclass_fields__)
UNREAD = torch.tensor(-99)
"""``level_R`` before a pass."""


def canvases(rows, width, max_width, seed=0):
    """Rows of their own width, threshold, T and pass; few distinct confidences, so that there are ties."""
    generator = torch.Generator().manual_seed(seed)
    integers = lambda high, *size: torch.randint(high, size, generator=generator)
    width_R = (width - integers(width, rows)).clamp(min=1)
    inside = torch.arange(max_width) < width_R[:, None]
    max_steps_R = 1 + integers(20, rows)
    rules = CanvasRules(width_R, integers(5, rows) / 4, max_steps_R)
    masked = (integers(4, rows, max_width) > 0) & inside
    masked[0] = False
    confidence = integers(5, rows, max_width) / 4
    pass_index_R = integers(20, rows) % max_steps_R
    token = integers(99, rows, max_width)
    before = MaskedCanvases(token_RS=token, masked_RS=masked, level_R=UNREAD, pass_index_R=pass_index_R)
    return before, integers(99, rows, max_width), confidence, rules


def tensors_of(case):
    before, proposal, confidence, _ = case
    return [*vars(before).values(), proposal, confidence]


def assert_same(got, expected):
    for name in FIELDS:
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
        assert getattr(got, name).dtype == getattr(expected, name).dtype, name


@pytest.mark.parametrize(
    ("rows", "width", "max_width"), [(64, 16, 16), (40, 32, 32), (40, 7, 16), (9, 1, 1), (9, 5, 5)]
)
def test_kernel_equals_reference(rows, width, max_width):
    case = canvases(rows, width, max_width)
    before = [t.clone() for t in tensors_of(case)]
    got = kernel(*case)
    assert_same(got, reference(*case))
    assert all(torch.equal(b, t) for b, t in zip(before, tensors_of(case), strict=True)), "arguments are not written"
    levels = all_noise_levels(max_width)[got.level_R]
    assert torch.equal(levels, got.masked_RS.sum(dim=1) / case[3].width_R)


@IN_CPP
@pytest.mark.parametrize("width", [1, 7, 16, 32])
def test_cpp_equals_reference(width):
    case = canvases(100, width, width, seed=width)
    confidence = case[2]
    confidence[::7] = float("nan")
    before = [t.clone() for t in tensors_of(case)]
    assert_same(cpp.reveal(*case), reference(*case))
    assert all(torch.equal(b.nan_to_num(), t.nan_to_num()) for b, t in zip(before, tensors_of(case), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_kernel_equals_reference_on_many_canvases(seed):
    case = canvases(100, 1 + seed % 32, 32, seed)
    assert_same(kernel(*case), reference(*case))


@pytest.mark.parametrize(
    "form", [kernel, reference, pytest.param(cpp.reveal, marks=IN_CPP)], ids=["kernel", "reference", "cpp"]
)
def test_the_rule(form):
    """By hand: the threshold is strict, ties go left, the last pass reveals all, at least one goes, T - pass is met."""
    confidence = torch.tensor([[0.5, 0.9, 0.9, 0.2]]).repeat(5, 1)
    confidence[3] = float("nan")
    rules = CanvasRules(
        torch.full((5,), 4), torch.tensor([0.9, 0.4, 0.99, 0.99, 0.99]), torch.tensor([16, 16, 16, 16, 5])
    )
    masked = torch.ones(5, 4, dtype=torch.bool)
    passes = torch.tensor([0, 0, 15, 0, 3])
    before = MaskedCanvases(token_RS=torch.zeros(5, 4).long(), masked_RS=masked, level_R=UNREAD, pass_index_R=passes)
    got = form(before, torch.ones(5, 4).long(), confidence, rules)
    assert got.token_RS.tolist() == [[0, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0]]
    assert torch.equal(got.masked_RS, got.token_RS == 0)
    assert got.masked_RS.sum(dim=1).tolist() == [3, 1, 0, 3, 2]
    assert got.pass_index_R.tolist() == [1, 1, 16, 1, 4]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("token_RS", torch.zeros(2, 33).long(), "before.token_RS has 33 positions per canvas, allowed: 1 to 32"),
        ("token_RS", torch.zeros(2, 4), "before.token_RS is torch.float32, allowed: torch.int64"),
        ("proposal_RS", torch.zeros(2, 3).long(), r"proposal_RS has shape \[2, 3\], wanted \[2, 4\]"),
        ("confidence_RS", torch.zeros(2, 4).half(), "confidence_RS is torch.float16, allowed: torch.float32"),
        ("masked_RS", torch.zeros(2, 4).long(), "before.masked_RS is torch.int64, allowed: torch.bool"),
        ("pass_index_R", torch.zeros(3).long(), r"before.pass_index_R has shape \[3\], wanted \[2\]"),
        ("rules", CanvasRules(*[torch.ones(2)] * 3), "rules.width_R is torch.float32, allowed: torch.int64"),
    ],
)
def test_wrong_arguments_are_named(name, value, message):
    before, proposal, confidence, rules = canvases(2, 4, 4)
    arguments = {"before": before, "proposal_RS": proposal, "confidence_RS": confidence, "rules": rules}
    changed = {name: value} if name in arguments else {"before": replace(before, **{name: value})}
    with pytest.raises(ValueError, match=message):
        ops.reveal(**arguments | changed)
