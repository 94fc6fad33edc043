"""canvas_sample: the kernel under Triton's interpreter against the reference, and the reference against definitions."""

import pytest
import torch

from tests.op_forms import IN_CPP, kernels_of
from tests.tolerances import BF16_OP, FP32_OP
from vllm_twotower import ops
from vllm_twotower.cpu.ops import canvas_sample as cpp
from vllm_twotower.decoding.noise import gumbel_from_bits, gumbel_noise, philox_4x32
from vllm_twotower.ops.canvas_sample import kernel as kernel_module
from vllm_twotower.ops.canvas_sample.reference import Draw
from vllm_twotower.ops.canvas_sample.reference import canvas_sample as reference

kernel = kernels_of(kernel_module, "canvas_sample").canvas_sample
MASK = 3
SEEDS = [0, -1, 2**63 - 1, -(2**63), 12345]
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def draws(rows, temperatures=(0.7,)):
    index = torch.arange(rows)
    return Draw(
        torch.tensor([temperatures[i % len(temperatures)] for i in range(rows)]),
        torch.tensor([SEEDS[i % len(SEEDS)] for i in range(rows)]),
        index * 1_000_003 + 2**31 - 1,
        index % 16,
    )


def logits(rows, vocab, dtype=torch.float32, scale=4.0):
    generator = torch.Generator().manual_seed(rows * vocab)
    return (torch.randn(rows, vocab, generator=generator) * scale).to(dtype)


def assert_same(got, expected):
    assert torch.equal(got.token_N, expected.token_N)
    torch.testing.assert_close(got.confidence_N, expected.confidence_N, atol=FP32_OP, rtol=FP32_OP)


@pytest.mark.parametrize("random", [False, True], ids=["greedy", "random"])
@pytest.mark.parametrize(
    ("rows", "vocab", "dtype"),
    [
        pytest.param(r, v, d, id=f"N{r} V{v} {str(d).removeprefix('torch.')}")
        for r, v, d in [
            (5, 512, torch.float32),
            (1, 512, torch.float32),
            (5, 4, torch.float32),
            (5, 1023, torch.float32),
            (5, 1025, torch.float32),
            (2, 8193, torch.float32),
            (2, 20_011, torch.bfloat16),
            (5, 512, torch.bfloat16),
            (5, 512, torch.float16),
        ]
    ],
)
def test_kernel_equals_reference(rows, vocab, dtype, random):
    x = logits(rows, vocab, dtype)
    draw = draws(rows, (0.7, 0.0, 1.3)) if random else None
    assert_same(kernel(x, MASK, draw), reference(x.clone(), MASK, draw))


@IN_CPP
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "vocab"), [(5, 512), (1, 4), (7, 1023), (90, 1536), (2, 131_072)])
def test_cpp_equals_reference(rows, vocab, dtype):
    x = logits(rows, vocab, dtype)
    x[-1, MASK] = 50.0
    x[0, [0, vocab - 1]] = 40.0  # a tie
    assert_same(cpp.canvas_sample(x, MASK), reference(x.clone(), MASK))
    assert_same(cpp.canvas_sample(x, MASK, draws(rows)), reference(x.clone(), MASK, draws(rows)))


@IN_CPP
def test_cpp_says_nan_where_nothing_is_finite():
    x = logits(3, 40)
    x[1] = float("-inf")
    x[2, 5] = float("nan")
    got = cpp.canvas_sample(x, MASK)
    assert got.confidence_N.isnan().tolist() == [False, True, True]
    assert int(got.token_N[1]) == 0


@pytest.mark.parametrize("temperature", [0.02, 0.1, 0.5, 1.0, 3.0])
def test_columns_that_cannot_win_are_passed_over_and_nothing_changes(temperature, monkeypatch):
    """Small pieces and blocks, so that there is much to pass over at low temperatures and little at high ones."""
    monkeypatch.setattr(kernel_module, "COLUMNS_PER_PIECE", 64)
    monkeypatch.setattr(kernel_module, "BLOCK", 16)
    x, draw = logits(8, 300), draws(8, (temperature,))
    assert_same(kernel(x, MASK, draw), reference(x.clone(), MASK, draw))


def test_noise_stays_within_the_range_that_columns_are_passed_over_by():
    noise = gumbel_from_bits(torch.tensor([0, 2**32 - 1]))
    assert float(noise[1] - noise[0]) < kernel_module.NOISE_RANGE.value - 0.05


def test_reference_is_the_definition():
    """Row by row, shaped and not."""
    x, draw = logits(70, 512), draws(70, (0.7, 0.0, 1.3))
    noise = gumbel_noise(draw.seed_N, draw.position_N, draw.pass_index_N, 512)

    def keep_large(score_NV, rows):
        return score_NV.masked_fill(score_NV < rows[:, None] % 3, float("-inf"))

    for shape in (None, keep_large):
        got = reference(x.clone(), MASK, draw, shape)
        for row, (temperature, logits_V) in enumerate(zip(draw.temperature_N.tolist(), x.clone(), strict=True)):
            logits_V[MASK] = float("-inf")
            scores_V = logits_V
            if temperature:
                scores_V = logits_V / temperature
                scores_V = scores_V if shape is None else shape(scores_V[None], torch.tensor([row]))[0]
                scores_V = scores_V + noise[row]
            token = int(scores_V.argmax())
            assert token == int(got.token_N[row])
            assert float(got.confidence_N[row]) == pytest.approx(float(logits_V.softmax(0)[token]), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("random", [False, True], ids=["greedy", "random"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_equals_reference_at_the_real_vocabulary(dtype, random):
    x = logits(16, 131_072, dtype)
    draw = draws(16, (0.7, 0.1, 1.0, 0.0)) if random else None
    assert_same(kernel(x, MASK, draw), reference(x.clone(), MASK, draw))


def test_a_row_is_the_same_alone_and_in_a_batch():
    x, draw = logits(6, 9000), draws(6, (0.7, 0.0))
    whole = kernel(x, MASK, draw)
    for row in range(6):
        alone = kernel(x[row : row + 1], MASK, draw.only(torch.tensor([row])))
        assert alone.token_N == whole.token_N[row]
        assert alone.confidence_N == whole.confidence_N[row]


def test_rows_of_a_wider_tensor_are_read_in_place():
    padded = logits(4, 700)
    view = padded[1:3, :600]
    assert_same(kernel(view, MASK), reference(view.clone(), MASK))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, which interprets the kernel: inf - inf, log 0
@pytest.mark.parametrize("sample", [kernel, reference], ids=["kernel", "reference"])
def test_ties_the_mask_and_rows_without_a_finite_logit(sample):
    nothing, inf = float("-inf"), float("inf")
    tie = [0.0, 7.0, 1.0, 7.5, 7.0, 7.0]  # the mask, id 3, is the largest
    x = torch.tensor([tie, [nothing] * 3 + [1.0] + [nothing] * 2, [0.0, 0.0, float("nan"), 9.0, 1.0, 1.0], [inf] * 6])
    drawn = sample(x[1:].clone(), MASK, draws(3))
    assert drawn.token_N.tolist() == [0, 2, 0]
    got = sample(x, MASK)
    assert got.token_N.tolist() == [1, 0, 2, 0]
    without_mask = torch.tensor(tie)[[0, 1, 2, 4, 5]]
    assert float(got.confidence_N[0]) == pytest.approx(float(without_mask.softmax(0)[1]), abs=FP32_OP)
    assert torch.isnan(got.confidence_N[1:]).all()


def test_the_kernels_integers_are_the_generators():
    """The noise of the kernel, read through the token it draws: logits that leave two candidates each."""
    seed, position, pass_index = torch.tensor([-5]), torch.tensor([2**32 - 1]), torch.tensor([7])
    column = torch.arange(64)
    zero = torch.zeros((), dtype=torch.int64)
    bits = philox_4x32(seed, (column, position, pass_index, zero))
    for left in range(0, 64, 4):
        x = torch.full((1, 65), float("-inf"))
        x[0, left : left + 2] = 0.0
        got = kernel(x, 64, Draw(torch.ones(1), seed, position, pass_index))
        assert int(got.token_N) == left + int(bits[left + 1] > bits[left])


def test_drawn_tokens_follow_the_tempered_softmax():
    rows, vocab, temperature = 20_000, 7, 0.6
    x = logits(1, vocab, scale=1.0).repeat(rows, 1)
    draw = Draw(torch.full((rows,), temperature), torch.full((rows,), 9), torch.arange(rows), torch.zeros(rows).long())
    expected = (x[0].index_fill(0, torch.tensor([MASK]), float("-inf")) / temperature).softmax(0)
    drawn = torch.bincount(reference(x, MASK, draw).token_N, minlength=vocab) / rows
    assert float((drawn - expected).abs().max()) < 4 * (0.25 / rows) ** 0.5, "four standard deviations at most"


def test_bf16_logits_are_not_rounded_further():
    x = logits(4, 600, torch.bfloat16)
    got, exact = kernel(x, MASK), reference(x.double().float(), MASK)
    assert torch.equal(got.token_N, exact.token_N)
    assert float((got.confidence_N - exact.confidence_N).abs().max()) < min(FP32_OP, BF16_OP)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_NV": torch.zeros(2, 3, 4)}, r"logits_NV has shape \[2, 3, 4\], wanted \[N, V\]"),
        ({"logits_NV": torch.zeros(2, 8).double()}, "logits_NV is torch.float64, allowed: torch.float32"),
        ({"mask_token_id": 8}, r"mask_token_id=8: must be in \[0, 8\)"),
        ({"mask_token_id": -1}, r"mask_token_id=-1: must be in \[0, 8\)"),
        ({"draw": draws(3)}, r"draw.temperature_N has shape \[3\], wanted \[2\]"),
        (
            {"draw": Draw(torch.ones(2), torch.ones(2), torch.ones(2).long(), torch.ones(2).long())},
            "draw.seed_N is torch.float32, allowed: torch.int64",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    good = {"logits_NV": torch.zeros(2, 8), "mask_token_id": MASK, "draw": None}
    with pytest.raises(ValueError, match=message):
        ops.canvas_sample(**{**good, **change})


def test_the_kernel_wants_rows_to_lie_together():
    with pytest.raises(ValueError, match=r"logits_NV has strides \[1, 2\], of which a kernel needs the last to be 1"):
        kernel(torch.zeros(8, 2).t(), MASK)


def test_no_rows_are_no_launch():
    got = kernel(torch.zeros(0, 8), MASK)
    assert got.token_N.shape == got.confidence_N.shape == (0,)
