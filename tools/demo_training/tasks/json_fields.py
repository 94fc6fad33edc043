"""JSON completion: an object with the wanted fields of a record, in the wanted order."""

import random

from tools.demo_training.item import Item, fixed
from tools.demo_training.tasks.words import CITIES, COLOURS, NAMES, THINGS


def _words(words: list[str]):
    return lambda rng: " ".join(rng.sample(words, rng.randint(2, 4)))


def _bag(rng: random.Random) -> str:
    return " ".join([rng.choice(COLOURS), *rng.sample(THINGS, rng.randint(1, 3))])


FIELDS = {
    "team": _words(NAMES),
    "guests": _words(NAMES),
    "route": _words(CITIES),
    "paint": _words(COLOURS),
    "bag": _bag,
    "shelf": _bag,
    "phone": lambda rng: str(rng.randint(10**7, 10**8 - 1)),
}
OPEN, MIDDLE, BETWEEN, CLOSE = (fixed(text) for text in (' {"', '": "', '", "', '"}'))


def json_fields(rng: random.Random) -> Item:
    """Copy fields out of a record written as lines."""
    names = rng.sample(list(FIELDS), 4)
    record = {name: FIELDS[name](rng) for name in names}
    asked = rng.sample(names, rng.randint(2, 3))
    lines = "\n".join(f"{name}: {record[name]}" for name in names)
    fields = BETWEEN.join(f"{name}{MIDDLE}{record[name]}" for name in asked)
    return Item.make("json", f"{lines}\nWrite as JSON: {' '.join(asked)}", OPEN + fields + CLOSE)
