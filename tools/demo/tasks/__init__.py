"""Task families and the sampling of their instances."""

import random
from collections.abc import Iterator

from demo.item import Family, Item
from demo.tasks.arithmetic import assignments, word_problem
from demo.tasks.dates import months, weekdays
from demo.tasks.json_fields import json_fields
from demo.tasks.letters import repeat, reverse_upper, sort_pairs
from demo.tasks.list_code import list_code
from demo.tasks.tables import lookup, totals
from demo.tasks.units import units

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
