"""Laws of denoising on random canvases, and the batched functions against the plain reference."""

import itertools
import math
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_twotower.decoding.noise_level import all_noise_levels, level_index
from vllm_twotower.ops.canvas_sample.reference import Draw, canvas_sample
from vllm_twotower.ops.reveal.reference import num_to_reveal, select_surest
from vllm_twotower.oracle.reference import MaskDiffusion, generate_mask_diffusion

MASK, VOCAB = 3, 12


@st.composite
def canvases(draw):
    """Rows with their own settings, and a source of logits that depends on nothing but row, pass and position."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**31))
    scale = draw(st.sampled_from([0.0, 1.0, 8.0]))  # 0: all ties
    mask_logit = draw(st.sampled_from([0.0, 30.0]))  # 30: the denoiser would say "still masked" everywhere
    options = [
        MaskDiffusion(
            canvas_length=width,
            max_steps=draw(st.integers(1, 12)),
            confidence_threshold=draw(st.sampled_from([0.05, 0.3, 0.8, 1.0])),
            temperature=draw(st.sampled_from([0.0, 0.0, 0.9])),
            seed=draw(st.integers(-(2**63), 2**63 - 1)),
            mask_token_id=MASK,
        )
        for _ in range(rows)
    ]

    def logits(row, step):
        generator = torch.Generator().manual_seed(seed * 1000 + row * 50 + step)
        values = torch.randn(width, VOCAB, generator=generator) * scale
        values[:, MASK] += mask_logit
        return values

    return options, width, logits


def run_batch(options, width, logits, order=None, elsewhere=(0, 0.0)):
    """Denoise all rows together with the functions the engine uses; returns canvases after every pass.

    ``elsewhere`` is the proposal and confidence that positions already revealed are given.
    """
    rows = order or range(len(options))
    o = [options[r] for r in rows]
    canvas = torch.full((len(o), width), MASK)
    passes = torch.zeros(len(o), dtype=torch.int64)
    max_steps = torch.tensor([x.max_steps for x in o])
    threshold = torch.tensor([x.confidence_threshold for x in o])
    history = [canvas]
    while (canvas == MASK).any():
        masked = canvas == MASK
        row, column = masked.nonzero(as_tuple=True)
        flat = torch.stack([logits(rows[int(r)], int(passes[r]))[c] for r, c in zip(row, column, strict=True)])
        seed = torch.tensor([x.seed for x in o])[row]
        temperature = torch.tensor([x.temperature for x in o])[row]
        sample = canvas_sample(flat, MASK, Draw(temperature, seed, 1 + column, passes[row]))
        proposal, confidence = torch.full_like(canvas, elsewhere[0]), torch.full(canvas.shape, elsewhere[1])
        proposal[row, column], confidence[row, column] = sample.token_N, sample.confidence_N
        k = num_to_reveal(confidence, masked, threshold, passes, max_steps)
        canvas = torch.where(select_surest(confidence, masked, k), proposal, canvas)
        passes = passes + masked.any(dim=1)
        history.append(canvas)
        check_reveals(history[-2], canvas, confidence, o, passes - masked.any(dim=1).long())
    return history, passes


def check_reveals(before, after, confidence, options, pass_index):
    """A pass of each row reveals the rule's number of positions: the surest, among equals the lowest."""
    for row, option in enumerate(options):
        masked = (before[row] == MASK).nonzero().squeeze(1).tolist()
        revealed = [i for i in masked if int(after[row, i]) != MASK]
        if not masked:
            continue
        sure = {i: float(confidence[row, i]) for i in masked}
        # the threshold as the engine holds it, in fp32
        num_sure = sum(c > float(torch.tensor(option.confidence_threshold)) for c in sure.values())
        num_due = math.ceil(len(masked) / (option.max_steps - int(pass_index[row])))
        assert 1 <= len(revealed) == max(1, num_sure, num_due)
        assert revealed == sorted(sorted(masked, key=lambda i: (-sure[i], i))[: len(revealed)])


def run_reference(option, row, logits, elsewhere=None):
    step = -1

    def denoise(canvas, level):
        nonlocal step
        step += 1
        values = logits(row, step)
        if elsewhere is not None:
            values[torch.tensor(canvas) != MASK] = elsewhere
        return values

    return generate_mask_diffusion([9], option.canvas_length, denoise, lambda _: None, option)


@settings(max_examples=60, deadline=None)
@given(canvases())
def test_the_batched_functions_equal_the_plain_reference_row_by_row(case):
    options, width, logits = case
    history, passes = run_batch(options, width, logits)
    for row, option in enumerate(options):
        result = run_reference(option, row, logits)
        assert history[-1][row].tolist() == list(result.token_ids)
        assert int(passes[row]) == result.num_denoise_passes


@settings(max_examples=60, deadline=None)
@given(canvases())
def test_laws(case):
    options, width, logits = case
    history, passes = run_batch(options, width, logits)
    for row, option in enumerate(options):
        num_passes = int(passes[row])
        assert 1 <= num_passes <= option.max_steps, "denoising ends within T passes"
        if option.confidence_threshold == 1.0 and option.max_steps >= width:
            assert num_passes == width, "threshold 1 reveals one token per pass"
        for before, after in itertools.pairwise(history):
            fixed = before[row] != MASK
            assert (before[row][fixed] == after[row][fixed]).all(), "a revealed token never changes"
            if (before[row] == MASK).any():
                assert (after[row] == MASK).sum() < (before[row] == MASK).sum(), "every pass reveals"
    assert not (history[-1] == MASK).any(), "the mask is never emitted"


@settings(max_examples=15, deadline=None)
@given(canvases())
def test_logits_of_revealed_positions_are_not_looked_at(case):
    options, width, logits = case
    plain, plain_passes = run_batch(options, width, logits)
    for elsewhere in ((MASK, math.inf), (5, 1.0), (7, math.nan)):
        history, passes = run_batch(options, width, logits, elsewhere=elsewhere)
        assert [h.tolist() for h in history] == [h.tolist() for h in plain]
        assert passes.tolist() == plain_passes.tolist()
    for row, option in enumerate(options):
        for elsewhere in (math.nan, math.inf, 1e30):
            result = run_reference(option, row, logits, elsewhere)
            assert plain[-1][row].tolist() == list(result.token_ids)


@settings(max_examples=30, deadline=None)
@given(canvases())
def test_threshold_1_and_enough_passes_reveal_one_token_per_pass(case):
    options, width, logits = case
    options = [replace(o, confidence_threshold=1.0, max_steps=width + o.max_steps - 1) for o in options]
    history, passes = run_batch(options, width, logits)
    assert passes.tolist() == [width] * len(options)
    assert [(h == MASK).sum(1).tolist() for h in history] == [[n] * len(options) for n in range(width, -1, -1)]


@settings(max_examples=30, deadline=None)
@given(canvases(), st.randoms(use_true_random=False))
def test_permuting_a_batch_permutes_its_outputs(case, random):
    options, width, logits = case
    order = list(range(len(options)))
    random.shuffle(order)
    straight, _ = run_batch(options, width, logits)
    shuffled, _ = run_batch(options, width, logits, order)
    assert shuffled[-1].tolist() == [straight[-1][r].tolist() for r in order]


def test_ties_go_to_the_lowest_position():
    masked, same = torch.tensor([[True, False, True, True, True]]), torch.full((1, 5), 0.5)
    assert select_surest(same, masked, torch.tensor([2])).tolist() == [[True, False, True, False, False]]


def test_the_threshold_is_strict():
    masked = torch.ones(1, 4, dtype=torch.bool)
    confidence = torch.tensor([[0.5, 0.5, 0.5001, 0.9]])
    k = num_to_reveal(confidence, masked, torch.tensor([0.5]), torch.tensor([0]), torch.tensor([16]))
    assert k.tolist() == [2]


def test_levels_are_found_again():
    levels = all_noise_levels(16)
    for width in range(1, 17):
        for num_masked in range(width + 1):
            index = level_index(torch.tensor([num_masked]), torch.tensor([width]))
            assert float(levels[index]) == torch.tensor(num_masked / width, dtype=torch.float32)
