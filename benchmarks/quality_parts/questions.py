"""Held-out questions, and how an answer is judged: equal to the one right answer, character for character."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from tools.demo_training.item import Item
from tools.demo_training.tasks import FAMILIES, instances
from tools.demo_training.text import documents

MAX_TOKENS = 96
"""Above every right answer; one that runs on is cut there and wrong."""


def held_out(per_family: int, seed: int = 1) -> list[Item]:
    """Instances that training never generates; another seed than the one training checks itself on."""
    items = []
    for family in FAMILIES:
        items += [item for _, item in zip(range(per_family), instances(family, seed, held_out=True), strict=False)]
    return items


def held_out_prose(count: int) -> list[str]:
    """Paragraphs that training leaves out, three of the Bible's for one of Python's reference."""
    texts = documents(held_out=True)
    return texts["bible"][: count - count // 4] + texts["reference"][: count // 4]


@dataclass(frozen=True)
class Outcome:
    """All answers under one setting."""

    exact: dict[str, float]
    """Share exactly right, per family and ``overall``."""
    num_unfinished: int
    """Answers without an end of sequence; they count as wrong."""
    tokens: int
    """Up to and including the end of sequence."""
    denoise_passes: int
    context_passes: int
    """Commits, or one per token in AR; the prompts' own forwards are left out."""

    @property
    def tokens_per_pass(self) -> float | None:
        return self.tokens / self.denoise_passes if self.denoise_passes else None

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / (self.denoise_passes + self.context_passes)

    def row(self) -> dict:
        """As JSON."""
        per_pass = self.tokens_per_pass
        return {
            "exact": {family: round(share, 4) for family, share in self.exact.items()},
            "unfinished": self.num_unfinished,
            "tokens": self.tokens,
            "denoise_passes": self.denoise_passes,
            "context_passes": self.context_passes,
            "tokens_per_denoise_pass": round(per_pass, 3) if per_pass else None,
            "tokens_per_forward": round(self.tokens_per_forward, 3),
        }


def shares(items: Sequence[Item], answers: Sequence[str | None]) -> dict[str, float]:
    """Share of right answers; None is an answer that did not end."""
    right = defaultdict(list)
    for item, answer in zip(items, answers, strict=True):
        right[item.family].append(answer == item.answer)
    everything = [ok for values in right.values() for ok in values]
    return {**{f: sum(v) / len(v) for f, v in right.items()}, "overall": sum(everything) / len(everything)}
