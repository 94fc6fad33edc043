"""String manipulation and sorting on spaced letters."""

import random

from tools.demo_training.item import Item, fixed
from tools.demo_training.tasks.words import ALL, LETTERS


def reverse_upper(rng: random.Random) -> Item:
    """Letters backwards, then those in upper case."""
    letters = rng.sample(LETTERS, rng.randint(5, 9))
    backwards = letters[::-1]
    answer = " " + " ".join(backwards) + fixed(" |") + " " + " ".join(backwards).upper()
    return Item.make("reverse", f"Reverse, then upper case: {' '.join(letters)}", answer)


def sort_pairs(rng: random.Random) -> Item:
    """Letter and number pairs, sorted by letter."""
    letters = rng.sample(LETTERS, rng.randint(5, 8))
    pairs = [f"{letter}{rng.randint(10, 99)}" for letter in letters]
    return Item.make("sort", f"Sort: {' '.join(pairs)}", " " + " ".join(sorted(pairs)))


def repeat(rng: random.Random) -> Item:
    """Copying, nothing else: for training only, where it is what the other families build on."""
    words = rng.sample(ALL, rng.randint(3, 12))
    return Item.make("repeat", f"Repeat: {' '.join(words)}", " " + " ".join(words))
