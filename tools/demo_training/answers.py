"""How a tower does on held-out tasks, cheaply, while it trains.

Greedy AR answers exactly right if and only if every token of the answer is the argmax given the ones before it, so one
teacher-forced pass measures it. The denoiser has no such shortcut: ``decode`` runs the reveal rule on many canvases at
once.
"""

from collections import defaultdict

import torch

from tools.demo_training.batches import Batch, Row, task_row
from tools.demo_training.config import CANVAS
from tools.demo_training.tasks import FAMILIES, instances
from tools.demo_training.tokenizer import EOS
from tools.demo_training.towers import TrainingTowers
from vllm_twotower.core import MASK_TOKEN_ID
from vllm_twotower.ops.canvas_sample.reference import canvas_sample
from vllm_twotower.ops.reveal.reference import num_to_reveal, select_surest


def held_out_rows(tokenizer, per_family: int, seed: int = 0) -> list[Row]:
    """The first held-out instances of every family."""
    rows = []
    for family in FAMILIES:
        source = instances(family, seed, held_out=True)
        rows += [task_row(tokenizer, item) for _, item in zip(range(per_family), source, strict=False)]
    return rows


def batch_of(rows: list[Row]) -> Batch:
    """One batch, as long as its longest row."""
    return Batch.of(rows, max(row.canvases for row in rows))


@torch.no_grad()
def exact_match_ar(towers: TrainingTowers, rows: list[Row], batch_size: int = 32) -> dict[str, float]:
    """Share of answers that greedy AR would get exactly right, per family and overall."""
    right = defaultdict(list)
    for i in range(0, len(rows), batch_size):
        part = rows[i : i + batch_size]
        batch = batch_of(part)
        hidden, _ = towers.context(batch.tokens_BL, batch.valid_BL)
        agree = towers.context_logits(hidden[:, :-1]).argmax(-1) == batch.tokens_BL[:, 1:]
        for row, ok in zip(part, (agree | ~batch.scored_BL[:, 1:]).all(1), strict=True):
            right[row.family].append(float(ok))
    return _shares(right)


@torch.no_grad()
def decode(
    towers: TrainingTowers, rows: list[Row], threshold: float, max_steps: int = CANVAS
) -> tuple[dict[str, float], float]:
    """Exact match of mask diffusion, and tokens per forward (denoise passes and commits), batched over rows."""
    right, tokens, forwards = defaultdict(list), 0, 0
    for i in range(0, len(rows), 64):
        part = rows[i : i + 64]
        produced, passes = _decode_batch(towers, part, threshold, max_steps)
        for row, answer, used in zip(part, produced, passes, strict=True):
            right[row.family].append(float(answer == row.answer))
            tokens += len(answer)
            forwards += used
    return _shares(right), tokens / forwards


def _decode_batch(
    towers: TrainingTowers, rows: list[Row], threshold: float, max_steps: int
) -> tuple[list[list[int]], list[int]]:
    """Answers up to their end of sequence, and forwards after the prompt's."""
    empty = [Row(row.family, row.prompt, []) for row in rows]
    longest = max(row.canvases for row in rows) + 1
    batch = Batch.of(empty, longest)
    tokens, answers, forwards = batch.tokens_BL.clone(), [[] for _ in rows], [0] * len(rows)
    running = list(range(len(rows)))
    for number in range(longest - max(row.prompt_canvases for row in rows)):
        at = batch.first_canvas_B[running] + number
        _, states = towers.context(tokens, batch.valid_BL)
        canvas = torch.full((len(running), CANVAS), MASK_TOKEN_ID)
        for step in range(max_steps):
            masked = canvas == MASK_TOKEN_ID
            if not masked.any():
                break
            level = masked.float().mean(1)
            logits, _ = towers.denoiser(canvas, level, torch.tensor(running), at, batch.valid_BL, states, masked)
            sample = canvas_sample(logits, MASK_TOKEN_ID)
            proposal = canvas.masked_scatter(masked, sample.token_N)
            confidence = torch.zeros(canvas.shape).masked_scatter(masked, sample.confidence_N)
            rules = (torch.full((len(running),), value) for value in (threshold, step, max_steps))
            count = num_to_reveal(confidence, masked, *rules)
            for i, row in enumerate(running):
                forwards[row] += bool(masked[i].any())
            canvas = torch.where(select_surest(confidence, masked, count), proposal, canvas)
        still = []
        for i, row in enumerate(running):
            new = canvas[i].tolist()
            tokens[row, at[i] * CANVAS : (at[i] + 1) * CANVAS] = canvas[i]
            answers[row] += new[: new.index(EOS) + 1] if EOS in new else new
            if EOS not in new:
                forwards[row] += 1  # the commit; an answer that ended needs none
                still.append(row)
        running = still
        if not running:
            break
    return answers, forwards


def _shares(right: dict[str, list[float]]) -> dict[str, float]:
    shares = {family: sum(values) / len(values) for family, values in right.items()}
    everything = [v for values in right.values() for v in values]
    return {**shares, "overall": sum(everything) / len(everything)}
