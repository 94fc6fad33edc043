"""Date reasoning: weekdays and months, a chain of moves."""

import random

from tools.demo_training.item import Item
from tools.demo_training.tasks.words import DAYS, MONTHS


def _chain(rng: random.Random, family: str, names: list[str], unit: str, furthest: int) -> Item:
    at = rng.randrange(len(names))
    moves = [rng.choice((1, -1)) * rng.randint(1, furthest) for _ in range(rng.randint(4, 7))]
    question = f"It is {names[at]}. Move by {unit}: " + " ".join(f"{move:+d}" for move in moves)
    answer = f" {names[at]}"
    for move in moves:
        at = (at + move) % len(names)
        answer += f" {move:+d} {names[at]}"
    return Item.make(family, question, answer)


def weekdays(rng: random.Random) -> Item:
    """Forward and back through the week."""
    return _chain(rng, "weekdays", DAYS, "days", 9)


def months(rng: random.Random) -> Item:
    """Forward and back through the year."""
    return _chain(rng, "months", MONTHS, "months", 9)
