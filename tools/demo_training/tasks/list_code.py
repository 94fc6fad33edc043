"""What a few Python list operations print."""

import random

from tools.demo_training.item import Item, fixed
from tools.demo_training.tasks.words import LETTERS


def list_code(rng: random.Random) -> Item:
    """A list of letters after each of three operations."""
    letters = rng.sample(LETTERS, rng.randint(5, 8))
    values, spare = letters[:-2], letters[-2:]
    code, shown = [f"s = '{' '.join(values)}'.split()"], []
    for _ in range(rng.randint(2, 3)):
        kind = rng.choice(("append", "pop0", "pop", "reverse") if spare else ("pop0", "pop", "reverse"))
        if kind == "append":
            code.append(f"s.append('{spare[-1]}')")
            values = [*values, spare.pop()]
        elif kind == "pop0":
            code.append("s.pop(0)")
            values = values[1:]
        elif kind == "pop":
            code.append("s.pop()")
            values = values[:-1]
        else:
            code.append("s.reverse()")
            values = values[::-1]
        shown.append(" " + " ".join(values))
    return Item.make("list_code", "Print s after each line\n" + "\n".join(code), fixed(" >").join(shown))
