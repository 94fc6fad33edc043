"""Reading tables: look rows up, and complete a column."""

import random

from tools.demo_training.item import Item, fixed
from tools.demo_training.tasks.words import THINGS


def lookup(rng: random.Random) -> Item:
    """Prices of some of the things in a table, in the order asked for."""
    names = rng.sample(THINGS, rng.randint(5, 9))
    price = {name: str(rng.randint(100, 999)) for name in names}
    asked = rng.sample(names, rng.randint(3, 5))
    rows = "\n".join(f"{name}: {price[name]}" for name in names)
    question = f"Price list\n{rows}\nHow much are these: {' '.join(asked)}?"
    return Item.make("lookup", question, "".join(f" {name}{fixed(':')}{price[name]}" for name in asked))


def totals(rng: random.Random) -> Item:
    """The total column of a table: how many times the price of one."""
    names = rng.sample(THINGS, rng.randint(3, 6))
    rows, answer = [], ""
    for name in names:
        count, price = rng.randint(2, 9), rng.randint(2, 9)
        rows.append(f"{name}: {count} at {price} each")
        answer += f" {name}{fixed(' ')}{count}{fixed('x')}{price}{fixed('=')}{count * price}"
    return Item.make("totals", "Fill in the total column\n" + "\n".join(rows), answer)
