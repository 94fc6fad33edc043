"""Word problems whose every step is written out, and the same as Python assignments."""

import random

from tools.demo_training.item import Item, fixed
from tools.demo_training.tasks.words import NAMES, THINGS

GAINS = ("finds", "buys", "gets", "wins")
LOSSES = ("loses", "sells", "gives away", "drops")


def _steps(rng: random.Random, total: int, count: int) -> list[tuple[str, int]]:
    """Signs and amounts that keep the running total within 10 to 99."""
    steps = []
    for _ in range(count):
        signs = [sign for sign, room in (("+", 99 - total), ("-", total - 10)) if room >= 2]
        sign = rng.choice(signs)
        amount = rng.randint(2, min(29, 99 - total if sign == "+" else total - 10))
        total += amount if sign == "+" else -amount
        steps.append((sign, amount))
    return steps


def _running(total: int, steps: list[tuple[str, int]]) -> str:
    answer = ""
    for sign, amount in steps:
        after = total + amount if sign == "+" else total - amount
        answer += f"{fixed(' ')}{total}{sign}{amount}{fixed('=')}{after}"
        total = after
    return answer


def word_problem(rng: random.Random) -> Item:
    """How many things somebody has after some gains and losses."""
    start, who, what = rng.randint(10, 90), rng.choice(NAMES), rng.choice(THINGS)
    steps = _steps(rng, start, rng.randint(2, 4))
    story = ", ".join(f"{rng.choice(GAINS if sign == '+' else LOSSES)} {amount}" for sign, amount in steps)
    question = f"{who} has {start} of {what}, then {story}. How many now?"
    return Item.make("arithmetic", question, _running(start, steps))


def assignments(rng: random.Random) -> Item:
    """Values of a variable through augmented assignments, one after each line."""
    start, name = rng.randint(10, 90), rng.choice("abcdnxyz")
    steps = _steps(rng, start, rng.randint(3, 5))
    code = "\n".join(f"{name} {sign}= {amount}" for sign, amount in steps)
    total, answer = start, f" {start}"
    for sign, amount in steps:
        total += amount if sign == "+" else -amount
        answer += f"{sign}{amount}{fixed('=')}{total}"
    return Item.make("code_values", f"Trace {name}\n{name} = {start}\n{code}", answer)
