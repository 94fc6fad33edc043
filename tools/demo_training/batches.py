"""Rows and batches: each row is one document, its answer's canvases aligned.

A row is ``[pad ... <s> prompt | answer </s> ... </s>]``: padded on the left so that the prompt ends where a canvas
starts, whatever its length, because at inference the first canvas starts there. The last canvas is filled up with
``</s>``: the engine trims there, so what the denoiser writes behind the first one is never seen.

Legend: B rows, L tokens (a multiple of the canvas).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from tools.demo_training.config import CANVAS, TrainingConfig
from tools.demo_training.tasks import FAMILIES, TRAINING_ONLY, instances
from tools.demo_training.text import documents
from tools.demo_training.tokenizer import BOS, EOS

LENGTH_STEP = CANVAS
POOL_ROWS = 180
"""Of each family, times its weight."""
TEXT_SHARES = {"bible": 0.55, "reference": 0.1, "code": 0.35}


@dataclass(frozen=True)
class Row:
    """One document."""

    family: str
    prompt: list[int]
    """Starts with the beginning-of-sequence token."""
    answer: list[int]
    """Ends with the first end-of-sequence token, except for text that goes on."""

    @property
    def prompt_canvases(self) -> int:
        return -(-len(self.prompt) // CANVAS)

    @property
    def canvases(self) -> int:
        """Canvases from the row's padded start to the end of its answer."""
        return self.prompt_canvases - (-len(self.answer) // CANVAS)


@dataclass(frozen=True)
class Batch:
    """Rows of similar length, as tensors."""

    tokens_BL: torch.Tensor
    valid_BL: torch.Tensor
    """False on the padding before a row's first token."""
    scored_BL: torch.Tensor
    """True where the token counts as a next-token target."""
    first_canvas_B: torch.Tensor
    """Index of the canvas in which the answer starts."""
    end_canvas_B: torch.Tensor
    """Index after the canvas in which the answer ends."""

    @classmethod
    def of(cls, rows: list[Row], num_canvases: int) -> "Batch":
        length = num_canvases * CANVAS
        tokens = torch.full((len(rows), length), EOS)
        valid = torch.ones(len(rows), length, dtype=torch.bool)
        scored = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            start, answer = row.prompt_canvases * CANVAS - len(row.prompt), row.prompt_canvases * CANVAS
            end = answer + len(row.answer)
            tokens[i, :start] = 0
            tokens[i, start:end] = torch.tensor(row.prompt + row.answer)
            valid[i, :start] = False
            scored[i, start + 1 if row.family in TEXT_SHARES else answer : end] = True
        first = torch.tensor([row.prompt_canvases for row in rows])
        return cls(tokens, valid, scored, first, torch.tensor([row.canvases for row in rows]))


def task_row(tokenizer: Tokenizer, item) -> Row:
    """A task instance as the engine would see it."""
    answer = tokenizer.encode(item.answer, add_special_tokens=False).ids
    return Row(item.family, tokenizer.encode(item.prompt).ids, [*answer, EOS])


class Corpus:
    """The training side of tasks and text, as batches that depend on the seed and a pool's number only."""

    def __init__(self, tokenizer: Tokenizer, config: TrainingConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        texts = documents(held_out=False)
        self.text = {kind: [e.ids for e in tokenizer.encode_batch(t)] for kind, t in texts.items()}

    def pool(self, number: int) -> list[Batch]:
        """A few dozen batches: a mixture, sorted into batches of similar length, shuffled."""
        rng = random.Random(f"{self.config.seed} pool {number}")
        rows = []
        for family in [*FAMILIES, *TRAINING_ONLY]:
            source = instances(family, rng.randrange(2**60), held_out=False)
            count = int(POOL_ROWS * self.config.family_weights.get(family, 1.0))
            rows += [task_row(self.tokenizer, item) for _, item in zip(range(count), source, strict=False)]
        budget = (
            sum(len(r.prompt) + len(r.answer) for r in rows) * self.config.text_share / (1 - self.config.text_share)
        )
        while budget > 0:
            row = self._text_row(rng)
            rows.append(row)
            budget -= len(row.prompt) + len(row.answer)
        return self._batches(rows, rng)

    def _text_row(self, rng: random.Random) -> Row:
        """A window of one document; the document's start keeps its beginning-of-sequence token there."""
        kind = rng.choices(list(TEXT_SHARES), list(TEXT_SHARES.values()))[0]
        ids = rng.choice(self.text[kind])
        at = rng.choice((0, rng.randrange(max(1, len(ids) - self.config.text_length))))
        window = ids[at : at + self.config.text_length - 1]
        tokens = [BOS, *window, *([EOS] if at + len(window) == len(ids) else [])]
        # a window that breaks off ends with a whole canvas: there is nothing to fill the last one with
        whole = max(1, len(tokens) - CANVAS * rng.randint(1, 4))
        cut = rng.randint(1, len(tokens) - 1) if tokens[-1] == EOS else whole
        return Row(kind, tokens[:cut], tokens[cut:])

    def _batches(self, rows: list[Row], rng: random.Random) -> list[Batch]:
        by_length: dict[int, list[Row]] = {}
        for row in rows:
            steps = -(-row.canvases * CANVAS // LENGTH_STEP)
            by_length.setdefault(steps * LENGTH_STEP, []).append(row)
        batches, carried = [], []
        for length in sorted(by_length):
            group = [*carried, *by_length[length]]
            rng.shuffle(group)
            size = self.config.tokens_per_batch // length
            whole = len(group) // size * size
            batches += [Batch.of(group[i : i + size], length // CANVAS) for i in range(0, whole, size)]
            carried = group[whole:]  # joins the next longer batch; the pool's last few rows are dropped
        rng.shuffle(batches)
        return batches


def batches_from(corpus: Corpus, pool: int, index: int) -> Iterator[tuple[int, int, Batch]]:
    """Endless batches from a position on, each with the position after it."""
    while True:
        for batch in (batches := corpus.pool(pool))[index:]:
            index += 1
            yield (pool, index, batch) if index < len(batches) else (pool + 1, 0, batch)
        pool, index = pool + 1, 0
