"""Task families and the sampling of their instances."""

import random
from collections.abc import Iterator

from tools.demo_training.item import Family, Item
from tools.demo_training.tasks.arithmetic import assignments, word_problem
from tools.demo_training.tasks.dates import months, weekdays
from tools.demo_training.tasks.json_fields import json_fields
from tools.demo_training.tasks.letters import repeat, reverse_upper, sort_pairs
from tools.demo_training.tasks.list_code import list_code
from tools.demo_training.tasks.tables import lookup, totals
from tools.demo_training.tasks.units import units

FAMILIES: dict[str, Family] = {
    "lookup": lookup,
    "totals": totals,
    "json": json_fields,
    "arithmetic": word_problem,
    "code_values": assignments,
    "units": units,
    "weekdays": weekdays,
    "months": months,
    "reverse": reverse_upper,
    "sort": sort_pairs,
    "list_code": list_code,
}
TRAINING_ONLY: dict[str, Family] = {"repeat": repeat}
"""Too easy to measure anything by."""


def instances(family: str, seed: int, held_out: bool) -> Iterator[Item]:
    """Endless instances of one side of the split; a seed always gives the same ones."""
    make = {**FAMILIES, **TRAINING_ONLY}[family]
    rng = random.Random(f"{family} {seed} {held_out}")
    while True:
        item = make(rng)
        if item.is_held_out == held_out:
            yield item
