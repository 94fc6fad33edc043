"""The demo model's training code: its fast towers are the plain towers, its questions are held out and mostly not
template."""

import pathlib
import random

import pytest
import torch
from tokenizers import Tokenizer

from tools.demo_training import layers
from tools.demo_training.batches import Batch, Row
from tools.demo_training.config import CANVAS, MODEL
from tools.demo_training.corruptions import Canvases, corrupt, masked_canvases, met_canvases
from tools.demo_training.initial import context_weights, denoiser_weights
from tools.demo_training.item import Item, fixed
from tools.demo_training.losses import masked_tokens
from tools.demo_training.tasks import FAMILIES, instances
from tools.demo_training.towers import TrainingTowers
from vllm_twotower.commands.cli import DEMO_MODEL
from vllm_twotower.oracle.plain_towers import DENOISER, ContextCache, PlainTwoTower, TowerShape

SMALL = {**MODEL, "vocab_size": 64, "hidden_size": 32, "mamba_head_dim": 8, "head_dim": 8, "ssm_state_size": 8}


@pytest.fixture
def weights():
    torch.manual_seed(0)
    shape = TowerShape.from_config(SMALL)
    weights = context_weights(shape)
    weights.update(denoiser_weights(weights, shape))
    for name, tensor in weights.items():
        if name.startswith((DENOISER, "t_block", "scale")):
            tensor += torch.randn_like(tensor) * 0.05
    return weights


def test_training_towers_equal_the_plain_towers(weights, monkeypatch):
    """Rows padded on the left, canvases of different rows at once, against one prompt at a time without padding."""
    monkeypatch.setattr(layers, "EXACT", True)
    shape = TowerShape.from_config(SMALL)
    training, plain = TrainingTowers(weights, shape), PlainTwoTower(weights, shape)
    rng = random.Random(0)
    rows = [Row("lookup", [rng.randrange(4, 64) for _ in range(n)], [rng.randrange(4, 64)] * 40) for n in (5, 21, 32)]
    batch = Batch.of(rows, 6)
    hidden, states = training.context(batch.tokens_BL, batch.valid_BL)
    at = batch.first_canvas_B + 1
    canvas = torch.where(torch.rand(3, CANVAS) < 0.5, 3, batch.tokens_BL[:, :CANVAS])
    level = torch.tensor([0.2, 0.5, 1.0])
    denoised, _ = training.denoiser(canvas, level, torch.arange(3), at, batch.valid_BL, states)
    for i, row in enumerate(rows):
        start, end = int(batch.valid_BL[i].int().argmax()), int(at[i]) * CANVAS
        cache = ContextCache()
        expected = plain.extend_context(batch.tokens_BL[i : i + 1, start:end], cache)
        assert start == -len(row.prompt) % CANVAS
        torch.testing.assert_close(hidden[i : i + 1, start:end], expected, rtol=1e-4, atol=1e-5)
        expected = plain.denoise(canvas[i : i + 1], level[i : i + 1], cache)
        torch.testing.assert_close(denoised[i : i + 1], expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def rows():
    rng = random.Random(1)
    answer = [rng.randrange(4, 64) for _ in range(2 * CANVAS)]
    return [Row("lookup", [rng.randrange(4, 64) for _ in range(n)], answer) for n in (5, 21, 32)]


def test_met_canvases_are_those_that_denoising_passes_through(weights, rows, monkeypatch):
    """Each is what whole passes over a masked canvas leave, for some number of them, and no other canvas is there."""
    monkeypatch.setattr("tools.demo_training.corruptions.THRESHOLDS", (0.03,))  # random weights are sure of nothing
    towers, batch = TrainingTowers(weights, TowerShape.from_config(SMALL)), Batch.of(rows, 4)
    _, states = towers.context(batch.tokens_BL, batch.valid_BL)
    generator = torch.Generator().manual_seed(0)
    whole = masked_canvases(batch, torch.ones(len(rows)), generator)
    assert whole.masked_AS.all()
    assert len(whole.row_A) == 2 * len(rows)
    passed = {(r, c): [mask] for r, c, mask in zip(*each(whole), strict=True)}
    for at, masks in passed.items():
        for _ in range(3):
            masks.append(after_a_pass(towers, batch, states, at, torch.tensor(masks[-1]), 0.03))
    seen = set()
    for _ in range(12):
        met = met_canvases(towers, batch, states, generator)
        assert torch.equal(met.level_A, met.masked_AS.float().mean(1))
        for row, canvas, mask in zip(*each(met), strict=True):
            assert mask in passed[row, canvas]
            assert any(mask)
            seen.add(passed[row, canvas].index(mask))
    assert seen == {0, 1, 2, 3}


def each(canvases: Canvases) -> list[list]:
    """Rows, indices in them, masks."""
    return [tensor.tolist() for tensor in (canvases.row_A, canvases.canvas_A, canvases.masked_AS)]


def after_a_pass(towers, batch, states, at, mask_S, threshold):
    """Which positions one pass leaves masked, one canvas by itself."""
    if not mask_S.any():
        return mask_S.tolist()
    row, canvas = (torch.tensor([i]) for i in at)
    clean = batch.tokens_BL[at[0], at[1] * CANVAS : (at[1] + 1) * CANVAS]
    masked_canvas = corrupt(clean, mask_S)[None]
    logits, _ = towers.denoiser(masked_canvas, mask_S.float().mean()[None], row, canvas, batch.valid_BL, states)
    logits[..., 3] = float("-inf")
    sure = logits[0].softmax(-1).amax(-1).masked_fill(~mask_S, -1)
    left = mask_S & (sure <= threshold)
    left[sure.argmax()] = False
    return left.tolist()


def test_the_loss_is_the_mean_over_rows_of_a_rows_mean(weights, rows, monkeypatch):
    towers, batch = TrainingTowers(weights, TowerShape.from_config(SMALL)), Batch.of(rows, 4)
    kept: list[Canvases] = []
    for name in ("masked_canvases", "met_canvases"):
        monkeypatch.setattr(f"tools.demo_training.losses.{name}", keeping(kept, globals()[name]))
    loss, _ = masked_tokens(towers, batch, torch.Generator().manual_seed(2))
    _, states = towers.context(batch.tokens_BL, batch.valid_BL)
    means = []
    for one in kept:
        level = one.level_A.clamp(min=1e-3)
        canvas = corrupt(one.clean_AS, one.masked_AS)
        logits, _ = towers.denoiser(canvas, level, one.row_A, one.canvas_A, batch.valid_BL, states)
        surprise = torch.nn.functional.cross_entropy(logits.transpose(1, 2), one.clean_AS, reduction="none")
        for row in range(len(rows)):
            of_row = one.masked_AS & (one.row_A == row)[:, None]
            means += [surprise[of_row].mean()] if of_row.any() else []
    torch.testing.assert_close(loss, torch.stack(means).mean(), rtol=1e-4, atol=1e-5)


def keeping(kept, make):
    def wrapped(*args, **more):
        kept.append(make(*args, **more))
        return kept[-1]

    return wrapped


def some(family: str, seed: int, held_out: bool) -> list[Item]:
    return [item for _, item in zip(range(150), instances(family, seed, held_out), strict=False)]


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_are_held_out(family):
    held_out = some(family, 1, True)
    shown = {item.prompt for seed in range(5) for item in some(family, seed, False)}
    assert not {item.prompt for item in held_out} & shown
    assert len({item.prompt for item in held_out}) >= 145
    assert all(item.prompt.endswith("\nAnswer:") for item in held_out)


def test_answers_are_mostly_not_template():
    """At most a third of all answer tokens; of ``totals`` and ``json`` nearly 40 %: signs, field names and brackets."""
    tokenizer = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
    is_fixed: dict[str, list[bool]] = {
        family: [
            any(start <= a and b <= end for start, end in item.fixed_spans)
            for item in some(family, 1, True)
            for a, b in tokenizer.encode(item.answer, add_special_tokens=False).offsets
        ]
        for family in FAMILIES
    }
    assert sum(map(sum, is_fixed.values())) <= sum(map(len, is_fixed.values())) / 3
    for family, fixed_tokens in is_fixed.items():
        assert sum(fixed_tokens) <= 0.4 * len(fixed_tokens), family


def test_fixed_text_is_found_where_it_was_marked():
    item = Item.make("x", "?", f"a{fixed(': ')}{fixed('=')}b{fixed('!')}")
    assert (item.answer, item.fixed_spans) == ("a: =b!", ((1, 4), (5, 6)))


def test_files_are_small():
    for path in (pathlib.Path(__file__).parents[1] / "tools" / "demo_training").rglob("*.py"):
        assert path.read_text(encoding="utf-8").count("\n") <= 500
