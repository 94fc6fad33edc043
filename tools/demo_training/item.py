"""One task instance: a prompt with exactly one right answer."""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

PROMPT_END = "\nAnswer:"
"""Every prompt ends so; the chat template adds it."""
HELD_OUT_ONE_IN = 10
_LITERAL = re.compile("\x02(.*?)\x03", re.DOTALL)


def fixed(text: str) -> str:
    """Mark text that the family repeats verbatim in every answer, such as a separator."""
    return f"\x02{text}\x03"


@dataclass(frozen=True)
class Item:
    """A prompt and its answer."""

    family: str
    prompt: str
    answer: str
    fixed_spans: tuple[tuple[int, int], ...]
    """Character ranges of ``answer`` that every answer of the family contains."""

    @classmethod
    def make(cls, family: str, question: str, marked_answer: str) -> "Item":
        """From the question alone, and an answer with its fixed text marked by ``fixed``."""
        spans: list[tuple[int, int]] = []
        plain, end = "", 0
        for match in _LITERAL.finditer(marked_answer):
            plain += marked_answer[end : match.start()]
            start = spans.pop()[0] if spans and spans[-1][1] == len(plain) else len(plain)
            plain += match[1]
            spans.append((start, len(plain)))
            end = match.end()
        return cls(family, question + PROMPT_END, plain + marked_answer[end:], tuple(spans))

    @property
    def is_held_out(self) -> bool:
        """Decided by the prompt alone, so that no seed can put an instance on both sides."""
        return int.from_bytes(hashlib.blake2b(self.prompt.encode(), digest_size=4).digest()) % HELD_OUT_ONE_IN == 0


Family = Callable[[random.Random], Item]
