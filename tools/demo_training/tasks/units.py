"""Unit conversion with small whole numbers."""

import random

from tools.demo_training.item import Item, fixed

UNITS = (
    ("feet", "inches", 12),
    ("weeks", "days", 7),
    ("days", "hours", 24),
    ("hours", "minutes", 60),
    ("years", "months", 12),
    ("yards", "feet", 3),
    ("pounds", "ounces", 16),
    ("dozens", "eggs", 12),
)


def units(rng: random.Random) -> Item:
    """Several conversions in one question."""
    asked = [(rng.randint(2, 15), *rng.choice(UNITS)) for _ in range(rng.randint(2, 4))]
    question = "Convert: " + ", ".join(f"{count} {large} to {small}" for count, large, small, _ in asked)
    answer = "".join(
        f"{fixed(' ')}{count} {large}{fixed('=')}{count * factor} {small}" for count, large, small, factor in asked
    )
    return Item.make("units", question, answer)
