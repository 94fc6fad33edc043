"""Rows as a Markdown table."""

from typing import Any


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines; the first row's keys are the header, None is an empty cell."""
    head = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return head + ["| " + " | ".join("" if v is None else str(v) for v in row.values()) + " |" for row in rows]
